"""Late chunking (arXiv 2409.04701): the model reads the whole text, then each chunk is the mean of its own tokens.

Shape letters: n tokens of a text, D width, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral
from typing import Literal, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError
from polyvec.inference.batching import Batch
from polyvec.inference.engines import Engine
from polyvec.text.chunking import Span, check_spans, fixed_spans, sentence_spans, token_ranges, windows
from polyvec.text.tokenizer import Encoding

#: ``sentence``, tokens a chunk, character spans, or a function from a text to its spans.
LateChunking: TypeAlias = Literal["sentence"] | int | Sequence[Span] | Callable[[str], Sequence[Span]]

#: A run of a text's token states (m, D), with the index of its first token in the text.
TokenStates: TypeAlias = tuple[NDArray[np.float32], int]

_WINDOW_OVERLAP = 512  # tokens of context that a later window re-reads (arXiv 2409.04701, section 3.4)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether ``value`` is a whole number, of NumPy too; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_chunking(chunking: LateChunking | None) -> None:
    """Raise ``InputError`` unless ``chunking`` is one of the ways to chunk, or None."""
    if isinstance(chunking, str):
        is_known = chunking == "sentence"
    elif is_whole(chunking):
        is_known = chunking >= 1
    else:
        is_known = chunking is None or callable(chunking) or isinstance(chunking, Sequence)
    if not is_known:
        raise InputError(
            f"late_chunking must be 'sentence', a number of tokens from 1, spans, or a function, got {chunking!r}"
        )


def chunk_spans(chunking: LateChunking, text: str, encoding: Encoding) -> list[Span]:
    """Return the C character spans that ``chunking`` makes of ``text``."""
    if chunking == "sentence":
        spans = sentence_spans(text)
        # A tokenizer may drop what Python does not call whitespace, such as a line of zero-width spaces.
        ranges = token_ranges(encoding.offsets[encoding.num_prefix_tokens : -1], spans)
        return [span for span, (start, stop) in zip(spans, ranges, strict=True) if start < stop]
    if is_whole(chunking):
        return fixed_spans(encoding.offsets[encoding.num_prefix_tokens : -1], chunking)
    assert not isinstance(chunking, (str, int))
    return check_spans(chunking(text) if callable(chunking) else chunking, len(text))


def window_states(engine: Engine, encoding: Encoding, adapter_id: int, *, max_tokens: int) -> Iterator[TokenStates]:
    """Yield the states of a text beyond the context, window by window; together they are n, each token once.

    Each window opens with ``<s>`` and the prompt and closes with ``</s>``, as the model was trained to read. Raises
    ``InputError`` for a prompt that leaves no room for the text.
    """
    ids, prefix = encoding.input_ids, encoding.num_prefix_tokens
    head, body, tail = ids[:prefix], ids[prefix:-1], ids[-1:]
    size = max_tokens - prefix - 1
    if size < 1:
        raise InputError(
            f"prompt must leave room for the text in {max_tokens} tokens, got {prefix - 1} tokens; shorten it"
        )
    plan = windows(len(body), size, min(_WINDOW_OVERLAP, size // 2))
    for number, (first, stop, kept) in enumerate(plan):
        batch = Batch.of([np.concatenate((head, body[first:stop], tail))], [adapter_id])
        states = engine.token_states(batch)
        begin = 0 if number == 0 else prefix + kept - first
        end = len(states) if number == len(plan) - 1 else len(states) - 1
        yield states[begin:end], 0 if number == 0 else prefix + kept


def chunk_means(
    parts: Iterable[TokenStates], encoding: Encoding, spans: Sequence[Span], *, width: int
) -> NDArray[np.float32]:
    """Return (C, D) means of each chunk's token states; ``width`` is D.

    A chunk that opens the text takes ``<s>`` and the prompt too, one that closes it ``</s>``: one chunk over the whole
    text is then the text's own vector (algorithm 1). Raises ``InputError`` for a span without a token.
    """
    prefix, offsets = encoding.num_prefix_tokens, encoding.offsets
    ranges = token_ranges(offsets[prefix:-1], spans) + prefix
    for i, (start, stop) in enumerate(ranges):
        if start == stop:
            raise InputError(f"late_chunking[{i}] must hold text, got whitespace alone at characters {spans[i]}")
    holds_text = np.flatnonzero(offsets[prefix:-1, 0] < offsets[prefix:-1, 1]) + prefix  # no mark of a space alone
    if len(holds_text):
        ranges[ranges[:, 0] <= holds_text[0], 0] = 0
        ranges[ranges[:, 1] > holds_text[-1], 1] = len(encoding)
    sums = np.zeros((len(spans), width), dtype=np.float32)
    for states, first in parts:
        last = first + len(states)
        for chunk in np.flatnonzero((ranges[:, 0] < last) & (ranges[:, 1] > first)):
            start, stop = ranges[chunk]
            sums[chunk] += states[max(start - first, 0) : stop - first].sum(axis=0, dtype=np.float32)
    means: NDArray[np.float32] = sums / np.maximum(ranges[:, 1] - ranges[:, 0], 1)[:, None].astype(np.float32)
    return means
