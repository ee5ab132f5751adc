"""Rows in cells around pivots, so that near rows meet and far ones do not: a million rows without a trillion cosines.

An inverted file (Sivic and Zisserman, ICCV 2003; Jegou et al., PAMI 2011, section IV) whose pivots are rows drawn at
random. Each row lives in the cell of its nearest pivot and visits the cells of several. How many is chosen on a sample
of rows whose pairs are known, so that what is left out is measured and not hoped for.

Shape letters: A and B rows of the two sides, M width, C cells, V visited cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from polyvec.apps.match import Pair, Vectors, best_partners, near_pairs

Cells = NDArray[np.int32]

_SAMPLE = 512  # rows whose pairs are looked for everywhere
_BLOCK = 4096  # rows that are multiplied at once
_SEED = 0


@dataclass(frozen=True)
class Blocking:
    """Which cells rows visit. ``recall`` is the share of the sample's pairs that are found, nan where it has none."""

    home: Cells  # (B,) cell of each row of the second side
    visits: Cells  # (A, V) cells of each row of the first side, nearest first
    recall: float
    comparisons: int


def block_pairs(first: Vectors, second: Vectors | None, *, threshold: float, recall: float) -> Blocking:
    """Return cells in which ``recall`` of the pairs from ``threshold`` on meet, as far as a sample can tell.

    Without ``second``, the pairs are of two rows of ``first``. Rows have unit length.
    """
    others = first if second is None else second
    sample = _sample(first)
    pairs = [(r, j) for _, r, j in near_pairs(first[sample], others, threshold=threshold)]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    left = sample[left]
    if second is None:
        left, right = left[left != right], right[left != right]
    return _block(first, others, (left, right), recall, is_one_side=second is None)


def block_partners(first: Vectors, second: Vectors, *, top: int, recall: float) -> Blocking:
    """Return cells in which ``recall`` of the ``top`` partners of rows of ``first`` meet them, as a sample tells."""
    sample = _sample(first)
    pairs = [(r, j) for _, r, j in best_partners(first[sample], second, top=top)]
    left, right = np.array(pairs, np.int64).reshape(-1, 2).T
    return _block(first, second, (sample[left], right), recall, is_one_side=False)


def _sample(rows: Vectors) -> NDArray[np.int64]:
    return np.sort(np.random.default_rng(_SEED).choice(len(rows), size=min(_SAMPLE, len(rows)), replace=False))


def _block(
    first: Vectors, others: Vectors, known: tuple[NDArray[np.int64], NDArray[np.int64]], recall: float, *,
    is_one_side: bool,
) -> Blocking:  # fmt: skip
    left, right = known
    num_cells = max(1, 2 * math.isqrt(len(others)))
    chosen = np.random.default_rng(_SEED).choice(len(others), size=min(num_cells, len(others)), replace=False)
    pivots = others[np.sort(chosen)]
    home = _nearest(others, pivots, 1)[:, 0]
    visited = 1
    while True:
        is_found = _meet(_nearest(first[left], pivots, visited), home[right])
        if is_one_side:  # either of the two may visit the other
            is_found |= _meet(_nearest(first[right], pivots, visited), home[left])
        found = float(is_found.mean()) if len(left) else math.nan
        # Without a pair to learn from, eight cells: a row's near ones are rarely further away.
        if visited == len(pivots) or (found >= recall if len(left) else visited >= 8):
            break
        visited = min(2 * visited, len(pivots))
    visits = _nearest(first, pivots, visited)
    sizes = np.bincount(home, minlength=len(pivots))
    return Blocking(home, visits, found, int(sizes[visits].sum(dtype=np.int64)))


def blocked_pairs(first: Vectors, second: Vectors | None, blocking: Blocking, *, threshold: float) -> Iterator[Pair]:
    """Yield the pairs from ``threshold`` on that meet in a cell, each once, cell by cell."""
    others = first if second is None else second
    for visitors, members in _meetings(blocking):
        for start in range(0, len(visitors), _BLOCK):
            rows = visitors[start : start + _BLOCK]
            cosines = first[rows] @ others[members].T
            for i, j in np.argwhere(cosines >= threshold):
                row, other = int(rows[i]), int(members[j])
                if second is not None:
                    yield float(cosines[i, j]), row, other
                # One file: a pair that meets in both rows' cells is told by the earlier row.
                elif row < other:
                    yield float(cosines[i, j]), row, other
                elif row > other and blocking.home[row] not in blocking.visits[other]:
                    yield float(cosines[i, j]), other, row


def blocked_partners(first: Vectors, second: Vectors, blocking: Blocking, *, top: int) -> Iterator[Pair]:
    """Yield, for each row of ``first`` in order, the best ``top`` rows of ``second`` that it meets, best first."""
    cosines = np.full((len(first), top), -np.inf, np.float32)
    partners = np.zeros((len(first), top), np.int64)
    for visitors, members in _meetings(blocking):
        for start in range(0, len(visitors), _BLOCK):
            rows = visitors[start : start + _BLOCK]
            own = first[rows] @ second[members].T
            both = np.concatenate((cosines[rows], own), axis=1)
            numbers = np.concatenate((partners[rows], np.broadcast_to(members, own.shape)), axis=1)
            kept = np.lexsort((numbers, -both), axis=1)[:, :top]  # of equal cosines the earlier row
            cosines[rows], partners[rows] = np.take_along_axis(both, kept, 1), np.take_along_axis(numbers, kept, 1)
    for i in range(len(first)):
        for cosine, j in zip(cosines[i], partners[i], strict=True):
            if np.isfinite(cosine):
                yield float(cosine), i, int(j)


def _meetings(blocking: Blocking) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield, for each cell, the rows that visit it and those that live in it."""
    residents = np.argsort(blocking.home, kind="stable")
    flat = blocking.visits.ravel()
    guests = np.argsort(flat, kind="stable")
    num_cells = int(max(blocking.home.max(), flat.max())) + 1
    homes = np.searchsorted(blocking.home[residents], np.arange(num_cells + 1))
    visits = np.searchsorted(flat[guests], np.arange(num_cells + 1))
    for cell in range(num_cells):
        members = residents[homes[cell] : homes[cell + 1]]
        visitors = guests[visits[cell] : visits[cell + 1]] // blocking.visits.shape[1]
        if len(members) and len(visitors):
            yield visitors, members


def _nearest(rows: Vectors, pivots: Vectors, count: int) -> Cells:
    """Return (A, count) numbers of the nearest pivots, nearest first."""
    parts = [np.empty((0, count), np.int32)]
    for start in range(0, len(rows), _BLOCK):
        cosines = rows[start : start + _BLOCK] @ pivots.T
        best = np.argpartition(-cosines, min(count, cosines.shape[1] - 1), axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosines, best, 1), axis=1, kind="stable")
        parts.append(np.take_along_axis(best, order, 1).astype(np.int32))
    return np.concatenate(parts)


def _meet(visits: Cells, home: Cells) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (visits == home[:, None]).any(axis=1)
    return found
