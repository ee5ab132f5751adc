"""Suites of long documents: the same question asked of 256 to 8192 tokens.

| suite | documents | query |
|---|---|---|
| passkey | the same filler with one sentence that gives a person's key (LongEmbed, arXiv 2404.12096) | who has it |
| needle | passages of a table, the answer among others of its language | its question |
| articles | whole texts of a table, cut to the length | their titles |

The last vary the length alone: every length has the same queries and needles, or articles. Tokens are those of
polyvec-mini's tokenizer, whatever model is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from polyvec.errors import InputError
from polyvec.evaluation.suites import Ranking, Suite
from polyvec.files import Record
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import read_config
from polyvec.text.tokenizer import Tokenizer

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
DOCUMENTS = 50  # of each length, as many as LongEmbed asks queries
_ROOM = 24  # tokens of a prompt and special tokens
_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_FIRST = ("Amara", "Bastien", "Chiyo", "Dmitri", "Elif", "Farid", "Greta", "Hamish", "Ines", "Jonas")
_LAST = ("Okafor", "Lindqvist", "Tanaka", "Moreau", "Petrov", "Yilmaz", "Novak", "Castillo", "Brennan", "Singh")


def passkey(count: int = DOCUMENTS, lengths: Sequence[int] = LENGTHS) -> list[Suite]:
    """Return a retrieval suite a length of ``count`` documents that differ in one sentence at a random depth."""
    names = [f"{first} {last}" for last in _LAST for first in _FIRST][:count]
    suites = []
    for length in lengths:
        rng = np.random.default_rng(length)
        filler = _cut(_FILLER * (length // 8), length - 40)  # less the sentence
        sentences = filler.split(". ")
        corpus = {}
        for i, name in enumerate(names):
            key = int(rng.integers(10_000, 100_000))
            at = int(rng.integers(len(sentences) + 1))
            secret = f"{name}'s pass key is {key}. Remember it. {key} is the pass key for {name}"
            corpus[f"d{i}"] = ". ".join((*sentences[:at], secret, *sentences[at:]))
        queries = {f"q{i}": f"What is the pass key for {name}?" for i, name in enumerate(names)}
        suites.append(_suite("passkey", "", length, queries, corpus, "passkey"))
    return suites


def needle(
    rows: Sequence[Record], path: Path, *, count: int = DOCUMENTS, lengths: Sequence[int] = LENGTHS
) -> list[Suite]:
    """Return a retrieval suite a language and length, of rows with ``query``, ``passage`` and ``lang``.

    A passage that fits the shortest length lies at a random place between others of its language. Languages with
    fewer than ten such passages, or fewer tokens than the longest document, are left out; raises ``InputError`` where
    none is left.
    """
    suites = []
    for lang, group in _by_language(rows).items():
        rng = np.random.default_rng(0)
        shuffled = [group[i] for i in rng.permutation(len(group))]
        passages = list(dict.fromkeys(row["passage"] for row in shuffled))
        tokens = dict(zip(passages, _num_tokens(passages), strict=True))
        short = [row for row in shuffled if tokens[row["passage"]] <= min(lengths) - _ROOM]
        chosen = list({row["passage"]: row for row in short}.values())[:count]
        if len(chosen) < 10 or sum(tokens.values()) < max(lengths):  # too little to fill the longest
            continue
        for length in lengths:
            corpus = {}
            for i, row in enumerate(chosen):
                parts, left = [row["passage"]], length - _ROOM - tokens[row["passage"]]
                for j in rng.permutation(len(passages)):
                    # A straw is cut to what is left, so that every document has the length.
                    if left <= 0 or passages[j] == row["passage"]:
                        continue
                    straw = _cut(passages[j], left)
                    left -= tokens[passages[j]] + 1
                    parts.insert(int(rng.integers(len(parts) + 1)), straw)
                    if left <= 0:
                        break
                corpus[f"d{i}"] = "\n".join(parts)
            queries = {f"q{i}": row["query"] for i, row in enumerate(chosen)}
            suites.append(_suite("needle", lang, length, queries, corpus, str(path)))
    if not suites:
        raise InputError(
            f"{path} must hold ten passages of at most {min(lengths) - _ROOM} tokens in a language, and "
            f"{max(lengths)} tokens in all, got fewer; add rows"
        )
    return suites


def articles(
    rows: Sequence[Record], path: Path, *, count: int = DOCUMENTS, lengths: Sequence[int] = LENGTHS
) -> list[Suite]:
    """Return a retrieval suite a language and length, of the ``count`` longest rows with ``title`` and ``text``.

    A text that is shorter than a length stays whole. Languages with fewer than ten texts of half the longest length are
    left out; raises ``InputError`` where none is left.
    """
    suites = []
    for lang, group in _by_language(rows).items():
        longest = sorted((row for row in group if row.get("title")), key=lambda row: -len(row["text"]))
        # A title stands for one article; the same one of two would make either answer wrong.
        chosen = list({row["title"]: row for row in longest[:count]}.values())
        enough = [n >= max(lengths) // 2 for n in _num_tokens([row["text"] for row in chosen])]
        chosen = [row for row, fits in zip(chosen, enough, strict=True) if fits]
        if len(chosen) < 10:
            continue
        queries = {f"q{i}": row["title"] for i, row in enumerate(chosen)}
        for length in lengths:
            corpus = {f"d{i}": _cut(row["text"], length - _ROOM) for i, row in enumerate(chosen)}
            suites.append(_suite("articles", lang, length, queries, corpus, str(path)))
    if not suites:
        raise InputError(f"{path} must hold ten titled texts of {max(lengths) // 2} tokens in a language, got fewer")
    return suites


def _suite(name: str, lang: str, length: int, queries: dict[str, str], corpus: dict[str, str], source: str) -> Suite:
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(len(queries))}
    return Suite("retrieval", name, Ranking(queries, corpus, qrels), f"{lang} {length}".strip(), length, source)


def _by_language(rows: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for row in rows:
        groups.setdefault(str(row.get("lang") or ""), []).append(row)
    return groups


@cache
def _tokenizer() -> Tokenizer:
    folder = resolve_model_folder(None)
    config = read_config(folder)
    return Tokenizer.from_file(
        folder / "tokenizer.json", vocab_size=config.vocab_size,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id,
    )  # fmt: skip


def _num_tokens(texts: Sequence[str]) -> list[int]:
    return [len(e) - 2 for e in _tokenizer().tokens_batch(list(texts), [""] * len(texts), None)]


def _cut(text: str, num_tokens: int) -> str:
    """Return the start of a text that has at most ``num_tokens`` tokens."""
    encoding = _tokenizer().encode(text, max_tokens=num_tokens + 2)
    return text[: len(text) - encoding.cut_characters]
