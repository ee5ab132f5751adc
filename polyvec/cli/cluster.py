"""``polyvec cluster``: the groups of a file's texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from polyvec.apps.cluster import NOISE, TASK, name_clusters, write_map
from polyvec.apps.cluster import cluster as find_clusters
from polyvec.atomic import check_output
from polyvec.cli.common import Column, EngineName, Model, check_columns, make_stamp, plain_errors, records_with_text
from polyvec.errors import InputError
from polyvec.files import vector_writer
from polyvec.inference.embedder import Embedder


@plain_errors
def cluster(
    source: Annotated[str, typer.Argument(metavar="INPUT", help="Text (one a line), JSONL, CSV, Parquet; - is stdin.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Records with cluster and vector: .parquet or .jsonl.")
    ] = None,
    clusters: Annotated[int | None, typer.Option(help="Their number (k-means); left out, HDBSCAN finds it.")] = None,
    min_size: Annotated[int, typer.Option(help="Texts in the smallest cluster that HDBSCAN finds.")] = 5,
    map_page: Annotated[Path | None, typer.Option("--map", help="A page of the texts as points, .html.")] = None,
    column: Column = "text",
    model: Model = None,
    engine: EngineName = "auto",
) -> None:
    """Group texts by what they are about, and print each group: its size, its words, a typical text."""
    if output is not None and output.suffix.lower() not in (".parquet", ".jsonl"):
        raise InputError(f"output must end in .parquet or .jsonl, got {output.name!r}")
    for path in (output, map_page):
        if path is not None:
            check_output(path)
    records = records_with_text(source, column)
    if output is not None:
        records = list(check_columns(records, ("cluster", "cluster_label")))
    texts = [record[column] for record in records]
    embedder = Embedder(model, engine=engine)
    vectors = embedder.encode(texts, task=TASK)
    found = find_clusters(vectors, num_clusters=clusters, min_size=min_size)
    names = name_clusters(texts, found)
    if output is not None:
        with vector_writer(output, make_stamp(embedder, task=TASK, dimensions=None, dtype="float32")) as writer:
            for record, number, vector in zip(records, found.tolist(), vectors, strict=True):
                label = None if number == NOISE else names[number]
                writer.write({**record, "cluster": number, "cluster_label": label}, vector)
    if map_page is not None:
        write_map(map_page, texts, vectors, found, names)
    for number, name in enumerate(names):
        members = np.flatnonzero(found == number)
        typical = members[np.argmax(vectors[members] @ vectors[members].mean(axis=0))]
        typer.echo(f"{len(members)}\t{name}\t{' '.join(texts[typical].split())}")
    if num_left := int((found == NOISE).sum()):
        typer.echo(f"{num_left} of {len(texts)} texts are in no cluster", err=True)
    if not names:
        typer.echo("no cluster found; --clusters N makes N of them, a smaller --min-size finds smaller ones", err=True)
        raise typer.Exit(1)
