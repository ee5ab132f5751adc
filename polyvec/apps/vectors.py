"""The output of a job of embedding as passages of a database: no text is embedded again."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from polyvec.apps.index import Index
from polyvec.batch.output import Output
from polyvec.errors import InputError
from polyvec.files import as_text, vectors_of
from polyvec.inference.quantize import as_unit
from polyvec.search.store import Passage

_TASK = "retrieval.passage"


def add_vectors(index: Index, output: Output, *, column: str = "text") -> tuple[int, int]:
    """Add the rows of a job's output to a database, part by part, and return how many passages came and ids went.

    ``column`` is the text, which the job must have kept. A row's id is its source. Parts that are there already are
    left out; one that a changed input made anew replaces its ids, and ids that the folder has no longer go. Raises
    ``InputError`` for vectors of another model, task or width, or of few bits, and for an id that the database has from
    another folder or part.
    """
    _check(index, output, column)
    folder = os.path.normpath(output.folder.path)
    parts = {f"{folder} {receipt['part']}" for receipt in output.manifest["parts"]}
    is_chunked = output.manifest["job"]["late_chunking"] is not None
    known = index.store.sources()  # the digest of an id is its folder and part
    gone = {i for i, digest in known.items() if digest.rpartition(" ")[0] == folder}
    count = 0
    for name, table in output.tables():
        ids = dict.fromkeys(map(str, table["id"].to_pylist()), f"{folder} {name}")
        gone -= ids.keys()
        if all(known.get(i, "").rpartition(" ")[2] == name for i in ids):
            continue
        for i in ids:
            if known.get(i, ids[i]) == ids[i]:  # new, or from before the same part was made again with a row more
                continue
            if known[i] in parts or known[i].rpartition(" ")[0] != folder:
                raise InputError(
                    f"ids of vectors must tell all rows of a database apart, got {i!r} in {folder} {name} and in "
                    f"{known[i]}; embed with --id and a column without repeats, or index into another database"
                )
        vectors = as_unit(vectors_of(table), output.stamp["dtype"])
        rows = table.drop_columns(["embedding"]).to_pylist()
        passages = [_passage(row, column, is_chunked=is_chunked) for row in rows]
        index.store.write(passages, np.asarray(vectors), ids)
        known |= ids
        count += len(passages)
    index.store.remove(gone)
    index.store.optimize()
    return count, len(gone)


def _check(index: Index, output: Output, column: str) -> None:
    stamp, store = output.stamp, index.store.stamp
    # First what another database does not mend.
    if stamp["dtype"] not in ("float32", "float16"):
        raise InputError(f"vectors must be float32 or float16 to be searched, got {stamp['dtype']}; see --dtype")
    if column not in output.manifest["job"]["keep"]:
        raise InputError(f"vectors must keep their texts under {column!r}, got none; embed with --keep {column}")
    found = (stamp["weights"], stamp["task"], stamp["dimensions"])
    wanted = (store["weights"], _TASK, store["dimensions"])
    options = ("model", "task", "dimensions")
    for what, option, got, need in zip(("weights", "task", "dimensions"), options, found, wanted, strict=True):
        if got != need:
            other = f", or index into a new database with --dimensions {got}" if what == "dimensions" else ""
            raise InputError(
                f"vectors must have the {what} of the database, {need}, got {got}; embed again with --{option}{other}"
            )


def _passage(row: dict[str, Any], column: str, *, is_chunked: bool) -> Passage:
    text = row[column]
    start, end = (row["start"], row["end"]) if is_chunked else (0, len(text))
    own = ("id", column, "num_tokens", "truncated", *(("chunk", "start", "end") if is_chunked else ()))
    rest = {key: as_text(value) for key, value in row.items() if key not in own and value is not None}
    line = 1 + text.count("\n", 0, start)
    return Passage(
        source=str(row["id"]), start=start, end=end, text=text[start:end], line=line, page=None, heading=None,
        metadata=rest or None,
    )  # fmt: skip
