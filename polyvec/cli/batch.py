"""``polyvec embed`` into a folder: a job that resumes, on this process or on a Ray cluster."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from polyvec.cli.common import make_stamp
from polyvec.errors import InputError
from polyvec.files import VECTOR_SUFFIXES
from polyvec.inference.embedder import Embedder
from polyvec.inputs import LANCE

if TYPE_CHECKING:
    from polyvec.batch.engines import Place
    from polyvec.batch.job import Job
    from polyvec.batch.run import Progress

_SECONDS_BETWEEN_LINES = 10  # where stderr is a file


def is_folder(output: str) -> bool:
    """Whether an output is a folder of parts and not a file: one that is there, Lance, or a name without a suffix."""
    if output == "-":
        return False
    return output.endswith("/") or os.path.isdir(output) or Path(output.rsplit("://")[-1]).suffix in ("", LANCE)


def parse_chunking(value: str | None) -> Any:
    """Return a number where there is one; any other value as it is, for the embedder to take or to refuse."""
    return int(value) if value is not None and value.isascii() and value.isdigit() else value


def embed_folder(
    job: Job,
    output: str,
    *,
    cluster: str | None,
    workers: int | None,
    cpus: float,
    gpus: float,
    memory: float | None,
    replace_other: bool,
    dry_run: bool,
) -> None:
    """Run ``job`` into the folder ``output`` and print its summary, or only what it would take."""
    if cluster is not None and not is_folder(output):
        raise InputError(f"output of a job on a cluster must be a folder, got {output!r}; leave the suffix out")
    if gpus and job.engine == "auto":
        job = replace(job, engine="torch")
    if gpus and job.engine.startswith("onnx"):
        raise InputError(f"engine {job.engine!r} runs on the CPU, got --gpus {gpus:g}; use --engine torch")
    is_measured = job.engine == "auto"
    threads = max(1, int(cpus)) if cluster else None
    embedder = Embedder(job.model, engine=job.engine, threads=threads)
    stamp = make_stamp(embedder, task=job.task, dimensions=job.dimensions, dtype=job.dtype)
    # Every option is checked here, before anything is read; and each machine runs the engine that this one chose.
    embedder.encode_stream(
        [], task=job.task, dimensions=job.dimensions, dtype=job.dtype, late_chunking=job.late_chunking
    )
    if is_measured:
        chosen = embedder.engine.name
        job = replace(job, engine="torch" if chosen.startswith("torch") else chosen.removesuffix("-float32"))
    job = replace(job, stamp=stamp)
    place = _place(cluster, workers, cpus, gpus, memory)
    from polyvec.batch.run import prepare, run

    ready = prepare(job, output, place, replace=replace_other, is_engine_measured=is_measured)
    for sentence in ready.news:
        typer.echo(sentence, err=True)
    if dry_run:
        from polyvec.batch.estimate import estimate

        if ready.job.engine != job.engine:
            embedder = Embedder(job.model, engine=ready.job.engine, threads=threads)
        typer.echo(json.dumps(estimate(ready, embedder, place.workers), indent=1))
        return
    del embedder  # its memory is the workers'
    if ready.done:
        typer.echo(f"{len(ready.done)} of {len(ready.plan.parts)} parts are finished", err=True)
    started = time.monotonic()
    summary = run(ready, place, _Meter())
    summary["seconds"] = round(time.monotonic() - started, 3)
    typer.echo(json.dumps(summary, indent=1, ensure_ascii=False))


def _place(cluster: str | None, workers: int | None, cpus: float, gpus: float, memory: float | None) -> Place:
    from polyvec.batch.engines import Here, OnRay

    if cluster is None:
        if workers not in (None, 1):
            raise InputError(f"workers beyond one need a cluster, got --workers {workers}; see --cluster")
        return Here(memory_mb=memory)
    return OnRay(cluster, workers=workers, cpus=cpus, gpus=gpus, memory_mb=memory)


class _Meter:
    """A line on stderr: rewritten on a terminal, one every ten seconds in a file."""

    def __init__(self) -> None:
        self._started = self._shown = time.monotonic()

    def __call__(self, now: Progress) -> None:
        moment = time.monotonic()
        is_terminal = sys.stderr.isatty()
        is_last = now.parts_done == now.parts
        if not is_last and moment - self._shown < (0.5 if is_terminal else _SECONDS_BETWEEN_LINES):
            return
        self._shown = moment
        seconds = max(moment - self._started, 1e-9)
        speed = now.rows / seconds
        left = f"{now.rows_left / speed:,.0f} s left" if speed else "time unknown"
        line = (
            f"part {now.parts_done} of {now.parts}  {speed:,.0f} rows/s  {now.tokens / seconds:,.0f} tokens/s  "
            f"{left}  {now.rejected} rejected"
        )
        typer.echo(f"\r{line:<100}" if is_terminal else line, nl=not is_terminal or is_last, err=True)


def check_file_options(output: str, **given: object) -> None:
    """Raise ``InputError`` for an option that only a folder of parts has."""
    unset: tuple[object, ...] = (None, [])
    if wrong := [name for name, value in given.items() if value is not False and value not in unset]:
        raise InputError(
            f"--{wrong[0].replace('_', '-')} needs a folder as output, got {output!r}, "
            f"not a file ending in {', '.join(VECTOR_SUFFIXES)}"
        )


def check_cluster_options(cluster: str | None, **given: object) -> None:
    """Raise ``InputError`` for an option that only the workers of a cluster have."""
    if cluster is None and (wrong := [name for name, value in given.items() if value is not None]):
        raise InputError(f"--{wrong[0]} needs --cluster, got none; a process alone takes what its machine has")
