"""``polyvec match``: texts that say the same, within a file or across two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from polyvec.apps.match import Pair, best_partners, near_pairs, threshold_for
from polyvec.cli.common import Column, Dimensions, EngineName, Model, plain_errors, records_with_text
from polyvec.errors import InputError
from polyvec.files import (
    JSON_SUFFIX,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Stamp,
    check_same_model,
    is_vector_file,
    read_records,
    read_vectors,
)
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import as_unit
from polyvec.tasks import PARTNERS

_NEAR = 0.85  # cosine from which on two texts of one file are shown, unless told otherwise
_EXACT_PAIRS = 2e10  # minutes; above, only rows near each other are compared
_RECALL = 0.995  # of the pairs of a sample, that the cells must find


@plain_errors
def match(
    first: Annotated[str, typer.Argument(metavar="A", help="A text, a file of texts, or a vector file.")],
    second: Annotated[
        str | None, typer.Argument(metavar="B", help="The same; if left out, A is searched for near-duplicates.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="Best partners in B shown for each of A; 1 if left out.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help=f"Show every pair from this cosine on instead; {_NEAR} within one file.")
    ] = None,
    precision: Annotated[
        float | None, typer.Option(help="Find the threshold at which this share of --labelled pairs match.")
    ] = None,
    labelled: Annotated[
        Path | None, typer.Option(help="JSONL, CSV or Parquet: text_a, text_b, and score, which is 0 or 1.")
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(help=f"Compare every row with every other; by default up to {_EXACT_PAIRS:.0e} comparisons."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of texts; if left out, text-matching, or what meets a vector file.")
    ] = None,
    dimensions: Dimensions = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Print pairs of texts that say the same, in any language: cosine, A, B, separated by tabs."""
    if (precision is None) != (labelled is None) or (precision is not None and threshold is not None):
        raise InputError("--precision and --labelled come together and replace --threshold, got another combination")
    if top is not None and (second is None or threshold is not None or precision is not None):
        got = "A alone" if second is None else "a threshold"
        raise InputError(f"--top needs B, and no threshold, got {got}; leave it out")
    names = [first] if second is None else [first, second]
    sides = [_side(name, column) for name in names]
    stamps = [side[2] for side in sides if side[2] is not None]
    if stamps and dimensions is not None:
        raise InputError(f"--dimensions must be left out beside a vector file, which has its own, got {dimensions}")
    if len(stamps) == len(sides) and task is not None:
        raise InputError(f"--task must be left out where all vectors are stored, of their own task, got {task!r}")
    if len(stamps) == 2:
        check_same_model(stamps[0], stamps[1], (first, names[-1]))
    dtype = stamps[0]["dtype"] if stamps else "float32"
    width = stamps[0]["dimensions"] if stamps else dimensions
    if task is None:
        stored_task = stamps[0]["task"] if stamps else "text-matching"
        task = PARTNERS.get(stored_task, stored_task)
    tasks = [task if stamp is None else stamp["task"] for _, _, stamp in sides]
    embedder: Embedder | None = None
    if len(stamps) < len(sides) or labelled is not None:
        embedder = Embedder(model, engine=engine)
        if stamps:
            made = {"weights": embedder.weights_hash, "task": task, "dimensions": width, "dtype": dtype}
            check_same_model(stamps[0], made, ("the vector file", "the model"))

    def embed(texts: list[str], task: str | None) -> NDArray[np.float32]:
        assert embedder is not None
        return as_unit(embedder.encode(texts, task=task, dimensions=width, dtype=dtype), dtype)

    if labelled is not None and precision is not None:
        first_texts, second_texts, is_match = _labelled_pairs(labelled)
        cosines = np.sum(embed(first_texts, tasks[0]) * embed(second_texts, tasks[-1]), axis=1)
        threshold = threshold_for(cosines, is_match, precision=precision)
        typer.echo(f"threshold {threshold:.4f}", err=True)
    vectors = [
        embed(labels, own) if stamp is None else as_unit(stored, dtype)
        for (labels, stored, stamp), own in zip(sides, tasks, strict=True)
    ]
    if second is None and threshold is None:
        threshold = _NEAR
    if exact is None:
        exact = len(vectors[0]) * len(vectors[-1]) / (2 if second is None else 1) <= _EXACT_PAIRS
    pairs = _pairs(vectors, threshold, 1 if top is None else top, exact=exact)
    is_empty = True
    for cosine, i, j in pairs:
        is_empty = False
        typer.echo(f"{cosine:.4f}\t{_one_line(sides[0][0][i])}\t{_one_line(sides[-1][0][j])}")
    if is_empty:
        typer.echo("no pair found; a lower --threshold shows more", err=True)
        raise typer.Exit(1)


