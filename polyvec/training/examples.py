"""What training reads from files: each file is a dataset of one kind, which its columns say, checked row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.data.filters import overlaps
from polyvec.errors import InputError
from polyvec.files import Record, column_names, read_records

#: Kind of dataset -> columns. ``lang`` and ``source`` group a batch; ``negatives`` are hard ones of a query;
#: ``embedding`` is a teacher's vector, as ``polyvec embed`` writes it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "running text": ("text",),
    "pairs": ("query", "passage"),
    "graded": ("text_a", "text_b", "score"),
    "inference": ("premise", "hypothesis", "label"),
    "equals": ("text_a", "text_b"),
    "labelled": ("text", "label"),
    "targets": ("text", "embedding"),
}
#: Stage -> kinds that it can learn from, each by a loss of its own (arXiv 2409.10173, section 4.3).
KINDS: dict[str, tuple[str, ...]] = {
    "mlm": ("running text",),
    "distillation": ("targets",),
    "pairs": ("pairs", "equals"),
    "retrieval": ("pairs", "equals"),
    "text-matching": ("graded", "inference", "equals"),
    "classification": ("labelled",),
    "separation": ("labelled", "pairs", "equals"),
}
INFERENCE = ("entailment", "neutral", "contradiction")
_FEWEST = 8  # examples; fewer teach nothing but themselves


@dataclass(frozen=True)
class Dataset:
    """The examples of one file, all of one kind. ``left_out`` counts those that would teach nothing."""

    path: Path
    kind: str
    rows: list[Record]
    left_out: int = 0


def read_dataset(path: Path, stage: str) -> Dataset:
    """Return the examples of a file for ``stage``: of the first kind of the stage whose columns the file has.

    Stage ``pairs`` leaves out pairs that share nearly all their words (``overlaps``). Raises ``InputError`` naming
    file, example and rule.
    """
    kind = _kind_of(path, stage)
    columns = COLUMNS[kind]
    rows = read_examples(path, columns, stage)
    kept = [row for row in rows if not overlaps(row[columns[0]], row[columns[1]])] if stage == "pairs" else rows
    if not kept:
        raise InputError(
            f"{path} must hold pairs that share less than 80 % of their words, got none in {len(rows)} examples; a "
            "passage that repeats its query teaches to compare letters"
        )
    return Dataset(path, kind, kept, left_out=len(rows) - len(kept))


def read_examples(path: Path, columns: tuple[str, ...], purpose: str) -> list[Record]:
    """Return the rows of ``path``, each with ``columns``. Raises ``InputError`` naming file, example and rule.

    Where labels or grades are read, they must differ: a file of one class teaches nothing.
    """
    rows = [
        _checked(row, columns, f"{path}: example {number}", purpose)
        for number, row in enumerate(read_records(path, column=columns[0]), start=1)
    ]
    if len(rows) < _FEWEST:
        raise InputError(f"{path} must hold at least {_FEWEST} examples, got {len(rows)}; add more")
    for column in {"score", "label"} & set(columns):
        if len({row[column] for row in rows}) == 1:
            raise InputError(f"{path}: {column} must differ between examples, got {rows[0][column]!r} in all of them")
    if "embedding" in columns and len(widths := {len(row["embedding"]) for row in rows}) > 1:
        raise InputError(f"{path}: embedding must be of one teacher, got vectors of {sorted(widths)} numbers")
    return rows


def _kind_of(path: Path, stage: str) -> str:
    kinds = KINDS[stage]
    if len(kinds) == 1 or not path.suffix:
        return kinds[0]  # whose columns the rows are checked for
    names = set(column_names(path))
    for kind in kinds:
        if names.issuperset(COLUMNS[kind]):
            return kind
    wanted = "; or ".join(", ".join(COLUMNS[kind]) for kind in kinds)
    raise InputError(
        f"{path}: example 1 must have the columns {wanted} for {stage}, got {', '.join(sorted(names)) or 'none'}"
    )


def _checked(row: Record, columns: tuple[str, ...], where: str, purpose: str) -> Record:
    for column in columns[1:]:
        if row.get(column) is None:
            raise InputError(
                f"{where} must have the columns {', '.join(columns)} for {purpose}, got {', '.join(map(str, row))}"
            )
        if column not in ("score", "label", "quality", "embedding") and not isinstance(row[column], str):
            raise InputError(f"{where}: {column!r} must be a text, got {type(row[column]).__name__}")
    negatives = row.get("negatives")
    if negatives is not None and not (isinstance(negatives, list) and all(isinstance(n, str) for n in negatives)):
        raise InputError(f"{where}: 'negatives' must be a list of texts, got {negatives!r:.60}")
    if columns == COLUMNS["inference"] and row["label"] not in INFERENCE:
        raise InputError(f"{where}: 'label' must be one of {', '.join(INFERENCE)}, got {row['label']!r}")
    checks: dict[str, Callable[[Any, str], Any]] = {"score": _score, "embedding": _unit_vector}
    return {**row, **{column: checks[column](row[column], where) for column in checks.keys() & set(columns)}}


def _score(value: Any, where: str) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{where}: 'score' must be a finite number, got {value!r}")
    return score


def _unit_vector(value: Any, where: str) -> NDArray[np.float32]:
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        vector = np.zeros(0, np.float32)
    norm = float(np.linalg.norm(vector))
    if vector.ndim != 1 or not 0 < norm < math.inf:
        raise InputError(f"{where}: 'embedding' must be a list of finite numbers, not all 0, got {value!r:.60}")
    return vector / np.float32(norm)
