"""What each kind of training reads from a file of examples, checked row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyvec.errors import InputError
from polyvec.files import Record, read_records

#: Stage or kind of adapter -> columns. ``lang`` and ``source`` group a batch; ``negatives`` are hard ones of a query.
COLUMNS: dict[str, tuple[str, ...]] = {
    "mlm": ("text",),
    "pairs": ("query", "passage"),
    "retrieval": ("query", "passage"),
    "text-matching": ("text_a", "text_b", "score"),
    "classification": ("text", "label"),
    "separation": ("text", "label"),
}
_FEWEST = 8  # examples; fewer teach nothing but themselves


def read_examples(path: Path, columns: Sequence[str], stage: str) -> list[Record]:
    """Return the rows of ``path``, each with ``columns``. Raises ``InputError`` naming file, example and rule.

    Where labels or grades are read, they must differ: a file of one class teaches nothing.
    """
    rows = []
    for number, row in enumerate(read_records(path, column=columns[0]), start=1):
        for column in columns[1:]:
            if row.get(column) is None:
                raise InputError(
                    f"{path}: example {number} must have the columns {', '.join(columns)} for {stage}, "
                    f"got {', '.join(map(str, row))}"
                )
            if column.startswith(("text", "passage")) and not isinstance(row[column], str):
                raise InputError(
                    f"{path}: example {number}: {column!r} must be a text, got {type(row[column]).__name__}"
                )
        negatives = row.get("negatives")
        if negatives is not None and not (isinstance(negatives, list) and all(isinstance(n, str) for n in negatives)):
            raise InputError(f"{path}: example {number}: 'negatives' must be a list of texts, got {negatives!r:.60}")
        rows.append({**row, "score": _score(row["score"], path, number)} if "score" in columns else row)
    if len(rows) < _FEWEST:
        raise InputError(f"{path} must hold at least {_FEWEST} examples, got {len(rows)}; add more")
    for column in {"score", "label"} & set(columns):
        if len({row[column] for row in rows}) == 1:
            raise InputError(f"{path}: {column} must differ between examples, got {rows[0][column]!r} in all of them")
    return rows


def _score(value: Any, path: Path, number: int) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{path}: example {number}: 'score' must be a finite number, got {value!r}")
    return score