def _pairs(sides: list[NDArray[np.float32]], threshold: float | None, top: int, *, exact: bool) -> Iterator[Pair]:
    first, second = sides[0], sides[1] if len(sides) == 2 else None
    if exact:
        if threshold is not None:
            return near_pairs(first, second, threshold=threshold)
        return best_partners(first, sides[1], top=top)
    from polyvec.apps.cells import block_pairs, block_partners, blocked_pairs, blocked_partners

    if threshold is not None:
        blocking = block_pairs(first, second, threshold=threshold, recall=_RECALL)
        pairs = blocked_pairs(first, second, blocking, threshold=threshold)
    else:
        blocking = block_partners(first, sides[1], top=top, recall=_RECALL)
        pairs = blocked_partners(first, sides[1], blocking, top=top)
    told = "no pair in a sample" if np.isnan(blocking.recall) else f"{blocking.recall:.1%} of the pairs of a sample"
    typer.echo(
        f"{blocking.comparisons:.1e} comparisons in place of {len(first) * len(sides[-1]):.1e}: {told} found; "
        "--exact makes all",
        err=True,
    )
    return pairs


def _labelled_pairs(labelled: Path) -> tuple[list[str], list[str], NDArray[np.bool_]]:
    """Return the texts of both sides, and which pairs match."""
    texts: tuple[list[str], list[str]] = ([], [])
    scores = []
    for number, record in enumerate(read_records(labelled, column="text_a"), start=1):
        try:
            score = float(record["score"])
        except (KeyError, TypeError, ValueError):
            score = -1
        if score not in (0, 1) or not isinstance(record.get("text_b"), str):
            raise InputError(f"{labelled}:{number} must have text_b and a score of 0 or 1, got {record}")
        texts[0].append(record["text_a"])
        texts[1].append(record["text_b"])
        scores.append(score == 1)
    if not any(scores):
        raise InputError(f"{labelled} must hold a pair with score 1, got none")
    return *texts, np.array(scores)


def _side(argument: str, column: str) -> tuple[list[str], Any, Stamp | None]:
    """Return texts, or labels with stored vectors and their stamp. What is no file and looks like none is a text."""
    path = Path(argument)
    try:
        is_there, is_folder = argument == "-" or path.exists(), path.is_dir()
    except OSError:  # a long text is no file name
        is_there = is_folder = False
    if is_folder:
        raise InputError(f"{argument} must be a text or a file, got a folder; name a file in it")
    if not is_there:
        if path.suffix.lower() in (*TEXT_SUFFIXES, *TABLE_SUFFIXES, JSON_SUFFIX, ".npy"):
            raise InputError(f"{argument} must be a readable file, got none there")
        return [argument], None, None
    if path.is_file() and is_vector_file(path):
        vectors, records, stamp = read_vectors(path)
        labels = [str(r.get(column, i)) for i, r in enumerate(records)] or [f"#{i}" for i in range(len(vectors))]
        return labels, vectors, stamp
    return [record[column] for record in records_with_text(argument, column)], None, None


def _one_line(text: str) -> str:
    return " ".join(text.split())
