"""An input as units, rows and slices. A slice is what one worker embeds at a time; its content gives it its name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from polyvec.batch.job import Job
from polyvec.errors import InputError
from polyvec.files import Record, are_unicode
from polyvec.inputs import InputFile, input_records

_SLICE_CHARACTERS = 8_000_000  # a slice of long texts ends early: memory is bounded by characters, not by rows
_UNIT_ROWS = 1 << 17  # of Parquet, whose row groups can be read by several readers


@dataclass(frozen=True)
class Unit:
    """What one reader reads in order: a file, or a run of the row groups of a Parquet file."""

    file: InputFile
    row_groups: tuple[int, ...] | None = None
    first_row: int = 1


@dataclass(frozen=True)
class Row:
    """A row of an input. ``fault`` says why it has no text, or is None."""

    where: str  # FILE:ROW
    text: str
    kept: Record  # the columns of the output, the id first
    fault: str | None = None


@dataclass(frozen=True)
class Slice:
    """Rows that follow each other in a unit; ``digest`` is 32 hex digits of the rows and the job's identity."""

    digest: str
    rows: list[Row]


def units_of(fs: Any, files: Sequence[InputFile]) -> list[Unit]:
    """Return the units of an input, in order. Raises ``InputError`` for Parquet that cannot be read."""
    units: list[Unit] = []
    for file in files:
        units += _parquet_units(fs, file) if file.suffix == ".parquet" else [Unit(file)]
    return units


def _parquet_units(fs: Any, file: InputFile) -> Iterator[Unit]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open_input_file(file.path) as opened:
            metadata = pq.read_metadata(opened)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{file.name} must be a readable Parquet file, got: {error}") from error
    groups: list[int] = []
    first = number = 1
    for group in range(metadata.num_row_groups):
        groups.append(group)
        number += metadata.row_group(group).num_rows
        if number - first >= _UNIT_ROWS or group == metadata.num_row_groups - 1:
            yield Unit(file, tuple(groups), first)
            groups, first = [], number


def read_slices(fs: Any, unit: Unit, job: Job) -> Iterator[Slice]:
    """Yield the slices of a unit. Raises ``InputError`` for a file that cannot be read on, or lacks a column."""
    identity = json.dumps(job.identity(), sort_keys=True).encode()
    rows: list[Row] = []
    characters = 0
    for row in read_rows(fs, unit, job):
        rows.append(row)
        characters += len(row.text)
        if len(rows) == job.part_rows or characters > _SLICE_CHARACTERS:
            yield _slice(rows, identity)
            rows, characters = [], 0
    if rows:
        yield _slice(rows, identity)


def _slice(rows: list[Row], identity: bytes) -> Slice:
    digest = hashlib.sha256(identity)
    for row in rows:
        values = [row.text, row.fault, *row.kept.values()]
        digest.update(json.dumps(values, default=str).encode() + b"\n")
    return Slice(digest.hexdigest()[:32], rows)


def read_rows(fs: Any, unit: Unit, job: Job) -> Iterator[Row]:
    """Yield the rows of a unit, those without a text with their fault."""
    name = unit.file.name
    number = unit.first_row
    records = input_records(
        fs, unit.file, column=job.column, columns=job.columns(), row_groups=unit.row_groups, first=unit.first_row
    )
    for record in records:
        where = f"{name}:{number}"
        if isinstance(record, InputError):
            if number == 1 and "must have the column" in str(record):
                raise record  # of the whole file, most likely
            message = str(record)
            row = Row(where, "", {}, message[message.find(" ") + 1 :] if message.startswith(name) else message)
        else:
            row = _row(record, where, job)
        yield row
        number += 1


def _row(record: Record, where: str, job: Job) -> Row:
    columns = [*([job.id_column] if job.id_column else []), *job.keep]
    if missing := [c for c in columns if c not in record]:
        if where.endswith(":1"):
            raise InputError(f"{where} must have the column {missing[0]!r}, got {', '.join(map(str, record))}")
        return Row(where, "", {}, f"must have the column {missing[0]!r}")
    identifier = record[job.id_column] if job.id_column else where
    if identifier is None:
        return Row(where, "", {}, f"must have an id in {job.id_column!r}, got none")
    kept = {"id": identifier, **{c: record[c] for c in job.keep}}
    text = record[job.column]
    if not are_unicode([text, *kept.values()]):
        return Row(where, "", {}, "must be UTF-8 text, got bytes or surrogates that are none")
    return Row(where, text, kept)
