"""Scores, in numpy, each as its reference defines it: trec_eval, scikit-learn, scipy; tests compare them.

Shape letters: B rows, M width, P passages of a query in order of rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Floats = NDArray[np.floating[Any]]


def cosines(first: Vectors, second: Vectors) -> Floats:
    """Return the dot products of unit rows, pair by pair, in float64. (B, M) twice -> (B,)."""
    return np.asarray((first.astype(np.float64) * second).sum(axis=1))


def ndcg(gains: Floats, judged: Floats, k: int) -> float:
    """Return nDCG@k of one query, gains as graded, below 0 as 0. (P,) by rank, and all grades of the query -> 0..1
    (trec_eval)."""
    best = _discounted(-np.sort(-judged), k)
    return _discounted(gains, k) / best if best else 0.0


def _discounted(gains: Floats, k: int) -> float:
    kept = np.maximum(gains[:k], 0)
    return float((kept / np.log2(np.arange(2, len(kept) + 2))).sum())


def average_precision_of_ranks(gains: Floats, num_relevant: int, k: int) -> float:
    """Return the mean over relevant passages of the precision at their ranks up to k; MAP is its mean over queries.

    (P,) by rank; a passage is relevant when its gain is above zero (trec_eval).
    """
    hits = gains[:k] > 0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / num_relevant) if num_relevant else 0.0


def reciprocal_rank(gains: Floats, k: int) -> float:
    """Return one over the rank of the first relevant passage among the first k, else 0; MRR is its mean."""
    hits = np.flatnonzero(gains[:k] > 0)
    return 1.0 / float(hits[0] + 1) if len(hits) else 0.0


def recall(gains: Floats, num_relevant: int, k: int) -> float:
    """Return the part of a query's relevant passages that is among the first k. -> 0..1."""
    return float((gains[:k] > 0).sum() / num_relevant) if num_relevant else 0.0


def spearman(first: Floats, second: Floats) -> float:
    """Return Spearman's rank correlation, ties at their mean rank. (B,) twice -> -1..1.

    NaN where a side is constant.
    """
    ranks = [_mean_ranks(side) for side in (first, second)]
    centred = [side - side.mean() for side in ranks]
    norm = float(np.sqrt((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / norm if norm else float("nan")


def _mean_ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])


def average_precision(scores: Floats, labels: NDArray[Any]) -> float:
    """Return the area under the precision-recall steps; equal scores are one step. (B,), (B,) of 0 and 1 -> 0..1.

    As scikit-learn's ``average_precision_score``. 0 without a positive label.
    """
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(labels[order] == 1)
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of each run of equal scores
    if not found[-1]:
        return 0.0
    gained = np.diff(found[ends], prepend=0) / found[-1]
    return float((gained * found[ends] / (ends + 1)).sum())


def accuracy(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return how often the two agree. (B,) twice -> 0..1."""
    return float((predicted == labels).mean())


def weighted_f1(predicted: NDArray[Any], labels: NDArray[Any]) -> float:
    """Return F1 averaged over the true labels by their frequency: MTEB's score of bitext mining. (B,) twice -> 0..1."""
    classes, inverse = np.unique(np.concatenate((predicted, labels)), return_inverse=True)
    size = len(classes)
    guessed, true = inverse[: len(predicted)], inverse[len(predicted) :]
    right = np.bincount(true[guessed == true], minlength=size)
    support = np.bincount(true, minlength=size)
    f1 = 2 * right / (support + np.bincount(guessed, minlength=size))
    return float((f1 * support).sum() / len(labels))


def v_measure(labels: Sequence[Any] | NDArray[Any], clusters: Sequence[Any] | NDArray[Any]) -> float:
    """Return the harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007). (B,) twice -> 0..1."""
    _, rows = np.unique(labels, return_inverse=True)
    _, columns = np.unique(clusters, return_inverse=True)
    table = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(table, (rows, columns), 1)
    joint = table / table.sum()
    of_labels, of_clusters = _entropy(joint.sum(axis=1)), _entropy(joint.sum(axis=0))
    shared = of_labels + of_clusters - _entropy(joint)  # mutual information, in nats
    homogeneity = shared / of_labels if of_labels else 1.0
    completeness = shared / of_clusters if of_clusters else 1.0
    total = homogeneity + completeness
    return float(2 * homogeneity * completeness / total) if total > 1e-12 else 0.0


def _entropy(probabilities: Floats) -> float:
    kept = probabilities[probabilities > 0]
    return float(-(kept * np.log(kept)).sum())
