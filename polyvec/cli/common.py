"""What every verb shares: options, errors as one line on stderr, the stamp of a vector file."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from polyvec import __version__
from polyvec.errors import InputError, MachineWarning, PolyvecError, TruncationWarning, UntrainedDimensionWarning
from polyvec.files import Record, Stamp, read_records
from polyvec.inference.embedder import Embedder
from polyvec.inference.engines.opening import ENGINES

Result = TypeVar("Result")

Model = Annotated[str | None, typer.Option(help="Folder or hub name; the built-in polyvec-mini if left out.")]
EngineName = Annotated[str, typer.Option(help=f"{', '.join(ENGINES)}.")]
Dimensions = Annotated[int | None, typer.Option(help="Kept components; all if left out.")]
Column = Annotated[str, typer.Option(help="Field of JSONL, CSV or Parquet that holds the text.")]
TaskName = Annotated[str | None, typer.Option(help="Task: adapter and prompt; the base model if left out.")]


def plain_errors(verb: Callable[..., Result]) -> Callable[..., Result]:
    """Turn errors of polyvec and of the system into a line on stderr and exit code 2, and warnings into a line each."""

    @wraps(verb)
    def run(*args: Any, **options: Any) -> Result:
        try:
            with warnings.catch_warnings():
                for kind in (MachineWarning, TruncationWarning, UntrainedDimensionWarning):
                    warnings.simplefilter("always", kind)
                warnings.showwarning = lambda message, *_, **__: typer.echo(f"warning: {message}", err=True)
                return verb(*args, **options)
        except PolyvecError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except BrokenPipeError:  # the reader, such as `head`, has seen enough
            sys.stderr.close()
            raise typer.Exit(0) from None
        except OSError as error:  # a full disk, a folder that may not be written to, a name that is too long
            place = f"{error.filename}: " if error.filename else ""
            typer.echo(f"error: files must be readable, or writable, got {place}{error.strerror or error}", err=True)
            raise typer.Exit(2) from None

    return run


def records_with_text(source: str, column: str) -> list[Record]:
    """Return the records of a file, ``-`` is stdin, whose text is not blank, and tell on stderr how many are left out.

    Raises ``InputError`` where there is none.
    """
    records = list(read_records(None if source == "-" else Path(source), column=column))
    kept = [record for record in records if record[column].strip()]
    if not kept:
        raise InputError(f"{source} must hold at least one text, got none")
    if blank := len(records) - len(kept):
        typer.echo(f"{source}: left out {blank} of {len(records)} texts that are blank", err=True)
    return kept


def check_columns(records: Iterable[Record], own: Sequence[str]) -> Iterator[Record]:
    """Yield ``records``. Raises ``InputError`` for one with a column of ``own``, which the output would write over."""
    for record in records:
        if taken := [name for name in own if name in record]:
            raise InputError(
                f"records must leave out {', '.join(own)}, which the output has of its own, got {taken[0]!r}; rename it"
            )
        yield record


def make_stamp(embedder: Embedder, *, task: str | None, dimensions: int | None, dtype: str) -> Stamp:
    """Return what made the vectors of a file, to be compared when they are read again."""
    return {
        "polyvec": __version__,
        "model": embedder.model_name,
        "weights": embedder.weights_hash,
        "task": task,
        "dimensions": dimensions or embedder.config.hidden_size,
        "dtype": dtype,
        "fingerprint": embedder.fingerprint(task=task, dimensions=dimensions, dtype=dtype),
    }


def report_failures(sentences: Sequence[str]) -> None:
    """Print one line for each file that could not be read, then their number; exit with code 2 if there is one."""
    for sentence in sentences:
        typer.echo(f"error: {sentence}", err=True)
    if len(sentences) > 1:
        typer.echo(f"{len(sentences)} files were left out", err=True)
    if sentences:
        raise typer.Exit(2)
