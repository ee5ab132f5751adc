"""Strings -> token ids and, where asked for, character offsets: a Hugging Face `tokenizers` Unigram JSON, hardened.

Three things that the plain library does not promise:

* *Text is only text.* A literal ``<s>``, ``<mask>`` or ``<0x41>`` in the input never becomes the special token.
* *Every token knows its characters*, byte pieces of rare characters included.
* *Cutting is cheap.* ``max_tokens`` reads a prefix of a giant text, equal to cutting the tokens of the whole text
  (of a run of one letter, over thousands, its last tokens may differ); without it, the text is read part by part.

Why a prefix is enough. Let the text be split as ``xy`` at a *safe boundary* (``_Boundaries.is_safe``) and let the
tokens of ``x`` alone be ``t``. Then the tokens of ``xy`` begin with ``t``, so if ``t`` holds more than the wanted
number, the first ones are those of the whole text. A boundary between characters ``a`` and ``b`` is safe

1. if ``b`` is whitespace and ``a`` is visible. Whitespace is a starter that composes with nothing before it and opens
   a new grapheme cluster after anything but a prepending format character (UAX 29, GB9b), so the normaliser maps ``x``
   and ``y`` apart. The pre-tokeniser then splits there, at the whitespace or at the word mark that it became, and
   Unigram segments each word alone.
2. or, inside a word (Chinese, Thai, base64), if ``a`` and ``b`` are letters, digits or punctuation, each and both
   together unchanged by the normaliser, both pieces of the vocabulary, and no piece holds the bigram ``ab``. Neither
   is a mark, a conjoining jamo or a prepending letter, so neither composition nor a grapheme cluster reaches across.
   In the lattice of the word an edge is a piece or one unknown character. ``a`` and ``b`` are known and no piece holds
   ``ab``, so no edge crosses the boundary: every path, the best one included, visits it, and the best path up to it
   depends on the left side alone (Viterbi runs left to right; ties go to the first found). Runs of unknown characters
   are fused, but neither neighbour is unknown.

Why parts are enough. At a boundary of the first kind a pre-tokeniser that splits off whitespace drops what ``y`` begins
with, so the tokens of ``xy`` are those of ``x`` and then those of ``y``.

The argument needs normalisers and pre-tokenisers that look no further than this; for any other the whole text is read.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from polyvec.errors import InputError, WeightsError

#: Unicode White_Space, which `tokenizers` splits on; ``str.isspace`` also takes the control characters U+001C-001F.
WHITESPACE = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f"
    "\u205f\u3000"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Splits a literal "<0x41>" after its "<", behind every other step: Unigram would find the byte piece of that name.
_BYTE_GUARD = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_BYTE_NAME_CHARACTERS = frozenset("<0x123456789ABCDEF>")  # a cut inside such a literal would hide it from the guard
_LOCAL_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Nmt", "Precompiled"})
_PART_CHARACTERS = 100_000  # a text beyond is tokenised in parts, which also keeps every core busy
_GROUP_CHARACTERS = 2_000_000  # of parts that are encodings at one time
# A run of so many without a safe boundary (one letter, one symbol, over and over) is no language's. It is cut in the
# middle, or one request of a few megabytes would take minutes and gigabytes: a character may become 18 (U+FDFA).
_UNBROKEN_CHARACTERS = 8_192
_CHARACTERS_PER_TOKEN = 8  # first guess of the prefix; mini averages 2-4, so one pass is the rule
_FEW_CHARACTERS_PER_TOKEN = 2  # a text of no more is seldom cut, and what is cut would be read a second time


@dataclass(frozen=True)
class Tokens:
    """The tokens of one prompted text: what the model reads.

    ``input_ids`` (n,) int32 with ``<s>`` and ``</s>``. ``cut_characters`` counts the characters from the first one not
    wholly kept to the end; 0 exactly when no token was cut, so dropping trailing whitespace is no cut.
    """

    input_ids: NDArray[np.int32]
    cut_characters: int

    @property
    def truncated(self) -> bool:
        return self.cut_characters > 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Encoding(Tokens):
    """Tokens that know where in the text they are.

    ``offsets`` (n, 2) int32: characters of the text itself, (0, 0) for ``<s>`` and prompt, (len, len) for ``</s>``.
    ``num_prefix_tokens`` counts ``<s>`` and prompt.
    """

    offsets: NDArray[np.int32]
    num_prefix_tokens: int


def placed(tokens: Tokens) -> Encoding:
    """Return the tokens as what they must be for late chunking; raises ``InputError`` unless they know their places."""
    if not isinstance(tokens, Encoding):
        raise InputError("tokens must be of type Encoding for late_chunking, got Tokens; use encode_batch")
    return tokens


class Tokenizer:
    """Text to ``Encoding``, with ``<s>`` and ``</s>`` added here. Build it with ``from_file``.

    The empty text and whitespace alone give ``<s> prompt </s>``. NUL is a character like any other (a byte piece, or
    whatever the normaliser makes of it). A lone surrogate reads as U+FFFD, one for one.
    """

    def __init__(self, state: dict[str, Any], *, bos_token_id: int, eos_token_id: int) -> None:
        model = state["model"]
        pieces = [piece for piece, _ in model["vocab"]]
        self.vocab_size = len(pieces)
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self._byte_of_id = np.full(len(pieces), -1, dtype=np.int16)
        if model.get("byte_fallback"):
            for i, piece in enumerate(pieces):
                if match := _BYTE_PIECE.fullmatch(piece):
                    self._byte_of_id[i] = int(match[1], 16)
        # Letters as they are: escaped ones take the reader twice as long, which a start would feel.
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(_text_only(state), ensure_ascii=False))
        splits_whitespace = any(
            step["type"] == "WhitespaceSplit" for step in _steps(state["pre_tokenizer"], "pretokenizers")
        )
        self._boundaries = _Boundaries(
            self._tokenizer, pieces, is_local=_is_local(state), splits_whitespace=splits_whitespace
        )

    @classmethod
    def from_file(cls, path: str | Path, *, vocab_size: int, bos_token_id: int, eos_token_id: int) -> Tokenizer:
        """Read a ``tokenizer.json``. Raises ``WeightsError`` if it is none, is not Unigram, or has other ids."""
        try:
            state = json.loads(Path(path).read_text(encoding="utf-8"))
            _check_state(state, path, vocab_size=vocab_size, ids={"<s>": bos_token_id, "</s>": eos_token_id})
            return cls(state, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
        except WeightsError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception for a JSON it cannot read
            raise WeightsError(
                f"{path} must be a readable Hugging Face tokenizers JSON, got {type(error).__name__}: {error}; "
                f"copy the model's tokenizer.json again"
            ) from error

    def encode(self, text: str, *, prompt: str = "", max_tokens: int | None = None) -> Encoding:
        """Return the tokens of ``prompt + text``, at most ``max_tokens`` with ``<s>`` and ``</s>``.

        Raises ``InputError`` if either is no string, or if the prompt alone does not fit.
        """
        return self.encode_batch([text], [prompt], max_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], prompts: Sequence[str], max_tokens: int | None = None
    ) -> list[Encoding]:
        """Return ``encode`` of each text with its prompt, in parallel inside `tokenizers`."""
        _check_strings(texts, prompts)
        encodings: list[Encoding | None] = [None] * len(texts)
        limit = None if max_tokens is None else max(256, _CHARACTERS_PER_TOKEN * max_tokens)
        pending = list(range(len(texts)))
        while pending:
            stops = [self._boundaries.last_before(texts[i], limit) for i in pending]
            rows = self._tokenise([prompts[i] + texts[i][:stop] for i, stop in zip(pending, stops, strict=True)])
            for i, stop, (ids, offsets) in zip(pending, stops, rows, strict=True):
                # A prefix proves what the first tokens are only if it holds one more than is kept.
                if stop == len(texts[i]) or max_tokens is None or len(ids) > max_tokens - 2:
                    encodings[i] = self._assemble(ids, offsets, len(texts[i]), len(prompts[i]), max_tokens)
            pending = [i for i in pending if encodings[i] is None]
            limit = limit and 2 * limit
        return [encoding for encoding in encodings if encoding is not None]

    def tokens_batch(self, texts: Sequence[str], prompts: Sequence[str], max_tokens: int | None = None) -> list[Tokens]:
        """Return the tokens that ``encode_batch`` finds, sooner: where they are in the text is not asked.

        A text that is cut, or so long that it may be, comes as its ``Encoding``.
        """
        _check_strings(texts, prompts)
        limit = (
            _PART_CHARACTERS if max_tokens is None else min(_PART_CHARACTERS, _FEW_CHARACTERS_PER_TOKEN * max_tokens)
        )
        whole = [
            (i, 0, _SURROGATE.sub("\ufffd", prompt + text))
            for i, (text, prompt) in enumerate(zip(texts, prompts, strict=True))
            if len(prompt) + len(text) <= limit
        ]
        found: list[Tokens | None] = [None] * len(texts)
        for group in _groups(whole, _GROUP_CHARACTERS):
            strings = [string for _, _, string in group]
            if len(group) == 1:  # without waking the threads of `tokenizers`, for which a busy server would wait
                rows = [self._tokenizer.encode(strings[0], add_special_tokens=False)]
            else:
                rows = self._tokenizer.encode_batch_fast(strings, add_special_tokens=False)
            for (i, _, _), row in zip(group, rows, strict=True):
                ids = row.ids
                if max_tokens is None or len(ids) <= max_tokens - 2:
                    found[i] = Tokens(np.array([self.bos_token_id, *ids, self.eos_token_id], np.int32), 0)
        rest = [i for i, tokens in enumerate(found) if tokens is None]
        if rest:
            encodings = self.encode_batch([texts[i] for i in rest], [prompts[i] for i in rest], max_tokens)
            for i, encoding in zip(rest, encodings, strict=True):
                found[i] = encoding
        return [tokens for tokens in found if tokens is not None]

    def count_tokens(self, text: str, prompt: str = "") -> int:
        """Return the length of the whole encoding, ``<s>`` and ``</s>`` included."""
        return len(self.tokens_batch([text], [prompt])[0])

    def _tokenise(self, strings: list[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Return ids (n,) and offsets (n, 2) of each string, without ``<s>`` and ``</s>``."""
        # A giant text goes part by part: `tokenizers` needs a hundred times a text's size while it holds its encoding.
        parts = [
            (row, start, _SURROGATE.sub("\ufffd", string[start:stop]))
            for row, string in enumerate(strings)
            for start, stop in itertools.pairwise(self._boundaries.part_edges(string, _PART_CHARACTERS))
        ]
        found: list[list[tuple[NDArray[np.int32], NDArray[np.int32]]]] = [[] for _ in strings]
        for group in _groups(parts, _GROUP_CHARACTERS):
            texts = [part for _, _, part in group]
            if len(texts) == 1:  # without waking the threads of `tokenizers`
                encodings = [self._tokenizer.encode(texts[0], add_special_tokens=False)]
            else:
                encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            for (row, start, part), encoded in zip(group, encodings, strict=True):
                ids = np.array(encoded.ids, dtype=np.int32)
                flat = np.fromiter(itertools.chain.from_iterable(encoded.offsets), dtype=np.int32, count=2 * len(ids))
                offsets = flat.reshape(-1, 2)
                self._part_byte_runs(part, ids, offsets)
                found[row].append((ids, offsets + start))
        return [
            pieces[0]
            if len(pieces) == 1
            else (np.concatenate([i for i, _ in pieces]), np.concatenate([o for _, o in pieces]))
            for pieces in found
        ]

    def _part_byte_runs(self, string: str, ids: NDArray[np.int32], offsets: NDArray[np.int32]) -> None:
        """Give each byte piece its own character, in place: `tokenizers` gives it the whole run of unknown ones."""
        is_byte = self._byte_of_id[ids] >= 0
        if not is_byte.any():
            return
        in_run = is_byte & (offsets[:, 1] - offsets[:, 0] > 1)
        same_run = in_run[1:] & in_run[:-1] & (offsets[1:] == offsets[:-1]).all(axis=1)
        edges = np.flatnonzero(~np.concatenate(([False], same_run, [False])))
        for first, stop in itertools.pairwise(edges):
            if not in_run[first]:
                continue
            values = self._byte_of_id[ids[first:stop]]
            start, end = offsets[first]
            clusters = _clusters(string[start:end])
            normal = [self._boundaries.normalise(cluster) for cluster in clusters]
            if "".join(normal).encode() != values.astype(np.uint8).tobytes():
                continue  # characters that only normalise together: the run's own span is the honest answer
            character = np.cumsum((values & 0xC0) != 0x80) - 1  # of the normalised run; 10xxxxxx continues one
            cluster_of_character = np.repeat(np.arange(len(clusters)), [len(n) for n in normal])
            bounds = start + np.cumsum([0, *map(len, clusters)])
            cluster_of_byte = cluster_of_character[character]
            offsets[first:stop, 0] = bounds[cluster_of_byte]
            offsets[first:stop, 1] = bounds[cluster_of_byte + 1]

    def _assemble(
        self,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int32],
        text_length: int,
        prompt_length: int,
        max_tokens: int | None,
    ) -> Encoding:
        """Wrap ids (n,) and offsets (n, 2) of ``prompt + text`` in ``<s>`` and ``</s>``, cut to ``max_tokens``."""
        num_prompt_tokens = int(np.count_nonzero(offsets[:, 1] <= prompt_length))
        if max_tokens is not None and num_prompt_tokens + 2 > max_tokens:
            raise InputError(
                f"max_tokens must leave room for <s>, the prompt and </s>, got {max_tokens} for a prompt of "
                f"{num_prompt_tokens} tokens; raise it or shorten the prompt"
            )
        offsets = np.maximum(offsets - prompt_length, 0) if prompt_length else offsets
        num_kept = len(ids) if max_tokens is None else min(len(ids), max_tokens - 2)
        cut_characters = 0
        if num_kept < len(ids):
            kept_end = int(offsets[num_kept - 1, 1]) if num_kept else 0
            # One character can make many tokens: if its last ones are cut, it is not kept.
            cut_characters = text_length - min(kept_end, int(offsets[num_kept, 0]))
        # Filled in place: for a short text, joining arrays would cost as much as its tokens.
        input_ids, whole = np.empty(num_kept + 2, np.int32), np.empty((num_kept + 2, 2), np.int32)
        input_ids[0], input_ids[1:-1], input_ids[-1] = self.bos_token_id, ids[:num_kept], self.eos_token_id
        whole[0], whole[1:-1], whole[-1] = 0, offsets[:num_kept], text_length
        return Encoding(input_ids, cut_characters, whole, 1 + num_prompt_tokens)


