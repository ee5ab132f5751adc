"""Texts from files, vectors to files. An output appears whole under its name or not at all.

A vector file carries a stamp of what made its vectors: in the metadata of Parquet, in ``NAME.json`` beside ``.npy`` and
``.jsonl``. Vectors of different stamps never meet.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyvec.atomic import check_output, whole_file, write_json
from polyvec.errors import InputError, MissingExtraError
from polyvec.tasks import PARTNERS

Record = dict[str, Any]
Stamp = dict[str, Any]

TEXT_ENCODING = "utf-8-sig"  # UTF-8; the mark that Excel and others put before it is not text
TEXT_SUFFIXES = (".txt", ".md", ".rst")
CSV_SUFFIXES = (".csv", ".tsv")
_JSON_LINES = (".jsonl", ".ndjson")  # two names of one format
TABLE_SUFFIXES = (*_JSON_LINES, *CSV_SUFFIXES, ".parquet")
JSON_SUFFIX = ".json"  # of one value, which cannot be read row by row
VECTOR_SUFFIXES = (".jsonl", ".parquet", ".npy")
_ESCAPED_BYTE = re.compile(r"[\udc80-\udcff]")  # by ``surrogateescape``
_STAMP_KEY = b"polyvec"
_PARQUET_ROWS = 4096


def read_records(path: Path | None, *, column: str = "text") -> Iterator[Record]:
    """Yield one record per text, with the text under ``column``. None reads lines of standard input.

    ``.jsonl`` and ``.ndjson``: an object or a string a line; ``.csv`` and ``.tsv`` with a header; ``.parquet``; any
    other file but ``.json``: a text a line. Raises ``InputError`` naming file and row for what cannot be read or has no
    such column.
    """
    name = "stdin" if path is None else str(path)
    suffix = ".txt" if path is None else path.suffix.lower()
    try:
        if path is None:
            if isinstance(sys.stdin, io.TextIOWrapper):  # as files are read, whatever the locale says
                sys.stdin.reconfigure(encoding=TEXT_ENCODING, errors="surrogateescape")
            yield from _raised(text_rows(_utf8_lines(sys.stdin, name), name, suffix=suffix, column=column))
        elif suffix == ".parquet":
            yield from _raised(parquet_rows(path, name, column=column))
        else:
            newline = "" if suffix in CSV_SUFFIXES else None
            with path.open(encoding=TEXT_ENCODING, errors="surrogateescape", newline=newline) as file:
                yield from _raised(text_rows(_utf8_lines(file, name), name, suffix=suffix, column=column))
    except OSError as error:
        raise _unreadable(name, error) from error


def _raised(rows: Iterator[Record | InputError]) -> Iterator[Record]:
    for row in rows:
        if isinstance(row, InputError):
            raise row
        yield row


def _utf8_lines(file: Iterable[str], name: str) -> Iterator[str]:
    """Yield the lines of a file that was opened with ``surrogateescape``: strictly, an error would name no line."""
    for number, line in enumerate(file, start=1):
        if found := _ESCAPED_BYTE.search(line):
            raise _not_utf8(name, number, ord(found[0]) - 0xDC00)
        yield line


def text_rows(lines: Iterable[str], name: str, *, suffix: str, column: str) -> Iterator[Record | InputError]:
    """Yield the records of the lines of a file of text by its ``suffix``; in place of a row without a text, its error.

    Raises ``InputError`` for what is no CSV, and for ``.json``.
    """
    _check_has_lines(name, suffix)
    if suffix in _JSON_LINES:
        yield from _json_rows(lines, name, column)
    elif suffix in CSV_SUFFIXES:
        yield from _csv_rows(lines, name, column, "\t" if suffix == ".tsv" else ",")
    else:
        for number, line in enumerate(lines, start=1):
            yield _checked({column: line.rstrip("\n")}, name, number, column)


def _check_has_lines(name: str, suffix: str) -> None:
    if suffix == JSON_SUFFIX:
        raise InputError(
            f"{name} must be JSON Lines, an object or a text a line, got .json; write an array so with jq -c '.[]' and "
            "name it .jsonl"
        )


def _json_rows(lines: Iterable[str], name: str, column: str) -> Iterator[Record | InputError]:
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSON that is none, or a number of thousands of digits
            yield InputError(f"{name}:{number} must be one JSON value, got {error}")
            continue
        row = {column: row} if isinstance(row, str) else row
        if ("\\ud" in line or "\\uD" in line) and not are_unicode([json.dumps(row, ensure_ascii=False)]):
            yield InputError(f"{name}:{number} must be UTF-8 text, got bytes or surrogates that are none")
        elif isinstance(row, dict):
            yield _checked(row, name, number, column)
        else:
            yield InputError(f"{name}:{number} must be a JSON object or string, got {type(row).__name__}")


def are_unicode(values: Iterable[object]) -> bool:
    """Whether the texts among ``values``, also in lists and objects, can be written.

    Bytes that were no UTF-8 and half a pair of escapes cannot.
    """
    texts: list[str] = []
    rest = list(values)
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, (list, tuple)):
            rest += value
        elif isinstance(value, dict):
            rest += [*value, *value.values()]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(lines: Iterable[str], name: str, column: str, delimiter: str) -> Iterator[Record | InputError]:
    csv.field_size_limit(2**31 - 1)  # the default refuses fields beyond 128 kB
    # Without strict, a quote that nobody closes takes the rows that follow into its field.
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = dict(next(reader))
        except StopIteration:
            return
        except csv.Error as error:  # where the next row begins nobody knows: the reader drops the rest of its line
            first = reader.line_num + 1  # the line that the row begins on
            raise InputError(f"{name}:{first} must be CSV, got {error}") from error
        else:
            if any(row.pop(None, ())):  # what lies beyond the header's columns
                yield InputError(
                    f"{name}:{reader.line_num} must have a value a column, got more; quote values that hold a delimiter"
                )
            else:
                yield _checked(row, name, reader.line_num, column)


def parquet_rows(
    source: Any,
    name: str,
    *,
    column: str,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    first: int = 1,
) -> Iterator[Record | InputError]:
    """Yield the records of a Parquet file, a path or an open one; in place of a row without a text, its error.

    ``columns`` and ``row_groups`` choose what is read, all if left out; ``first`` is the number of the first row.
    """
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(source) as file:
            kept = None if columns is None else [c for c in columns if c in file.schema_arrow.names]
            batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=kept, row_groups=row_groups)
            yield from checked_rows((r for b in batches for r in b.to_pylist()), name, column=column, first=first)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name} must be a readable Parquet file, got: {error}") from error


def column_names(path: Path) -> list[str]:
    """Return the columns of a table's first row: of Parquet, JSON Lines, and ``.csv`` or ``.tsv`` with a header.

    Raises ``InputError`` for a file that cannot be read; an empty file has none.
    """
    if path.suffix.lower() == ".parquet":
        return parquet_columns(path, str(path))
    try:
        with path.open(encoding=TEXT_ENCODING, errors="surrogateescape", newline="") as file:
            return text_columns(next(_utf8_lines(file, str(path)), ""), str(path), suffix=path.suffix.lower())
    except OSError as error:
        raise _unreadable(str(path), error) from error


def text_columns(line: str, name: str, *, suffix: str) -> list[str]:
    """Return the columns that the first line of a file of text names, by its ``suffix``."""
    _check_has_lines(name, suffix)
    if suffix not in _JSON_LINES:
        return next(csv.reader([line], delimiter="\t" if suffix == ".tsv" else ","), [])
    try:
        row = json.loads(line or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}:1 must be one JSON value, got {error}") from error
    return list(row) if isinstance(row, dict) else []


def checked_rows(rows: Iterable[Record], name: str, *, column: str, first: int = 1) -> Iterator[Record | InputError]:
    """Yield ``rows``, numbered from ``first``; in place of a row without a text, its error."""
    for number, row in enumerate(rows, start=first):
        yield _checked(row, name, number, column)


def parquet_columns(source: Any, name: str) -> list[str]:
    """Return the names of the columns of a Parquet file, a path or an open one."""
    pa, pq = _pyarrow()
    try:
        return list(pq.read_schema(source).names)
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        raise InputError(f"{name} must be a readable Parquet file, got: {error}") from error


def _checked(row: Record, name: str, number: int, column: str) -> Record | InputError:
    if column not in row:
        columns = ", ".join(map(str, row))
        return InputError(f"{name}:{number} must have the column {column!r}, got {columns}; see --column")
    text = row[column]
    if not isinstance(text, str):
        return InputError(f"{name}:{number}: {column!r} must be a text, got {type(text).__name__}")
    return row


class VectorFile(Protocol):
    """An open file of vectors."""

    def write(self, record: Record, vector: NDArray[Any]) -> None: ...

    def close(self, *, whole: bool) -> None: ...


@contextmanager
def vector_writer(path: Path, stamp: Stamp) -> Iterator[VectorFile]:
    """Yield a writer of records with their vectors to ``.jsonl``, ``.parquet`` or ``.npy`` (vectors alone), row by row.

    The vector replaces an ``embedding`` that a record has. The file takes its name when the context ends well, and
    nothing is left when it does not.
    """
    formats: dict[str, Callable[[Path, Stamp], VectorFile]] = {
        ".jsonl": _JsonlFile, ".parquet": _ParquetFile, ".npy": _NpyFile,
    }  # fmt: skip
    suffix = path.suffix.lower()
    if suffix not in formats:
        raise InputError(f"output must end in {', '.join(formats)}, got {path.name!r}")
    check_output(path)
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
    """Columns and types are known with the last row: where later rows need others, the earlier ones are rewritten."""

    def __init__(self, path: Path, stamp: Stamp) -> None:
        self._pa, self._pq = _pyarrow()
        self._path, self._stamp = path, stamp
        self._rows: list[Record] = []
        self._vectors: list[NDArray[Any]] = []
        self._writer: Any = None
        self._num_written = 0

    def write(self, record: Record, vector: NDArray[Any]) -> None:
        self._rows.append({name: value for name, value in record.items() if name != "embedding"})
        self._vectors.append(vector)
        if len(self._rows) == _PARQUET_ROWS:
            self._flush()

    def _flush(self) -> None:
        first, self._num_written = self._num_written + 1, self._num_written + len(self._rows)
        try:
            table = vector_table(self._rows, self._vectors, self._stamp, schema=_record_schema(self._rows))
            self._widen(table.schema)
            self._append(table)
        except (self._pa.ArrowException, OverflowError) as error:
            raise InputError(
                f"a column of Parquet must have one type, got in rows {first} to {self._num_written}: {error}; "
                "write .jsonl, where each value has its own"
            ) from error
        self._rows, self._vectors = [], []

    def _widen(self, schema: Any) -> None:
        """Make room for rows of ``schema``."""
        if self._writer is None:
            self._writer = self._pq.ParquetWriter(self._path, schema, compression="zstd")
            return
        wider = self._pa.unify_schemas([self._writer.schema, schema], promote_options="permissive")
        if wider == self._writer.schema:
            return
        self._writer.close()
        narrow = self._path.replace(self._path.with_suffix(".narrow.partial"))
        try:
            self._writer = self._pq.ParquetWriter(self._path, wider, compression="zstd")
            with self._pq.ParquetFile(narrow) as file:
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                    self._append(self._pa.Table.from_batches([batch]))
        finally:
            narrow.unlink()

    def _append(self, table: Any) -> None:
        like = self._writer.schema.empty_table()
        self._writer.write_table(self._pa.concat_tables([like, table], promote_options="permissive"))

    def close(self, *, whole: bool) -> None:
        if whole and (self._rows or self._writer is None):
            self._flush()
        if self._writer is not None:
            self._writer.close()


def _record_schema(records: Sequence[Record]) -> Any:
    """Return the Arrow schema of all columns that one of the records has."""
    pa, _ = _pyarrow()
    fields = []
    for name in dict.fromkeys(name for record in records for name in record):
        try:
            fields.append(pa.field(name, pa.array([record.get(name) for record in records]).type))
        except (pa.ArrowException, OverflowError) as error:
            raise pa.ArrowInvalid(f"{name}: {error}") from error
    return pa.schema(fields)


def vector_table(records: Sequence[Record], vectors: Sequence[NDArray[Any]], stamp: Stamp, *, schema: Any) -> Any:
    """Return an Arrow table of records with their vectors (M,) under ``embedding``, and the stamp in its metadata.

    ``schema`` is that of the records.
    """
    pa, _ = _pyarrow()
    table = pa.Table.from_pylist(records, schema=schema)
    flat = np.concatenate(vectors) if vectors else np.empty(0, storage_dtype(stamp["dtype"]))
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(pa.array(flat), packed_width(stamp)))
    return table.replace_schema_metadata({_STAMP_KEY: json.dumps(stamp).encode()})


def vectors_of(table: Any) -> NDArray[Any]:
    """Return the vectors (B, M) of an Arrow table that ``vector_table`` made."""
    flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat.reshape(table.num_rows, table["embedding"].type.list_size))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return ``value`` as JSON, which has no NaN and no infinity: they are null. Dates and decimals are texts."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str, indent=indent)
    except ValueError:  # looking at every value first would cost more than writing it
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, default=str, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(value: object) -> str:
    """Return a value of a record as text: true, null, lists and objects as JSON writes them, not as Python does."""
    return json_text(value) if value is None or isinstance(value, (bool, list, dict)) else str(value)


def json_line(record: Record, vector: NDArray[Any]) -> str:
    """Return a record and its vector as one line of JSON; float32 keeps the digits that bring it back exactly."""
    # Through str: tolist() of a float32 would print the digits of the nearest double.
    values = [float(str(v)) for v in vector] if vector.dtype.kind == "f" else vector.tolist()
    return json_text({**record, "embedding": values}) + "\n"


def read_vectors(path: Path) -> tuple[NDArray[Any], list[Record], Stamp]:
    """Return the vectors (B, M), their records (none for ``.npy``) and the stamp of a file that polyvec wrote."""
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, allow_pickle=False), [], _read_stamp(path)
        if path.suffix.lower() == ".parquet":
            _, pq = _pyarrow()
            table = pq.read_table(path)
            stamp = json.loads((table.schema.metadata or {}).get(_STAMP_KEY, b"{}"))
            dtype = storage_dtype(stamp.get("dtype", "float32"))
            return vectors_of(table).astype(dtype, copy=False), table.drop_columns(["embedding"]).to_pylist(), stamp
        stamp = _read_stamp(path)
        with path.open(encoding="utf-8") as file:  # splitlines() would also cut at characters of the texts
            rows = [json.loads(line) for line in file]
        vectors = [row.pop("embedding") for row in rows]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} must be a vector file written by polyvec, got {type(error).__name__}: {error}"
        ) from error
    array = np.array(vectors, dtype=storage_dtype(stamp.get("dtype", "float32")))
    return array if vectors else array.reshape(0, packed_width(stamp)), rows, stamp


def is_vector_file(path: Path) -> bool:
    """Whether ``path`` is one that polyvec wrote: it has a stamp."""
    if path.suffix.lower() == ".parquet":
        pa, pq = _pyarrow()
        try:
            return _STAMP_KEY in (pq.read_schema(path).metadata or {})
        except (pa.ArrowInvalid, OSError):
            return False
    if path.suffix.lower() == ".jsonl":
        with suppress(OSError, ValueError):  # what lies beside it may be anybody's
            return bool(_read_stamp(path))
    return path.suffix.lower() == ".npy"


def check_same_model(first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]) -> None:
    """Raise ``InputError`` unless two stamps say that the vectors compare: same weights, task, width and dtype.

    Questions and passages of retrieval compare too.
    """
    for key in ("weights", "task", "dimensions", "dtype"):
        value: Any = first.get(key)
        if second.get(key) not in (value, PARTNERS.get(value, value)):  # tasks alone have partners
            raise InputError(
                f"{names[1]} must hold vectors of the same {key} as {names[0]}, {value!r}, "
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
    stamp = json.loads(_stamp_path(path).read_text(encoding="utf-8"))
    if not isinstance(stamp, dict) or not {"weights", "dimensions", "dtype"} <= stamp.keys():
        raise ValueError(f"{_stamp_path(path).name} is no stamp")
    return stamp


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError.of("Parquet", "parquet") from error
    return pa, pq


def _not_utf8(name: str, line: int, byte: int) -> InputError:
    return InputError(f"{name}:{line} must be UTF-8 text, got byte {byte:#x}")


def _unreadable(name: str, error: OSError) -> InputError:
    return InputError(f"{name} must be a readable file, got: {error.strerror or error}")


def decode_text(data: bytes, name: str) -> str:
    """Return the bytes of a whole file as text, with line breaks of one kind."""
    try:
        text = data.decode(TEXT_ENCODING)
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        raise _not_utf8(name, line, error.object[error.start]) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
