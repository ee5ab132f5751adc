"""The output of a job of embedding as passages of a database: no text is embedded again."""

from __future__ import annotations

from typing import Any

import numpy as np

from polyvec.apps.index import Index
from polyvec.batch.output import Output
from polyvec.errors import InputError
from polyvec.files import vectors_of
from polyvec.inference.quantize import as_unit
from polyvec.search.store import Passage

_TASK = "retrieval.passage"


def add_vectors(index: Index, location: str, *, column: str = "text") -> int:
    """Add the rows of a job's output to a database, part by part, and return how many were new.

    ``column`` is the text, which the job must have kept. A row's id is its source. Parts that are there already are
    left out. Raises ``InputError`` for vectors of another model, task or width, or of few bits.
    """
    output = Output(location)
    _check(index, output, column)
    known = set(index.store.sources().values())
    count = 0
    for name, table in output.tables():
        if name in known or not table.num_rows:
            continue
        vectors = as_unit(vectors_of(table), output.stamp["dtype"])
        passages = [_passage(row, column) for row in table.drop_columns(["embedding"]).to_pylist()]
        index.store.write(passages, np.asarray(vectors), {passage.source: name for passage in passages})
        count += len(passages)
    index.store.optimize()
    return count


def _check(index: Index, output: Output, column: str) -> None:
    stamp, store = output.stamp, index.store.stamp
    found = (stamp["weights"], stamp["task"], stamp["dimensions"])
    wanted = (store["weights"], _TASK, store["dimensions"])
    for what, got, need in zip(("weights", "task", "dimensions"), found, wanted, strict=True):
        if got != need:
            raise InputError(
                f"vectors must have the {what} of the database, {need}, got {got}; embed again with --{what}"
            )
    if stamp["dtype"] not in ("float32", "float16"):
        raise InputError(f"vectors must be float32 or float16 to be searched, got {stamp['dtype']}; see --dtype")
    if column not in output.manifest["job"]["keep"]:
        raise InputError(f"vectors must keep their texts under {column!r}, got none; embed with --keep {column}")


def _passage(row: dict[str, Any], column: str) -> Passage:
    start = row.get("start") or 0
    text = row[column]
    end = row["end"] if row.get("end") is not None else len(text)
    own = ("id", column, "num_tokens", "truncated", "chunk", "start", "end")
    rest = {key: str(value) for key, value in row.items() if key not in own and value is not None}
    line = 1 + text.count("\n", 0, start)
    return Passage(
        source=str(row["id"]), start=start, end=end, text=text[start:end], line=line, page=None, heading=None,
        metadata=rest or None,
    )  # fmt: skip
