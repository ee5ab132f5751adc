"""``polyvec search``: the passages of files that answer a question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyvec.apps.search import highlights, read_documents, search
from polyvec.cli.common import Column, Dimensions, EngineName, Model, plain_errors
from polyvec.inference.embedder import Embedder


@plain_errors
def search_files(
    query: str,
    files: Annotated[list[Path], typer.Argument(help="Text files, folders of them, JSONL, CSV or Parquet.")],
    top: Annotated[int, typer.Option(help="Passages to show.")] = 5,
    dimensions: Dimensions = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Find the passages of FILES that answer QUERY, in any language. Piped, one tab-separated line a passage."""
    documents = read_documents(files, column=column)
    embedder = Embedder(model, engine=engine)
    hits = search(embedder, query, documents, top=top, dimensions=dimensions, progress=sys.stderr.isatty())
    if not hits:
        typer.echo("nothing to search: the files hold no text", err=True)
        raise typer.Exit(1)
    if not sys.stdout.isatty():
        for hit in hits:
            typer.echo(f"{hit.score:.4f}\t{hit.document.source}:{hit.line}\t{' '.join(hit.text.split())}")
        return
    table = Table("cosine", "where", "passage", show_lines=True)
    for hit in hits:
        passage = Text(hit.text)
        for start, end in highlights(query, hit.text):
            passage.stylize("bold yellow", start, end)
        table.add_row(f"{hit.score:.3f}", Text(f"{hit.document.source}:{hit.line}"), passage)
    Console().print(table)
