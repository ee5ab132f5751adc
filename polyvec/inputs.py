"""The files of an input, by path, folder, glob or URL, and the records in them: what jobs and training read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import IO, Any

from polyvec.errors import InputError, MissingExtraError
from polyvec.files import (
    CSV_SUFFIXES,
    TABLE_SUFFIXES,
    TEXT_ENCODING,
    TEXT_SUFFIXES,
    Record,
    checked_rows,
    parquet_columns,
    parquet_rows,
    text_columns,
    text_rows,
)

LANCE = ".lance"  # a folder of this name is a dataset in that format
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def is_url(location: str) -> bool:
    return "://" in location


def filesystem(location: str) -> tuple[Any, str]:
    """Return the Arrow file system of a path or URL, and the path in it: Arrow's own, or else one of fsspec."""
    try:
        from pyarrow import ArrowInvalid, fs
    except ImportError as error:
        raise MissingExtraError.of("reading a folder or URL", "parquet") from error
    if not is_url(location):
        return fs.LocalFileSystem(), str(Path(location).absolute())
    try:
        found, path = fs.FileSystem.from_uri(location)
        return found, path
    except (ArrowInvalid, NotImplementedError) as arrow_error:
        try:
            import fsspec

            found, path = fsspec.core.url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise InputError(f"{location} must be a URL of a known kind, got: {arrow_error}; {error}") from error
        return fs.PyFileSystem(fs.FSSpecHandler(found)), path
    except OSError as error:
        raise InputError(f"{location} must be reachable, got: {error}") from error


@dataclass(frozen=True)
class InputFile:
    """A file of an input. ``name`` is its path below what all files of the input share, for ids and messages."""

    path: str
    name: str
    size_bytes: int
    modified_ns: int | None = None  # since 1970; not every file system says it

    @property
    def suffix(self) -> str:
        """What tells the format, without the compression."""
        path = Path(self.path)
        return (Path(path.stem) if path.suffix.lower() in _COMPRESSED else path).suffix.lower()

    def open_text(self, fs: Any, *, newline: str | None) -> IO[str]:
        """Return the file as text; a byte that is not UTF-8 becomes a lone surrogate, which the row's check finds."""
        import io

        stream = fs.open_input_stream(self.path, compression=_COMPRESSED.get(Path(self.path).suffix.lower()))
        return io.TextIOWrapper(stream, encoding=TEXT_ENCODING, errors="surrogateescape", newline=newline)


def input_files(source: str, left_out: list[str] | None = None) -> list[InputFile]:
    """Return the files of a path, folder, glob or URL, in order of name.

    In a folder or glob, files and folders whose names begin with a dot or ``_`` are left out, as Arrow and Spark do;
    those with ``_`` are added to ``left_out``. Raises ``InputError`` where there is none that polyvec reads.
    """
    from pyarrow.fs import FileType

    if source == "-":
        raise InputError("input of a job must be a file, folder, glob or URL, got stdin, which cannot be read again")
    fs, path = filesystem(source)
    try:
        info = fs.get_file_info(path)
        if info.type == FileType.Unknown:
            raise InputError(
                f"input must be a file, folder, glob or URL, got {source}, a pipe, which cannot be read again"
            )
        if info.type == FileType.File:
            return [InputFile(path, path.rsplit("/", 1)[-1], info.size, info.mtime_ns)]
        if info.type == FileType.Directory and path.rstrip("/").endswith(LANCE):
            return [InputFile(source.rstrip("/"), path.rstrip("/").rsplit("/", 1)[-1], 0, info.mtime_ns)]
        if info.type == FileType.Directory:
            found = list(_below(fs, path, re.compile(".*", re.DOTALL), left_out))
        elif any(c in path for c in "*?["):
            base = re.split(r"[*?\[]", path)[0].rsplit("/", 1)[0]
            # Of fnmatch, whose star crosses folders; ** reads as *.
            found = list(_below(fs, base, re.compile(translate(path[len(base) + 1 :].replace("**", "*"))), left_out))
        else:
            raise InputError(f"input must be a file, folder, glob or URL, got {source}, which is not there")
    except OSError as error:
        raise InputError(f"input must be readable, got {source}: {error}") from error
    except UnicodeDecodeError as error:  # pyarrow has no name for such a file
        raise InputError(f"input must hold files with names in UTF-8, got others in {source}; rename them") from error
    if not found:
        raise InputError(f"input must hold files ending in {', '.join(_SUFFIXES)} (.gz, .zst), got none in {source}")
    return sorted(found, key=lambda file: file.name)


_SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)


def _below(fs: Any, base: str, pattern: re.Pattern[str], left_out: list[str] | None) -> Iterator[InputFile]:
    from pyarrow.fs import FileSelector, FileType

    for info in fs.get_file_info(FileSelector(base, recursive=True, allow_not_found=True)):
        name = info.path[len(base) :].lstrip("/")
        file = InputFile(info.path, name, info.size or 0, info.mtime_ns)
        parts = name.split("/")
        if info.type != FileType.File or file.suffix not in _SUFFIXES or not pattern.fullmatch(name):
            continue
        if not any(part.startswith((".", "_")) for part in parts):
            yield file
        elif left_out is not None and not any(part.startswith(".") for part in parts):
            left_out.append(name)


def input_columns(fs: Any, file: InputFile) -> list[str]:
    """Return the columns of a table's first row; an empty file of text has none."""
    try:
        if file.suffix == ".parquet":
            with fs.open_input_file(file.path) as opened:
                return parquet_columns(opened, file.name)
        if file.suffix == LANCE:
            return list(_lance_dataset(file).schema.names)
        with file.open_text(fs, newline="") as text:
            return text_columns(text.readline(), file.name, suffix=file.suffix)
    except (OSError, EOFError) as error:
        raise InputError(f"{file.name} must be readable, got: {error}") from error


def input_state(source: str) -> str:
    """Return what tells a source from its later self: names, sizes and dates of its files, the versions of Lance."""
    files = input_files(source)
    return repr((files, [_lance_dataset(file).version for file in files if file.suffix == LANCE]))


def read_input(source: str, *, column: str) -> Iterator[tuple[str, Record]]:
    """Yield where it is, in words, and each record of every file of ``source``, with a text under ``column``.

    Raises ``InputError`` naming file and row for what cannot be read or has no such column.
    """
    fs, _ = filesystem(source)
    files = input_files(source)
    for file in files:
        name = source if len(files) == 1 else f"{source}: {file.name}"
        for number, record in enumerate(input_records(fs, file, column=column), start=1):
            if isinstance(record, InputError):
                raise record
            yield f"{name}: example {number}", record


def input_records(
    fs: Any,
    file: InputFile,
    *,
    column: str,
    columns: Sequence[str] | None = None,
    row_groups: Sequence[int] | None = None,
    first: int = 1,
) -> Iterator[Record | InputError]:
    """Yield the records of a file; in place of a row without a text under ``column``, its error.

    Formats that have columns read ``columns`` alone, all if left out; ``row_groups`` are those of Parquet, ``first``
    the number of the first row. Raises ``InputError`` for a file that cannot be read to its end.
    """
    try:
        if file.suffix == ".parquet":
            with fs.open_input_file(file.path) as opened:
                yield from parquet_rows(
                    opened, file.name, column=column, columns=columns, row_groups=row_groups, first=first
                )
        elif file.suffix == LANCE:
            yield from _lance_rows(file, column, columns)
        else:
            with file.open_text(fs, newline="" if file.suffix in CSV_SUFFIXES else None) as text:
                yield from text_rows(text, file.name, suffix=file.suffix, column=column)
    except (OSError, EOFError) as error:
        raise InputError(f"{file.name} must be readable to its end, got: {error}") from error


def _lance_rows(file: InputFile, column: str, columns: Sequence[str] | None) -> Iterator[Record | InputError]:
    dataset = _lance_dataset(file)
    kept = None if columns is None else [name for name in columns if name in dataset.schema.names]
    rows = (row for batch in dataset.to_batches(columns=kept) for row in batch.to_pylist())
    yield from checked_rows(rows, file.name, column=column)


def _lance_dataset(file: InputFile) -> Any:
    try:
        import lance
    except ImportError as error:
        raise MissingExtraError.of("Lance", "lance") from error
    try:
        return lance.dataset(file.path)
    except (ValueError, OSError) as error:
        raise InputError(f"{file.name} must be a readable Lance dataset, got: {error}") from error
