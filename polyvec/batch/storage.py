"""A folder, local or by URL, whose files appear whole; the files of an input, by path, folder, glob or URL."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path
from typing import IO, Any

from polyvec.errors import InputError, MissingExtraError
from polyvec.files import TABLE_SUFFIXES, TEXT_SUFFIXES

WORK = "_work"  # names that begin with _ are no data to Spark, DuckDB, Arrow and Hive
LANCE = ".lance"  # a folder of this name is a dataset in that format
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def is_url(location: str) -> bool:
    return "://" in location


def filesystem(location: str) -> tuple[Any, str]:
    """Return the Arrow file system of a path or URL, and the path in it: Arrow's own, or else one of fsspec."""
    try:
        from pyarrow import ArrowInvalid, fs
    except ImportError as error:
        raise MissingExtraError.of("embedding into a folder", "parquet") from error
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
class Folder:
    """Files under one path of a file system. Small enough to be held in memory, each appears whole or not at all."""

    fs: Any
    path: str
    location: str

    @classmethod
    def of(cls, location: str) -> Folder:
        return cls(*filesystem(location), location)

    @property
    def address(self) -> str:
        """What names the folder to other libraries, wherever they run."""
        return self.path if self._is_local else self.location

    @property
    def _is_local(self) -> bool:
        return bool(self.fs.type_name == "local")

    def sizes(self, under: str = "") -> dict[str, int]:
        """Return the size in bytes of every file right under the folder, or a folder in it, by name."""
        from pyarrow.fs import FileSelector, FileType

        selector = FileSelector(self._at(under), allow_not_found=True)
        return {i.base_name: i.size for i in self.fs.get_file_info(selector) if i.type == FileType.File}

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, or None where there is none."""
        try:
            with self.fs.open_input_stream(self._at(name), compression=None) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> Any:
        """Return the value in a file of JSON, or None where there is none."""
        data = self.read(name)
        return None if data is None else json.loads(data)

    def write(self, name: str, data: bytes) -> None:
        """Make ``data`` the content of a file: put whole on object storage, elsewhere written aside and renamed."""
        target = self._at(name)
        if self._is_local:
            aside = self._at(f"{WORK}/{uuid.uuid4().hex}.partial")  # two writers of one name never meet
            for folder in (aside, target):
                self.fs.create_dir(folder.rsplit("/", 1)[0])
            self._put(aside, data)
            self.fs.move(aside, target)
        else:
            self._put(target, data)

    def write_json(self, name: str, values: Any) -> None:
        self.write(name, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        from pyarrow.fs import FileType

        kind = self.fs.get_file_info(self._at(name)).type
        if kind == FileType.Directory:
            self.fs.delete_dir(self._at(name))
        elif kind == FileType.File:
            self.fs.delete_file(self._at(name))

    def _put(self, path: str, data: bytes) -> None:
        with self.fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}".rstrip("/")


@dataclass(frozen=True)
class InputFile:
    """A file of an input. ``name`` is its path below what all files of the input share, for ids and messages."""

    path: str
    name: str
    size_bytes: int

    @property
    def suffix(self) -> str:
        """What tells the format, without the compression."""
        path = Path(self.path)
        return (Path(path.stem) if path.suffix in _COMPRESSED else path).suffix.lower()

    def open_text(self, fs: Any, *, newline: str | None) -> IO[str]:
        """Return the file as text; a byte that is not UTF-8 becomes a lone surrogate, which the row's check finds."""
        import io

        stream = fs.open_input_stream(self.path, compression=_COMPRESSED.get(Path(self.path).suffix))
        return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline=newline)


def input_files(source: str) -> list[InputFile]:
    """Return the files of a path, folder, glob or URL, in order of name; hidden ones are left out.

    Raises ``InputError`` where there is none that polyvec reads.
    """
    from pyarrow.fs import FileType

    fs, path = filesystem(source)
    try:
        info = fs.get_file_info(path)
        if info.type == FileType.File:
            return [InputFile(path, path.rsplit("/", 1)[-1], info.size)]
        if info.type == FileType.Directory and path.rstrip("/").endswith(LANCE):
            return [InputFile(source.rstrip("/"), path.rstrip("/").rsplit("/", 1)[-1], 0)]
        if info.type == FileType.Directory:
            found = list(_below(fs, path, re.compile(".*", re.DOTALL)))
        elif any(c in path for c in "*?["):
            base = re.split(r"[*?\[]", path)[0].rsplit("/", 1)[0]
            # Of fnmatch, whose star crosses folders; ** reads as *.
            found = list(_below(fs, base, re.compile(translate(path[len(base) + 1 :].replace("**", "*")))))
        else:
            raise InputError(f"input must be a file, folder, glob or URL, got {source}, which is not there")
    except OSError as error:
        raise InputError(f"input must be readable, got {source}: {error}") from error
    if not found:
        raise InputError(f"input must hold files ending in {', '.join(_SUFFIXES)} (.gz, .zst), got none in {source}")
    return sorted(found, key=lambda file: file.name)


_SUFFIXES = (*TEXT_SUFFIXES, *TABLE_SUFFIXES)


def _below(fs: Any, base: str, pattern: re.Pattern[str]) -> Iterator[InputFile]:
    from pyarrow.fs import FileSelector, FileType

    for info in fs.get_file_info(FileSelector(base, recursive=True, allow_not_found=True)):
        name = info.path[len(base) :].lstrip("/")
        file = InputFile(info.path, name, info.size or 0)
        is_hidden = any(part.startswith((".", "_")) for part in name.split("/"))
        if info.type == FileType.File and not is_hidden and file.suffix in _SUFFIXES and pattern.fullmatch(name):
            yield file
