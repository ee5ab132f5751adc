"""``polyvec search``: the passages of files, or of a database of them, that answer a question."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from polyvec.apps.documents import Document, expand, read_documents
from polyvec.apps.index import Index, source_name
from polyvec.apps.search import check_query, highlights
from polyvec.apps.search import search as search_documents
from polyvec.cli.common import Column, Dimensions, EngineName, Model, plain_errors, report_failures
from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.search.store import WEIGHT, Hit, Passage

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # what ends a field or a line, or moves a terminal's cursor


@plain_errors
def search(
    query: str,
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files and folders to read now, where there is no database.")
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", "-d", help="Folder or URL that polyvec index made.")
    ] = None,
    top: Annotated[int, typer.Option(help="Passages to show.")] = 5,
    mode: Annotated[str | None, typer.Option(help="vector, text (words) or hybrid (a database's default).")] = None,
    weight: Annotated[
        float | None, typer.Option(help=f"Share of meaning in a hybrid score, 0 to 1; {WEIGHT} if left out.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE: source, heading (* is anything), page, or a table's column. Of a database."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a passage.")] = False,
    dimensions: Dimensions = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Find the passages that answer QUERY, in any language. Piped, one tab-separated line a passage."""
    check_query(query)
    filters = _filters(where or [])
    if bool(files) == (database is not None):
        raise InputError("search needs FILES or --database, one of the two, got " + ("both" if files else "neither"))
    failures: list[str] = []
    if files:
        if mode not in (None, "vector") or where or weight is not None:
            raise InputError(
                "--mode, --weight and --where need a database, got files; make one: polyvec index FILES -d DATABASE"
            )
        embedder = Embedder(model, engine=engine)
        documents = _documents(files, column, failures)
        started = time.perf_counter()
        hits = search_documents(
            embedder, query, documents, top=top, dimensions=dimensions, progress=sys.stderr.isatty()
        )
    else:
        assert database is not None
        index = Index(database, Embedder(model, engine=engine), dimensions=dimensions)
        started = time.perf_counter()
        hits = index.search(
            query, mode=mode or "hybrid", top=top, where=filters,
            weight=WEIGHT if weight is None else weight,
        )  # fmt: skip
    milliseconds = (time.perf_counter() - started) * 1000
    for line in _lines(query, hits, as_json=as_json):
        typer.echo(line)
    if hits:
        typer.echo(f"{len(hits)} passages in {milliseconds:.0f} ms", err=True)
    report_failures(failures)
    if not hits:
        typer.echo("no passage found: nothing to search, or nothing passes the filter", err=True)
        raise typer.Exit(1)


def _documents(files: list[Path], column: str, failures: list[str]) -> Iterator[Document]:
    for path in expand(files, failures):
        try:
            yield from read_documents(path, column=column)
        except InputError as error:
            failures.append(str(error))


def _filters(pairs: list[str]) -> dict[str, str]:
    filters: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--where must be KEY=VALUE, got {pair!r}")
        if key in filters:
            raise InputError(f"--where must name a key once, got {key} again; search once for each value")
        # A file as it is told in the answers, from here, is one of the database, where it has its whole name.
        filters[key] = source_name(Path(value)) if key == "source" and os.path.exists(value) else value
    return filters


def _lines(query: str, hits: list[Hit], *, as_json: bool) -> Iterator[str]:
    if as_json:
        for hit in hits:
            facts = {"score": hit.score, **asdict(hit.passage), "highlights": highlights(query, hit.passage.text)}
            yield json.dumps(facts, ensure_ascii=False)
    elif not sys.stdout.isatty():
        for hit in hits:
            yield f"{hit.score:.4f}\t{_place(hit.passage)}\t{' '.join(hit.passage.text.split())}"
    elif hits:
        table = Table("score", "where", "passage", show_lines=True)
        for hit in hits:
            passage = Text(hit.passage.text)
            for start, end in highlights(query, hit.passage.text):
                passage.stylize("bold yellow", start, end)
            table.add_row(f"{hit.score:.3f}", Text(_place(hit.passage)), passage)
        Console().print(table)


def _place(passage: Passage) -> str:
    """Return the file, from here if it is below, or the id, with the page or line: on one line, without tabs."""
    path, name = Path(passage.source), passage.source
    if path.is_absolute() and path.is_relative_to(os.getcwd()):
        name = str(path.relative_to(os.getcwd()))  # an id stays: a path would make one slash of the two in a URL
    name = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), name)
    return f"{name}:{f'p{passage.page}' if passage.page else passage.line}"