def _check_strings(texts: Sequence[str], prompts: Sequence[str]) -> None:
    if len(texts) != len(prompts):
        raise InputError(f"prompts must hold one prompt per text, got {len(prompts)} for {len(texts)} texts")
    for name, strings in (("texts", texts), ("prompts", prompts)):
        for i, string in enumerate(strings):
            if not isinstance(string, str):
                raise InputError(f"{name}[{i}] must be a str, got {type(string).__name__}; convert it first")


class _Boundaries:
    """Where a text may be cut without changing the tokens before the cut (proof in the module's docstring)."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, pieces: Sequence[str], *, is_local: bool, splits_whitespace: bool
    ) -> None:
        self._normalizer = tokenizer.normalizer
        self._pieces = pieces
        self._is_local = is_local
        self._can_part = is_local and splits_whitespace
        self._inert: dict[str, bool] = {}

    def last_before(self, text: str, limit: int | None) -> int:
        """Return the last safe boundary in the second half of ``text[:limit]``, or else of a longer part of the text,
        up to the whole; beyond ``_UNBROKEN_CHARACTERS``, ``limit`` itself."""
        while self._is_local and limit is not None and limit < len(text):
            for i in range(limit, limit // 2, -1):
                if self.is_safe(text[i - 1], text[i]):
                    return i
            if limit >= 2 * _UNBROKEN_CHARACTERS:
                return limit
            limit *= 2
        return len(text)

    def part_edges(self, text: str, size: int) -> list[int]:
        """Return edges of parts, most of them at most ``size`` characters, whose tokens together are the text's.

        Only whitespace parts a text: the second rule of the proof says nothing of what follows a cut inside a word,
        whose beginning may carry a mark.
        """
        edges, limit = [0], size
        while self._can_part and edges[-1] + limit < len(text):
            stop = edges[-1] + limit
            for i in range(stop, edges[-1] + limit // 2, -1):
                if _opens_word(text[i - 1], text[i]):
                    edges.append(i)
                    limit = size
                    break
            else:
                limit *= 2
        return [*edges, len(text)]

    def is_safe(self, a: str, b: str) -> bool:
        """Whether the text may be cut between its neighbours ``a`` and ``b``."""
        if b in WHITESPACE:
            return _opens_word(a, b)
        return (
            self._is_inert(a)
            and self._is_inert(b)
            and a + b not in self._bigrams
            and self.normalise(a + b) == a + b
            and not (a in _BYTE_NAME_CHARACTERS and b in _BYTE_NAME_CHARACTERS)
        )

    def normalise(self, string: str) -> str:
        return string if self._normalizer is None else str(self._normalizer.normalize_str(string))

    def _is_inert(self, c: str) -> bool:
        if c not in self._inert:
            self._inert[c] = (
                c in self._characters
                and unicodedata.category(c)[0] in "LNP"
                and not _is_prepending(c)
                and not _composes_backwards(c)
                and self.normalise(c) == c
            )
        return self._inert[c]

    @cached_property
    def _characters(self) -> frozenset[str]:
        return frozenset(piece for piece in self._pieces if len(piece) == 1)

    @cached_property
    def _bigrams(self) -> frozenset[str]:
        return frozenset(a + b for piece in self._pieces for a, b in itertools.pairwise(piece))


def _opens_word(a: str, b: str) -> bool:
    """Whether ``b`` is whitespace that opens a new word and grapheme cluster after the visible character ``a``."""
    return b in WHITESPACE and a not in WHITESPACE and unicodedata.category(a)[0] != "C" and not _is_prepending(a)


def _groups(parts: Sequence[tuple[int, int, str]], size: int) -> Iterator[list[tuple[int, int, str]]]:
    """Yield the parts in order, in groups of about ``size`` characters."""
    group: list[tuple[int, int, str]] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part[2])
        if characters >= size:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _is_prepending(c: str) -> bool:
    """Letters of grapheme property Prepend (UAX 29) and, to be safe against newer tables, their whole blocks."""
    return c == "\u0d4e" or "\U00011000" <= c <= "\U00011fff"


def _composes_backwards(c: str) -> bool:
    """Letters that join the character before them: Hangul jamo, Kirat Rai vowels, Thai and Lao AM."""
    return (
        "\u1100" <= c <= "\u11ff"
        or "\ua960" <= c <= "\ua97f"
        or "\ud7b0" <= c <= "\ud7ff"
        or "\U00016d40" <= c <= "\U00016d7f"
        or c in "\u0e33\u0eb3\uff9e\uff9f"
    )


def _clusters(string: str) -> list[str]:
    """Split before every character that is not a combining mark."""
    starts = [i for i, c in enumerate(string) if i == 0 or unicodedata.category(c)[0] != "M"]
    return [string[a:b] for a, b in itertools.pairwise([*starts, len(string)])]


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Flatten a normaliser or pre-tokeniser of the JSON into its steps."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[key] for inner in _steps(part, key)]
    return [step]


def _text_only(state: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON without anything that finds special tokens in a text; every id stays.

    A piece named like a special token would still be found by Unigram, so it takes a name with a space, which no word
    that reaches the model holds. Byte pieces are looked up by name and keep theirs; ``_BYTE_GUARD`` splits
    their literals instead.
    """
    special = {token["content"] for token in state["added_tokens"]}
    model = dict(state["model"])
    model["vocab"] = [[f" {piece}" if piece in special else piece, score] for piece, score in model["vocab"]]
    pre_tokenizer = state["pre_tokenizer"]
    if model.get("byte_fallback"):
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*_steps(pre_tokenizer, "pretokenizers"), _BYTE_GUARD]}
    cleared: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return {**state, **cleared, "model": model, "pre_tokenizer": pre_tokenizer}


