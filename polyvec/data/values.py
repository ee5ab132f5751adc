"""Values of a row of examples as files hold them: numbers, what says nothing, and the group that a row belongs to."""

from __future__ import annotations

import math
from typing import Any

from polyvec.errors import InputError
from polyvec.files import Record, as_text


def as_number(value: Any) -> float:
    """Return a value, which a CSV file holds as text, as a number; NaN for what is none, or too large for one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def finite_number(value: Any, column: str, where: str) -> float:
    """Return a value of ``column`` as a number. Raises ``InputError`` for what is none, naming the row by ``where``."""
    number = as_number(value)
    if not math.isfinite(number):
        raise InputError(f"{where}: {column!r} must be a finite number, got {value!r:.60}")
    return number


def is_blank(value: Any) -> bool:
    """Whether ``value`` says nothing; NaN is how data frames write a blank cell, and would be a class."""
    return not as_text(value).strip() or (isinstance(value, float) and math.isnan(value))


def group_of(row: Record) -> str:
    """Return the language of a row, or its source where it names none; empty without either."""
    return str(row.get("lang") or row.get("source") or "")
