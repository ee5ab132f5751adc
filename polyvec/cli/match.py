"""``polyvec match``: the best partners of texts among others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from polyvec.cli.common import Column, Dimensions, EngineName, Model, TaskName, make_stamp, plain_errors
from polyvec.errors import InputError
from polyvec.files import Stamp, check_same_model, is_vector_file, read_records, read_vectors
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import as_unit


@plain_errors
def match(
    first: Annotated[str, typer.Argument(metavar="A", help="A text, a file of texts, or a vector file.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same; each of A meets all of B.")],
    top: Annotated[int, typer.Option(help="Best partners in B shown for each of A.")] = 1,
    task: TaskName = "text-matching",
    dimensions: Dimensions = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Print the cosine of the best partners in B for each of A: cosine, A, B, separated by tabs."""
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    sides = [_side(text, column) for text in (first, second)]
    stamps = [side[2] for side in sides if side[2] is not None]
    if len(stamps) == 2:
        check_same_model(stamps[0], stamps[1], (first, second))
    embedder: Embedder | None = None
    vectors = []
    for name, (labels, stored, stamp) in zip((first, second), sides, strict=True):
        if stamp is None:
            embedder = embedder or Embedder(model, engine=engine)
            width = stamps[0]["dimensions"] if stamps else dimensions
            if stamps:
                made = make_stamp(embedder, task=task, dimensions=width, dtype=stamps[0]["dtype"])
                check_same_model(stamps[0], made, ("the vector file", name))
            dtype = stamps[0]["dtype"] if stamps else "float32"
            stored = embedder.encode(labels, task=task, dimensions=width, dtype=dtype)
        vectors.append(as_unit(stored, stamps[0]["dtype"] if stamps else "float32"))
    cosines = vectors[0] @ vectors[1].T
    for i, row in enumerate(cosines):
        for j in np.argsort(-row, kind="stable")[:top]:
            typer.echo(f"{row[j]:.4f}\t{_one_line(sides[0][0][i])}\t{_one_line(sides[1][0][j])}")


def _side(argument: str, column: str) -> tuple[list[str], Any, Stamp | None]:
    """Return texts, or labels with stored vectors and their stamp. What is no file and looks like none is a text."""
    path = Path(argument)
    try:
        is_file = path.is_file()
    except OSError:  # a long text is no file name
        is_file = False
    if not is_file:
        if path.suffix.lower() in (".jsonl", ".csv", ".tsv", ".parquet", ".npy", ".txt") and " " not in argument:
            raise InputError(f"{argument} must be a readable file, got none there")
        return [argument], None, None
    if is_vector_file(path):
        vectors, records, stamp = read_vectors(path)
        labels = [str(r.get(column, i)) for i, r in enumerate(records)] or [f"#{i}" for i in range(len(vectors))]
        return labels, vectors, stamp
    texts = [record[column] for record in read_records(path, column=column)]
    if not texts:
        raise InputError(f"{argument} must hold at least one text, got none")
    return texts, None, None


def _one_line(text: str) -> str:
    return " ".join(text.split())
