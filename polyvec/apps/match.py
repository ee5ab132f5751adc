"""Pairs of texts that say the same, block by block: memory never holds all pairs.

Shape letters: A and B rows of the two sides, M width, P labelled pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError

Vectors = NDArray[np.float32]

#: A cosine, the row of the first side, the row of the second.
Pair = tuple[float, int, int]

_BLOCK = 2048  # rows of each side that meet at once: 16 MB of cosines


def best_partners(first: Vectors, second: Vectors, *, top: int) -> Iterator[Pair]:
    """Yield, for each row of ``first`` (A, M) in order, its ``top`` rows of ``second`` (B, M), best first.

    Rows have unit length. Of equal cosines the earlier row comes first. Raises ``InputError`` for rows of whole
    numbers.
    """
    _check_rows(first, second)
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    for start in range(0, len(first), _BLOCK):
        rows = first[start : start + _BLOCK]
        cosines = np.empty((len(rows), 0), np.float32)
        partners = np.empty((len(rows), 0), np.int64)
        for begin in range(0, len(second), _BLOCK):
            block = rows @ second[begin : begin + _BLOCK].T
            cosines = np.concatenate((cosines, block), axis=1)
            numbers = np.arange(begin, begin + block.shape[1])
            partners = np.concatenate((partners, np.broadcast_to(numbers, block.shape)), axis=1)
            kept = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
            cosines, partners = np.take_along_axis(cosines, kept, 1), np.take_along_axis(partners, kept, 1)
        for i in range(len(rows)):
            for cosine, j in zip(cosines[i], partners[i], strict=True):
                yield float(cosine), start + i, int(j)


def near_pairs(first: Vectors, second: Vectors | None = None, *, threshold: float) -> Iterator[Pair]:
    """Yield every pair of a row of ``first`` (A, M) and one of ``second`` (B, M) with a cosine from ``threshold`` on.

    Without ``second``, pairs of two different rows of ``first``, each pair once. Rows have unit length. Raises
    ``InputError`` for rows of whole numbers.
    """
    if not -1 <= threshold <= 1:
        raise InputError(f"threshold must be a cosine between -1 and 1, got {threshold}")
    others = first if second is None else second
    _check_rows(first, others)
    for start in range(0, len(first), _BLOCK):
        for begin in range(start if second is None else 0, len(others), _BLOCK):
            cosines = first[start : start + _BLOCK] @ others[begin : begin + _BLOCK].T
            for i, j in np.argwhere(cosines >= threshold):
                if second is not None or start + i < begin + j:
                    yield float(cosines[i, j]), start + int(i), begin + int(j)


def _check_rows(first: Vectors, second: Vectors) -> None:
    """Raise ``InputError`` unless both are rows of floats of one width: products of 8 bits overflow without a word."""
    sides = (first, second)
    is_float = all(np.issubdtype(side.dtype, np.floating) and side.ndim == 2 for side in sides)
    if not is_float or first.shape[1] != second.shape[1]:
        got = " and ".join(f"{side.dtype} {side.shape}" for side in sides)
        raise InputError(
            f"vectors must be rows of floats of one width, got {got}; "
            "those of dtype int8 or of bits go through polyvec.inference.quantize.as_unit first"
        )


def threshold_for(cosines: Vectors, is_match: NDArray[np.bool_], *, precision: float) -> float:
    """Return the lowest threshold from which on ``precision`` of the labelled pairs (P,) are matches.

    Raises ``InputError`` where no threshold reaches it.
    """
    if not 0 < precision <= 1:
        raise InputError(f"precision must be above 0 and at most 1, got {precision}")
    order = np.argsort(-cosines, kind="stable")
    reached = np.cumsum(is_match[order]) / np.arange(1, len(order) + 1)
    # Pairs of one cosine are all in or all out.
    is_edge = np.append(np.diff(cosines[order]) < 0, True)
    good = np.flatnonzero((reached >= precision) & is_edge)
    if not len(good):
        best = float(reached[is_edge].max()) if len(order) else 0.0
        raise InputError(
            f"precision must be one that a threshold reaches on the labelled pairs, at most {best:.2f}, got {precision}"
        )
    last = int(good[-1])
    lowest = float(cosines[order][last])
    below = float(cosines[order][last + 1]) if last + 1 < len(order) else -1.0
    # A hair lower: the same two texts, embedded and multiplied again, need not give the same last digit.
    return max(lowest - min(1e-4, (lowest - below) / 2), -1.0)