def _splits_words(step: dict[str, Any]) -> bool:
    return step["type"] == "WhitespaceSplit" or bool(step["type"] == "Metaspace" and step.get("split", True))


def _is_local(state: dict[str, Any]) -> bool:
    """Whether every step is one that the proof covers."""

    def collapses_spaces(step: dict[str, Any]) -> bool:
        return bool(step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"} and step["content"] == " ")

    def isolates_characters(step: dict[str, Any]) -> bool:
        # Each character of these classes is a word of its own, whatever stands beside it.
        return bool(
            step["type"] == "Split"
            and re.fullmatch(r"\\p\{\w\}(\|\\p\{\w\})*", step["pattern"].get("Regex", ""))
            and step["behavior"] == "Isolated"
            and not step.get("invert")
        )

    return all(
        step["type"] in _LOCAL_NORMALIZERS or collapses_spaces(step)
        for step in _steps(state["normalizer"], "normalizers")
    ) and all(
        _splits_words(step) or isolates_characters(step) for step in _steps(state["pre_tokenizer"], "pretokenizers")
    )


def _check_state(state: Any, path: str | Path, *, vocab_size: int, ids: dict[str, int]) -> None:
    """Raise ``WeightsError`` unless the JSON is a Unigram tokenizer of this size with these special ids."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise WeightsError(f"{path} must be a Hugging Face tokenizers JSON, got no 'model' in it")
    if (model_type := state["model"].get("type", "Unigram")) != "Unigram":
        raise WeightsError(f"{path}: the tokenizer model must be Unigram, as XLM-RoBERTa's is, got {model_type}")
    vocab = state["model"]["vocab"]
    if len(vocab) != vocab_size:
        raise WeightsError(
            f"{path}: the vocabulary must hold the vocab_size of config.json, {vocab_size}, got {len(vocab)}; "
            f"take both files from the same model"
        )
    for token, wanted in ids.items():
        got = vocab[wanted][0] if 0 <= wanted < vocab_size else "no such id"
        if got != token:
            raise WeightsError(f"{path}: id {wanted} must be {token!r}, as config.json says, got {got!r}")
    if plain := [token["content"] for token in state["added_tokens"] if not token["special"]]:
        raise WeightsError(f"{path}: added tokens must be special, got {plain}; train them into the vocabulary")
    if not any(_splits_words(step) for step in _steps(state["pre_tokenizer"], "pretokenizers")):
        raise WeightsError(f"{path}: the pre-tokenizer must split words (WhitespaceSplit or Metaspace), got neither")
