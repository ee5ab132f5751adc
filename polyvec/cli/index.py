"""``polyvec index``: a database of passages that follows folders of files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from polyvec.apps.documents import MAX_MEGABYTES
from polyvec.apps.index import Index
from polyvec.apps.vectors import add_vectors
from polyvec.batch.output import Output
from polyvec.cli.common import Column, Dimensions, EngineName, Model, plain_errors, report_failures
from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder

Database = Annotated[str, typer.Option("--database", "-d", help="Folder or URL of the database.")]


@plain_errors
def index(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(help="Files and folders: text, Markdown, HTML, PDF, DOCX, JSONL, CSV, Parquet."),
    ] = None,
    *,
    database: Database,
    vectors: Annotated[
        str | None, typer.Option(help="In place of PATHS: a folder that polyvec embed made with --keep text.")
    ] = None,
    dimensions: Dimensions = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="How vectors are stored: float32 (if left out), float16, int8 or binary."),
    ] = None,
    column: Column = "text",
    max_megabytes: Annotated[float, typer.Option(help="Larger files are left out.")] = MAX_MEGABYTES,
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Bring a database up to date with PATHS: files that are new, changed, moved or deleted since the last time.

    Files that cannot be read are listed at the end, and the exit code is 2; the others are in the database.
    """
    if bool(paths) == (vectors is not None):
        raise InputError(f"index needs PATHS or --vectors, one of the two, got {'both' if paths else 'neither'}")
    output = None if vectors is None else Output(vectors)
    if output is not None and dimensions is None:  # a new database has their width; an empty one of another is no use
        dimensions = output.stamp["dimensions"]
    opened = Index(database, Embedder(model, engine=engine), dimensions=dimensions, dtype=dtype, create=True)
    if output is not None:
        added, removed = add_vectors(opened, output, column=column)
        counts = f"{added} added" + (f", {removed} removed" if removed else "")
        typer.echo(f"{counts}; {len(opened.store)} passages in {database}", err=True)
        return
    assert paths
    report = opened.update(paths, column=column, max_megabytes=max_megabytes, progress=sys.stderr.isatty())
    typer.echo(f"{report}; {len(opened.store)} passages in {database}", err=True)
    report_failures(report.failed)
