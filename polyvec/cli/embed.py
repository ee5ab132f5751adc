"""``polyvec embed``: texts in, vectors out."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from polyvec.cli.batch import check_cluster_options, check_file_options, embed_folder, is_folder, parse_chunking
from polyvec.cli.common import Column, Dimensions, EngineName, Model, TaskName, make_stamp, plain_errors
from polyvec.errors import InputError
from polyvec.files import json_line, read_records, vector_writer
from polyvec.inference.embedder import Embedder
from polyvec.streams import paired

_JOB = "Into a folder"


@plain_errors
def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Text (one a line), JSONL, CSV, Parquet; - is stdin. Into a folder also .gz, .zst, folder, glob, URL.",
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help=".jsonl, .parquet or .npy; - for stdout; or a folder or its URL.")
    ] = "-",
    task: TaskName = None,
    dimensions: Dimensions = None,
    dtype: Annotated[str, typer.Option(help="float32, float16, int8, binary or ubinary.")] = "float32",
    column: Column = "text",
    truncate: Annotated[bool, typer.Option(help="Cut texts beyond the context, with a warning.")] = True,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a file's batch; by default the fastest.")] = None,
    model: Model = None,
    engine: EngineName = "auto",
    id_column: Annotated[
        str | None, typer.Option("--id", help="Column of the ids; FILE:ROW if left out.", rich_help_panel=_JOB)
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Column to pass through; repeat it.", rich_help_panel=_JOB)
    ] = None,
    late_chunking: Annotated[
        str | None, typer.Option(help="A row a chunk: sentence, or tokens a chunk.", rich_help_panel=_JOB)
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Ray cluster: auto, or ray://HOST:PORT.", rich_help_panel=_JOB)
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Models at work on the cluster; as many as fit.", rich_help_panel=_JOB)
    ] = None,
    cpus: Annotated[float | None, typer.Option(help="Cores of a worker; 1 if left out.", rich_help_panel=_JOB)] = None,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs of a worker, none if left out; 0.5 shares one.", rich_help_panel=_JOB)
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="MB that a worker may write to; a text that needs more is set aside.", rich_help_panel=_JOB),
    ] = None,
    part_rows: Annotated[
        int | None, typer.Option(help="Rows in a part; 8192 if left out.", rich_help_panel=_JOB)
    ] = None,
    dedupe: Annotated[
        str | None,
        typer.Option(help="Embed equal texts once in the job (if left out) or part: job, part.", rich_help_panel=_JOB),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make anew a folder of another model or options.", rich_help_panel=_JOB)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what it takes, from a sample.", rich_help_panel=_JOB)
    ] = False,
) -> None:
    """Embed every text of INPUT, in memory that does not grow with it.

    Into a folder it is a job: it goes on where it stopped, does nothing twice, and sets aside rows that have no text.
    """
    check_cluster_options(cluster, cpus=cpus, gpus=gpus)
    if cluster is not None or is_folder(output):
        if batch_tokens is not None:
            raise InputError(
                f"--batch-tokens needs a file as output, got {output!r}; a job has the batches of its engine"
            )
        from polyvec.batch.job import Job

        job = Job(
            source=source, column=column, id_column=id_column, keep=tuple(keep or ()), model=model, engine=engine,
            task=task, dimensions=dimensions, dtype=dtype, late_chunking=parse_chunking(late_chunking),
            truncate=truncate, part_rows=Job.part_rows if part_rows is None else part_rows,
            dedupe=Job.dedupe if dedupe is None else dedupe,
        )  # fmt: skip
        embed_folder(
            job, output, cluster=cluster, workers=workers, cpus=1 if cpus is None else cpus, gpus=gpus or 0,
            memory=memory, replace_other=replace, dry_run=dry_run,
        )  # fmt: skip
        return
    check_file_options(
        output,
        id=id_column,
        keep=keep,
        late_chunking=late_chunking,
        workers=workers,
        memory=memory,
        part_rows=part_rows,
        dedupe=dedupe,
        replace=replace,
        dry_run=dry_run,
    )
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
