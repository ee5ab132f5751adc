"""How parts lie in an output: a file of Parquet each, or a fragment each of one Lance dataset.

Either way a part is written by the worker that made it and counts by its receipt. A Lance dataset is committed when all
parts are there, so readers see a whole job or the one before it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

from polyvec.batch.parts import table_bytes
from polyvec.batch.storage import Folder
from polyvec.errors import InputError, MissingExtraError
from polyvec.inputs import LANCE

#: What a finished part says of itself: ``part``, ``name`` of its file, ``bytes``, ``rows``, ``rejects`` and more.
Receipt = dict[str, Any]


class Format(Protocol):
    """The parts of an output folder."""

    def sizes(self, folder: Folder) -> dict[str, int]:
        """Return the size in bytes of the file of every part that is there, by its name."""
        ...

    def write(self, folder: Folder, part: str, table: Any) -> Receipt:
        """Write a part whole and return ``name`` and ``bytes`` of its file and what the other methods need."""
        ...

    def read(self, folder: Folder, receipt: Receipt) -> Any:
        """Return the table of a part, None where its file is not whole."""
        ...

    def commit(self, folder: Folder, receipts: Sequence[Receipt], schema: Any) -> None:
        """Make these parts, in this order, what readers see; the manifest comes after."""
        ...

    def clean(self, folder: Folder, receipts: Sequence[Receipt]) -> None:
        """Remove every other part."""
        ...


def format_of(folder: Folder) -> Format:
    """Return the format of an output, which its name tells: ``vectors.lance`` is a Lance dataset."""
    return Lance() if folder.path.rstrip("/").endswith(LANCE) else Parquet()


class Parquet:
    """``part-DIGEST.parquet``: the same bytes for the same rows."""

    def sizes(self, folder: Folder) -> dict[str, int]:
        return {name: size for name, size in folder.sizes().items() if name.startswith("part-")}

    def write(self, folder: Folder, part: str, table: Any) -> Receipt:
        name, data = f"{part}.parquet", table_bytes(table)
        folder.write(name, data)
        return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def read(self, folder: Folder, receipt: Receipt) -> Any:
        import pyarrow.parquet as pq

        data = folder.read(receipt["name"])
        return pq.read_table(io.BytesIO(data)) if data is not None and len(data) == receipt["bytes"] else None

    def commit(self, folder: Folder, receipts: Sequence[Receipt], schema: Any) -> None:
        pass  # a part is seen as soon as it is there

    def clean(self, folder: Folder, receipts: Sequence[Receipt]) -> None:
        for name in self.sizes(folder).keys() - {receipt["name"] for receipt in receipts}:
            folder.remove(name)


class Lance:
    """``data/ID.lance``, fragments of the dataset that the folder is."""

    def __init__(self) -> None:
        os.environ.setdefault("LANCE_LOG", "error")  # it warns of a dataset that is not there yet
        try:
            import lance
        except ImportError as error:
            raise MissingExtraError.of("output in Lance", "lance") from error
        self._lance = lance
        self._fragments: dict[str, Any] = {}  # of the dataset that was read, by the name of their file

    def sizes(self, folder: Folder) -> dict[str, int]:
        return {f"data/{name}": size for name, size in folder.sizes("data").items()}

    def write(self, folder: Folder, part: str, table: Any) -> Receipt:
        if not table.num_rows:  # Lance has no empty fragments: the manifest is the file of a part without rows
            return {"name": None, "bytes": None}
        try:
            # "overwrite" looks at no earlier version; the commit alone decides what the dataset holds.
            fragments = self._lance.fragment.write_fragments(
                table, folder.address, mode="overwrite", max_rows_per_file=table.num_rows
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(f"Lance said: {error}") from error
        (fragment,) = (one.to_json() for one in fragments)
        (file,) = fragment["files"]
        return {"name": f"data/{file['path']}", "bytes": file["file_size_bytes"], "fragment": fragment}

    def read(self, folder: Folder, receipt: Receipt) -> Any:
        try:
            dataset = self._lance.dataset(folder.address)
        except ValueError:  # before the first commit there is none
            return None
        if receipt["name"] is None:
            return dataset.schema.empty_table()
        if not self._fragments:
            self._fragments = {f"data/{f.data_files()[0].path}": f for f in dataset.get_fragments()}
        fragment = self._fragments.get(receipt["name"])
        return None if fragment is None else fragment.to_table()

    def commit(self, folder: Folder, receipts: Sequence[Receipt], schema: Any) -> None:
        named = [receipt["fragment"] for receipt in receipts if receipt["name"] is not None]
        if not named:
            raise InputError(f"{folder.location} must get a row at least, got none; Lance has no empty datasets")
        fragments = [self._lance.FragmentMetadata.from_json(json.dumps(fragment)) for fragment in named]
        operation = self._lance.LanceOperation.Overwrite(schema, fragments)
        self._lance.LanceDataset.commit(folder.address, operation)

    def clean(self, folder: Folder, receipts: Sequence[Receipt]) -> None:
        dataset = self._lance.dataset(folder.address)
        # Unverified are the fragments that no version names: those of a worker that died before its receipt.
        dataset.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)
