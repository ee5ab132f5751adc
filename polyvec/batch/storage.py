"""A folder, local or by URL, whose files appear whole."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from polyvec.inputs import filesystem

WORK = "_work"  # names that begin with _ are no data to Spark, DuckDB, Arrow and Hive


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
            try:
                self._put(aside, data)
                self.fs.move(aside, target)
            except OSError:  # of a full disk, which half a file at every try would keep full
                with suppress(OSError):
                    self.fs.delete_file(aside)
                raise
        else:
            self._put(target, data)

    def write_json(self, name: str, values: Any) -> None:
        self.write(name, (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())

    def remove(self, name: str) -> None:
        """Remove a file or folder, if it is there."""
        from pyarrow.fs import FileType

        kind = self.fs.get_file_info(self._at(name)).type
        with suppress(FileNotFoundError):  # another job of the folder removes it too
            if kind == FileType.Directory:
                self.fs.delete_dir(self._at(name))
            elif kind == FileType.File:
                self.fs.delete_file(self._at(name))

    def _put(self, path: str, data: bytes) -> None:
        with self.fs.open_output_stream(path, compression=None) as stream:
            stream.write(data)

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}".rstrip("/")
