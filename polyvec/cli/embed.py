"""``polyvec embed``: texts in, vectors out."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from polyvec.cli.common import Column, Dimensions, EngineName, Model, TaskName, make_stamp, plain_errors
from polyvec.files import json_line, read_records, vector_writer
from polyvec.inference.embedder import Embedder
from polyvec.streams import paired


@plain_errors
def embed(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Text (one a line), JSONL, CSV, Parquet; - is stdin.")],
    output: Annotated[str, typer.Option("--output", "-o", help=".jsonl, .parquet or .npy; - for stdout.")] = "-",
    task: TaskName = None,
    dimensions: Dimensions = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, int8, binary or ubinary.")] = "float32",
    column: Column = "text",
    truncate: Annotated[bool, typer.Option(help="Cut texts beyond the context, with a warning.")] = True,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a batch; by default the fastest.")] = None,
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Embed every text of INPUT, in memory that does not grow with it."""
    embedder = Embedder(model, engine=engine)
    stamp = make_stamp(embedder, task=task, dimensions=dimensions, dtype=dtype)
    records = read_records(None if source == "-" else Path(source), column=column)
    encode = partial(
        embedder.encode_stream, task=task, dimensions=dimensions, dtype=dtype, batch_tokens=batch_tokens,
        truncate=truncate, progress=sys.stderr.isatty(),
    )  # fmt: skip
    rows = ((record, np.asarray(e.vector)) for record, e in paired(records, lambda record: record[column], encode))
    if output == "-":
        for record, vector in rows:
            sys.stdout.write(json_line(record, vector))
        sys.stdout.flush()
        return
    with vector_writer(Path(output), stamp) as writer:
        count = 0
        for record, vector in rows:
            writer.write(record, vector)
            count += 1
    typer.echo(f"{count} vectors of {stamp['dimensions']} {dtype} in {output}", err=True)
