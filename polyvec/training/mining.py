"""Files of pairs to files of pairs with hard negatives, by the model itself and BM25; and files of failure cases."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from polyvec.atomic import check_output, whole_file
from polyvec.data.failure_cases import entity_cases, overlap_cases, polar_cases, quality_cases
from polyvec.data.negatives import bm25_candidates, mine_hard_negatives
from polyvec.errors import InputError
from polyvec.files import Record, json_text
from polyvec.inference.embedder import Embedder
from polyvec.training.examples import COLUMNS, read_examples

#: Failure case -> the columns that it is made from.
CASES: dict[str, tuple[str, ...]] = {
    "overlap": COLUMNS["pairs"],
    "entities": COLUMNS["pairs"],
    "polar": ("premise", "hypothesis", "label", "lang"),
    "quality": ("query", "answer", "quality"),
}


def mine_file(
    embedder: Embedder, data: str, output: Path, *, count: int = 7, margin: float = 0.95, progress: bool = False
) -> tuple[int, int]:
    """Write the pairs of ``data`` as JSONL with up to ``count`` ``negatives`` each; return pairs and negatives written.

    Candidates are every passage of the file. Pairs for which nothing is left keep an empty list. See
    ``mine_hard_negatives`` for ``margin``.
    """
    if count < 1 or not 0 < margin <= 1:
        raise InputError(f"count must be at least 1 and margin between 0 and 1, got {count} and {margin}")
    _check_output(output)
    rows = list(read_examples(data, COLUMNS["pairs"], "mining"))
    passages = list(dict.fromkeys(row["passage"] for row in rows))
    place = {passage: i for i, passage in enumerate(passages)}
    queries = [row["query"] for row in rows]
    vectors = [
        embedder.encode(texts, task=task if task in embedder.tasks else None, progress=progress)
        for texts, task in ((queries, "retrieval.query"), (passages, "retrieval.passage"))
    ]
    lexical = bm25_candidates(_pieces(embedder, queries), _pieces(embedder, passages), depth=50)
    mined = mine_hard_negatives(
        vectors[0], vectors[1], [place[row["passage"]] for row in rows], count=count, margin=margin, lexical=lexical
    )
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row["query"], set()).add(row["passage"])

    def records() -> Iterator[Record]:
        for row, found in zip(rows, mined, strict=True):
            yield {**row, "negatives": [passages[i] for i in found if passages[i] not in answers[row["query"]]]}

    return _write(records(), output)


def cases_file(embedder: Embedder, data: str, output: Path, *, kind: str) -> tuple[int, int]:
    """Write the failure cases of ``kind``, one of ``CASES``, made from ``data``; return cases and negatives written."""
    if kind not in CASES:
        raise InputError(f"kind must be one of {', '.join(CASES)}, got {kind!r}")
    _check_output(output)
    rows = list(read_examples(data, CASES[kind], f"{kind} cases"))
    if kind == "polar":
        cases = polar_cases(rows)
    elif kind == "quality":
        cases = quality_cases(rows)
    else:
        pairs = [(row["query"], row["passage"]) for row in rows]
        if kind == "entities":
            cases = entity_cases(pairs)
        else:
            queries, passages = (_pieces(embedder, [pair[side] for pair in pairs]) for side in (0, 1))
            cases = overlap_cases(pairs, list(zip(queries, passages, strict=True)))
    first = next(iter(cases), None)  # before the file is opened: one of that name stays where there is none
    if first is None:
        raise InputError(f"{data} must hold material for {kind} cases, got none; see polyvec.data.failure_cases")
    return _write((case.to_record() for case in chain([first], cases)), output)


def _check_output(output: Path) -> None:
    """Raise ``InputError`` unless what is written under this name can be read again."""
    if output.suffix not in (".jsonl", ".ndjson"):
        raise InputError(f"output must be JSON Lines, a name ending in .jsonl, got {output.name!r}; rename it")
    check_output(output)


def _pieces(embedder: Embedder, texts: list[str]) -> list[list[int]]:
    tokens = embedder.tokenizer.tokens_batch(texts, [""] * len(texts), embedder.max_tokens)
    return [own.input_ids[1:-1].tolist() for own in tokens]


def _write(records: Iterator[Record], output: Path) -> tuple[int, int]:
    count = negatives = 0
    with whole_file(output) as partial, partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json_text(record) + "\n")
            count, negatives = count + 1, negatives + len(record["negatives"])
    return count, negatives
