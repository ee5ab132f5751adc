"""Texts from files, vectors to files. An output appears whole under its name or not at all.

A vector file carries a stamp of what made its vectors: in the metadata of Parquet, in ``NAME.json`` beside ``.npy`` and
``.jsonl``. Vectors of different stamps never meet.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyvec.atomic import whole_file, write_json
from polyvec.errors import InputError, MissingExtraError

Record = dict[str, Any]
Stamp = dict[str, Any]

TEXT_SUFFIXES = (".txt", ".md", ".rst")
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_STAMP_KEY = b"polyvec"
_PARQUET_ROWS = 4096


def read_records(path: Path | None, *, column: str = "text") -> Iterator[Record]:
    """Yield one record per text, with the text under ``column``. None reads lines of standard input.

    ``.jsonl``: an object or a string a line; ``.csv`` and ``.tsv`` with a header; ``.parquet``; any other file: a text
    a line. Raises ``InputError`` naming file and row for what cannot be read or has no such column.
    """
    if path is None:
        yield from _lines(sys.stdin, column)
        return
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_records(path, column)
            return
        with path.open(encoding="utf-8", newline="" if suffix in (".csv", ".tsv") else None) as file:
            if suffix == ".jsonl":
                yield from _json_records(file, path, column)
            elif suffix in (".csv", ".tsv"):
                yield from _csv_records(file, path, column)
            else:
                yield from _lines(file, column)
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _lines(file: IO[str], column: str) -> Iterator[Record]:
    for line in file:
        yield {column: line.rstrip("\n")}


def _json_records(file: IO[str], path: Path, column: str) -> Iterator[Record]:
    for number, line in enumerate(file, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number} must be one JSON value, got {error}") from error
        row = {column: row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number} must be a JSON object or string, got {type(row).__name__}")
        yield _checked(row, path, number, column)


def _csv_records(file: IO[str], path: Path, column: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields beyond 128 kB
    reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        for row in reader:
            yield _checked(dict(row), path, reader.line_num, column)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num} must be CSV, got {error}") from error


def _parquet_records(path: Path, column: str) -> Iterator[Record]:
    pa, pq = _pyarrow()
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise InputError(f"{path} must be a readable Parquet file, got: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield _checked(row, path, number, column)


def column_names(path: Path) -> list[str]:
    """Return the columns of a table's first row: of ``.parquet``, ``.jsonl``, and ``.csv`` or ``.tsv`` with a header.

    Raises ``InputError`` for a file that cannot be read; an empty file has none.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_columns(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            line = file.readline()
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    if suffix != ".jsonl":
        return next(csv.reader([line], delimiter="\t" if suffix == ".tsv" else ","), [])
    try:
        row = json.loads(line or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:1 must be one JSON value, got {error}") from error
    return list(row) if isinstance(row, dict) else []


def parquet_columns(path: Path) -> list[str]:
    """Return the names of a Parquet file's columns."""
    pa, pq = _pyarrow()
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise InputError(f"{path} must be a readable Parquet file, got: {error}") from error


def _checked(row: Record, path: Path, number: int, column: str) -> Record:
    if column not in row:
        raise InputError(
            f"{path}:{number} must have the column {column!r}, got {', '.join(map(str, row))}; see --column"
        )
    if not isinstance(row[column], str):
        raise InputError(f"{path}:{number}: {column!r} must be a text, got {type(row[column]).__name__}")
    return row


class VectorFile(Protocol):
    """An open file of vectors."""

    def write(self, record: Record, vector: NDArray[Any]) -> None: ...

    def close(self, *, whole: bool) -> None: ...


@contextmanager
def vector_writer(path: Path, stamp: Stamp) -> Iterator[VectorFile]:
    """Yield a writer of records with their vectors to ``.jsonl``, ``.parquet`` or ``.npy`` (vectors alone), row by row.

    The file takes its name when the context ends well, and nothing is left when it does not.
    """
    formats: dict[str, Callable[[Path, Stamp], VectorFile]] = {
        ".jsonl": _JsonlFile, ".parquet": _ParquetFile, ".npy": _NpyFile,
    }  # fmt: skip
    suffix = path.suffix.lower()
    if suffix not in formats:
        raise InputError(f"output must end in {', '.join(formats)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise InputError(f"output folder must exist, got {path.parent}; create it first")
    with whole_file(path) as partial:
        file = formats[suffix](partial, stamp)
        is_whole = False
        try:
            yield file
            is_whole = True
        finally:
            file.close(whole=is_whole)
        if suffix != ".parquet":
            write_json(stamp, _stamp_path(path))


class _JsonlFile:
    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write(self, record: Record, vector: NDArray[Any]) -> None:
        self._file.write(json_line(record, vector))

    def close(self, *, whole: bool) -> None:
        self._file.close()


class _NpyFile:
    """Rows first, their number last: the header of numpy keeps room for any number."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._file = path.open("wb")
        self._rows = 0
        self._width = packed_width(stamp)
        self._dtype = storage_dtype(stamp["dtype"])
        self._header()

    def _header(self) -> None:
        descr = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self._rows, self._width)
        np.lib.format.write_array_header_1_0(self._file, {"descr": descr, "fortran_order": False, "shape": shape})

    def write(self, record: Record, vector: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(vector, dtype=self._dtype).tobytes())
        self._rows += 1

    def close(self, *, whole: bool) -> None:
        if whole:
            self._file.seek(0)
            self._header()
        self._file.close()


class _ParquetFile:
    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._pa, self._pq = _pyarrow()
        self._path, self._stamp = path, stamp
        self._rows: list[Record] = []
        self._vectors: list[NDArray[Any]] = []
        self._writer: Any = None
        self._schema: Any = None  # of the records, from the first rows on

    def write(self, record: Record, vector: NDArray[Any]) -> None:
        self._rows.append(record)
        self._vectors.append(vector)
        if len(self._rows) == _PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        pa = self._pa
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._schema = table.schema
        flat = np.concatenate(self._vectors) if self._vectors else np.empty(0, storage_dtype(self._stamp["dtype"]))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(flat), packed_width(self._stamp))
        table = table.append_column("embedding", vectors)
        table = table.replace_schema_metadata({_STAMP_KEY: json.dumps(self._stamp).encode()})
        if self._writer is None:
            self._writer = self._pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)
        self._rows, self._vectors = [], []

    def close(self, *, whole: bool) -> None:
        if whole and (self._rows or self._writer is None):
            self._flush()
        if self._writer is not None:
            self._writer.close()


def json_line(record: Record, vector: NDArray[Any]) -> str:
    """Return a record and its vector as one line of JSON; float32 keeps the digits that bring it back exactly."""
    # Through str: tolist() of a float32 would print the digits of the nearest double.
    values = [float(str(v)) for v in vector] if vector.dtype.kind == "f" else vector.tolist()
    return json.dumps({**record, "embedding": values}, ensure_ascii=False, default=str) + "\n"


def read_vectors(path: Path) -> tuple[NDArray[Any], list[Record], Stamp]:
    """Return the vectors (B, M), their records (none for ``.npy``) and the stamp of a file that polyvec wrote."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False), [], _read_stamp(path)
        if path.suffix.lower() == ".parquet":
            _, pq = _pyarrow()
            table = pq.read_table(path)
            stamp = json.loads((table.schema.metadata or {}).get(_STAMP_KEY, b"{}"))
            rows = table.to_pylist()
        else:
            stamp = _read_stamp(path)
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        vectors = [row.pop("embedding") for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} must be a vector file written by polyvec, got {type(error).__name__}: {error}"
        ) from error
    return np.array(vectors, dtype=storage_dtype(stamp.get("dtype", "float32"))), rows, stamp


def is_vector_file(path: Path) -> bool:
    """Whether ``path`` is one that polyvec wrote: it has a stamp."""
    if path.suffix.lower() == ".parquet":
        pa, pq = _pyarrow()
        try:
            return _STAMP_KEY in (pq.read_schema(path).metadata or {})
        except (pa.ArrowInvalid, OSError):
            return False
    return path.suffix.lower() == ".npy" or _stamp_path(path).exists()


def check_same_model(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raise ``InputError`` unless two stamps say that the vectors compare: same weights, width and dtype."""
    for key in ("weights", "dimensions", "dtype"):
        if first.get(key) != second.get(key):
            raise InputError(
                f"{names[1]} must hold vectors of the same {key} as {names[0]}, {first.get(key)!r}, "
                f"got {second.get(key)!r}; embed both with one model and one set of options"
            )


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the numpy type of an output type: bits are packed into bytes."""
    return np.dtype({"binary": "int8", "ubinary": "uint8"}.get(dtype, dtype))


def packed_width(stamp: Stamp) -> int:
    """Return how many numbers a vector has: eight bits are one."""
    width = int(stamp["dimensions"])
    return width // 8 if stamp["dtype"] in ("binary", "ubinary") else width


def _stamp_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_stamp(path: Path) -> Stamp:
    stamp: Stamp = json.loads(_stamp_path(path).read_text(encoding="utf-8"))
    return stamp


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError.of("Parquet", "parquet") from error
    return pa, pq


def _not_text(path: Path, error: UnicodeDecodeError) -> InputError:
    return InputError(f"{path} must be UTF-8 text, got byte {error.object[error.start]:#x} at {error.start}")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path} must be a readable file, got: {error.strerror or error}")


def read_text(path: Path) -> str:
    """Return the whole text of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error
    except OSError as error:
        raise _unreadable(path, error) from error
