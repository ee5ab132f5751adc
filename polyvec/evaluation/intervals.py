"""How sure a score is: the bootstrap (Efron 1979) over its observations.

An observation is what was drawn at random when the data was made: a query, a pair, a text. A statistic maps any rows of
them to the score, so that one function serves means, correlations and areas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError
from polyvec.evaluation.metrics import average_precision, spearman, weighted_f1

Observations = NDArray[np.float64]

#: Name -> score of observations (n, columns).
STATISTICS: dict[str, Callable[[Observations], float]] = {
    "mean": lambda rows: float(rows[:, 0].mean()),
    "spearman": lambda rows: spearman(rows[:, 0], rows[:, 1]),
    # Without a positive it is no score; scikit-learn's 0 would pull the interval of a few positives down.
    "average_precision": lambda rows: average_precision(rows[:, 0], rows[:, 1]) if rows[:, 1].any() else math.nan,
    "weighted_f1": lambda rows: weighted_f1(rows[:, 0], rows[:, 1]),
}
RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """The second score minus the first, its 95 % interval, and the two-sided bootstrap p-value."""

    value: float
    low: float
    high: float
    p: float


def interval(rows: Observations, statistic: str, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of a score. ``rows`` (n, columns).

    Resamples without a score, such as of one grade alone, are left out; where none is left the bounds are NaN.
    """
    return _bounds(_scored(np.array([STATISTICS[statistic](rows[i]) for i in _draws(len(rows), resamples, seed)])))


def compare(first: Observations, second: Observations, statistic: str, *, resamples: int = RESAMPLES) -> Difference:
    """Return how two systems differ on the same observations, both resampled by the same rows (a paired test).

    (n, columns) twice. Raises ``InputError`` where the two are not of the same n.
    """
    return compare_means([(statistic, first)], [(statistic, second)], resamples=resamples)


def compare_means(
    first: Sequence[tuple[str, Observations]], second: Sequence[tuple[str, Observations]], *, resamples: int = RESAMPLES
) -> Difference:
    """Return how the means of several scores differ, of languages for one, each (statistic, observations).

    The rows of each are resampled on their own, the same ones for both sides. Raises ``InputError`` as ``compare``.
    """
    drawn = np.zeros(resamples)
    value = 0.0
    for seed, ((statistic, before), (_, after)) in enumerate(zip(first, second, strict=True)):
        if len(before) != len(after):
            raise InputError(
                f"a paired test needs the same observations of both systems, got {len(before)} and {len(after)}; "
                "evaluate both on the same data"
            )
        score = STATISTICS[statistic]
        drawn += [(score(after[i]) - score(before[i])) / len(first) for i in _draws(len(before), resamples, seed)]
        value += (score(after) - score(before)) / len(first)
    drawn = _scored(drawn)  # else one without a score would count as a difference that is not 0
    # One is added so that no finite number of resamples claims certainty (Davison and Hinkley 1997, 4.2).
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (float(tail) + 1) / (len(drawn) + 1))
    return Difference(value, *_bounds(drawn), p)


def _scored(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    return drawn[np.isfinite(drawn)]


def _bounds(drawn: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(drawn, (2.5, 97.5)) if len(drawn) else (math.nan, math.nan)
    return float(low), float(high)


def _draws(count: int, resamples: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return (rng.integers(count, size=count) for _ in range(resamples))
