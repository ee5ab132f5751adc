"""Spans for late chunking: characters of a text to chunks, and chunks to tokens (arXiv 2409.04701).

Shape letters: C chunks in a text, n tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from operator import index

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError

Span = tuple[int, int]

# A sentence ends after a mark of its script: marks that need a space after them, marks that do not (CJK), or a new line
# followed by a blank one or a list item. A full stop is no end before a lower-case letter or after a single capital
# ("e.g. this", "J. Smith").
_SPACED = r"[.!?…؟۔।॥։።᙮។៕။]+[\"'”’»)\]]*(?=\s)"
_UNSPACED = r"[。！？｡]+[」』”’）]*"
_END = re.compile(rf"{_SPACED}|{_UNSPACED}|\n")
_ABBREVIATION = re.compile(r"(?:^|[\s(.])[^\W\d_]\.$|(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|No|vs|Nr|Sr|Jr|etc|bzw|ca)\.$")

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_MARKED = re.compile(r"#{1,6}[^\S\n]")  # a heading of Markdown
_LONGEST_HEADING = 80  # characters


def sentence_spans(text: str) -> list[Span]:
    """Return character spans of the sentences of ``text``, in any script; a line break ends one too.

    Spans never overlap and leave out surrounding whitespace only. The empty text has none.
    """
    spans: list[Span] = []
    start = 0
    for match in _END.finditer(text):
        if match[0][0] == "." and _is_abbreviation(text, match.end()):
            continue
        start = _append_trimmed(spans, text, start, match.end())
    _append_trimmed(spans, text, start, len(text))
    return spans


def _is_abbreviation(text: str, end: int) -> bool:
    following = text[end:].lstrip()[:1] if end + 40 > len(text) else text[end : end + 40].lstrip()[:1]
    return following.islower() or bool(_ABBREVIATION.search(text[max(0, end - 8) : end]))


def _append_trimmed(spans: list[Span], text: str, start: int, end: int) -> int:
    part = text[start:end]
    stripped = part.strip()
    if stripped:
        first = start + part.index(stripped[0]) if part[0].isspace() else start
        spans.append((first, first + len(stripped)))
    return end


def passage_spans(text: str, size: int = 280) -> list[Span]:
    """Return spans of consecutive sentences of up to ``size`` characters, across a blank line only after a heading.

    A heading is a short block that ends like no sentence, or Markdown's, or several of those; alone it would be the
    best passage for its own words, so it opens the next passage even if that is long, and one of Markdown begins a
    passage in any case. A sentence beyond four times ``size`` (a table, a line of code) is cut between words. What
    holds no letter or digit, such as a ruled line, is left out. No passage is longer than five times ``size``.
    """
    spans: list[Span] = []
    parts = (part for span in sentence_spans(text) for part in _cut(text, span, 4 * size))
    for start, end in parts:
        if not any(map(str.isalnum, text[start:end])):
            continue
        length = end - spans[-1][0] if spans else 0
        if spans and (
            (length <= 5 * size and _is_heading(text[slice(*spans[-1])]))
            or (length <= size and not _BLANK_LINE.search(text, spans[-1][1], start) and not _MARKED.match(text, start))
        ):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _is_heading(part: str) -> bool:
    lines = [line for line in part.splitlines() if line.strip()]
    if any(len(line) > _LONGEST_HEADING for line in lines):
        return False
    return all(map(_MARKED.match, lines)) or (len(lines) == 1 and (part[-1].isalnum() or part[-1] == ":"))


def _cut(text: str, span: Span, size: int) -> Iterator[Span]:
    """Yield ``span`` in parts of up to ``size`` characters, each ending before a space where there is one."""
    start, end = span
    while end - start > size:
        space = text.rfind(" ", start + 1, start + size)
        stop = start + size if space == -1 else space
        yield start, stop
        start = stop + (space != -1)
    if start < end:
        yield start, end


def fixed_spans(offsets: NDArray[np.int32], size: int) -> list[Span]:
    """Return character spans of ``size`` tokens each, the last one shorter. ``offsets`` (n, 2) of the text's tokens."""
    return [
        (int(part[:, 0].min()), int(part[:, 1].max()))
        for part in (offsets[i : i + size] for i in range(0, len(offsets), size))
    ]


def check_spans(spans: Sequence[Span], length: int) -> list[Span]:
    """Return the spans as pairs of ints. Raises ``InputError`` unless each is a non-empty part of the text."""
    checked = []
    if not isinstance(spans, Iterable):
        raise InputError(f"late_chunking must give spans, got {type(spans).__name__}; return a list of (start, end)")
    for i, span in enumerate(spans):
        try:
            start, end = map(index, span)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"late_chunking[{i}] must be a (start, end) pair of characters, whole numbers, got {span!r}"
            ) from error
        if not 0 <= start < end <= length:
            raise InputError(
                f"late_chunking[{i}] must lie in the text's {length} characters and not be empty, got ({start}, {end})"
            )
        checked.append((start, end))
    return checked


def token_ranges(offsets: NDArray[np.int32], spans: Sequence[Span]) -> NDArray[np.int64]:
    """Return (C, 2) first and past-the-last token of each character span.

    ``offsets`` (n, 2) are those of the text's own tokens, in order. A token belongs to every span that it overlaps.
    A span of whitespace alone overlaps none: its range is empty.
    """
    if not spans:
        return np.empty((0, 2), dtype=np.int64)
    edges = np.array(spans, dtype=np.int64)
    starts = np.searchsorted(np.maximum.accumulate(offsets[:, 1]), edges[:, 0], side="right")
    stops = np.searchsorted(offsets[:, 0], edges[:, 1], side="left")
    return np.stack((starts, np.maximum(starts, stops)), axis=1)


def windows(num_tokens: int, size: int, overlap: int) -> list[tuple[int, int, int]]:
    """Return (first, past-the-last, first kept) token of overlapping windows over ``num_tokens`` (section 3.4, "long
    late chunking"): a later window's first ``overlap`` tokens are context alone.
    """
    result = [(0, min(size, num_tokens), 0)]
    while result[-1][1] < num_tokens:
        kept = result[-1][1]
        first = kept - overlap
        result.append((first, min(first + size, num_tokens), kept))
    return result
