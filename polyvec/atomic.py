"""Files that appear whole under their name or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polyvec.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, which takes its name when the context ends well.

    When it does not, what was written is removed and an earlier file of that name stays. Content and name are on the
    disk when the context has ended: a machine that loses power has the one file or the other.
    """
    partial = path.with_name(f".{path.name}.partial")  # in the same folder: a rename across disks is no rename
    try:
        yield partial
        _sync(partial, os.O_RDWR)
        os.replace(partial, path)
        with suppress(OSError):  # not every system opens a folder
            _sync(path.parent, os.O_RDONLY)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path) -> None:
    """Raise ``InputError`` unless ``path`` can be a file's name: to be called before the work that the file is for."""
    if not path.parent.is_dir():
        raise InputError(f"output folder must exist, got {path.parent}; create it first")
    if path.is_dir():
        raise InputError(f"output must be a file, got the folder {path}; choose another name")


def check_new_folder(folder: Path, *, besides: str = "") -> None:
    """Raise ``InputError`` unless ``folder`` is still to be made or is empty: a model is never written over another.

    What a ``whole_file`` left that was killed is nothing, and so are files whose names match ``besides``.
    """
    if folder.exists() and (
        not folder.is_dir()
        or any(not (path.match(".*.partial") or (besides and path.match(besides))) for path in folder.iterdir())
    ):
        raise InputError(f"output must be a new or empty folder, got {folder}; choose another")


def write_json(values: Any, path: Path) -> None:
    """Write ``values`` as indented UTF-8 JSON."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
