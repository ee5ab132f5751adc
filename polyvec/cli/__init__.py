"""The ``polyvec`` command. Each verb parses, calls one function, prints; one module holds one verb or a family.

Results go to stdout in UTF-8, progress and errors to stderr. Exit code 0: done; 1: nothing found; 2: bad input, usage.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated

import typer

from polyvec import __version__
from polyvec.cli.classify import classify_app
from polyvec.cli.cluster import cluster
from polyvec.cli.embed import embed
from polyvec.cli.evaluate import evaluate
from polyvec.cli.index import index
from polyvec.cli.match import match
from polyvec.cli.models import export, info
from polyvec.cli.search import search
from polyvec.cli.serve import SERVE_CONTEXT, key, serve
from polyvec.cli.train import train_app

app = typer.Typer(
    help="Task-specific Matryoshka embeddings of text in many languages.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for verb in (embed, index, search, match, cluster, key, evaluate, info, export):
    app.command()(verb)
app.command(context_settings=SERVE_CONTEXT)(serve)
app.add_typer(classify_app, name="classify")
app.add_typer(train_app, name="train")


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Task-specific Matryoshka embeddings of text in many languages."""
    # Before torch starts its threads: they wait for each other many times a layer, and one that waits by turning keeps
    # the core from the other where a second program has the rest of them. Costs nothing where there is none.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):  # data is UTF-8 for whoever reads it, whatever the locale says
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # of names of files that are not
    if version:
        typer.echo(__version__)
        raise typer.Exit(0)
