"""What a finished job left: its manifest and its parts in order, for those who read them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polyvec.batch.formats import format_of
from polyvec.batch.run import MANIFEST
from polyvec.batch.storage import Folder
from polyvec.errors import InputError
from polyvec.files import Stamp


class Output:
    """A folder of vectors. Raises ``InputError`` for a folder that no job has finished."""

    def __init__(self, location: str) -> None:
        self.folder = Folder.of(location)
        try:
            self.manifest: dict[str, Any] = self.folder.read_json(MANIFEST)
        except (OSError, ValueError) as error:
            raise InputError(f"vectors must be a folder that polyvec embed made, got {location}: {error}") from error
        if self.manifest is None:
            raise InputError(
                f"vectors must be a folder with a {MANIFEST}, got {location}; finish it with the same polyvec embed"
            )

    @property
    def stamp(self) -> Stamp:
        """What made the vectors."""
        return dict(self.manifest["job"]["stamp"])

    def tables(self) -> Iterator[tuple[str, Any]]:
        """Yield the name and the Arrow table of each part, in the order of the input."""
        parts = format_of(self.folder)
        for receipt in self.manifest["parts"]:
            table = parts.read(self.folder, receipt)
            if table is None:
                raise InputError(f"vectors must hold {receipt['name']} whole, got {self.folder.location} without")
            yield receipt["part"], table
