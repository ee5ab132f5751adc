"""Scores of embeddings, in numpy. Every row of every matrix has unit length.

Shape letters: B rows, M width, Q queries, P passages.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import MissingExtraError

Vectors = NDArray[np.float32]


def cosine_spearman(first: Vectors, second: Vectors, grades: NDArray[np.floating]) -> float:
    """Return Spearman's correlation of the pairs' cosines with their grades. (B, M) twice, (B,) -> -1..1."""
    try:
        from scipy.stats import spearmanr
    except ImportError as error:
        raise MissingExtraError.of("cosine_spearman", "evaluate") from error
    return float(spearmanr((first * second).sum(axis=1), grades).statistic)


def bitext_accuracy(first: Vectors, second: Vectors) -> float:
    """Return how often a row of ``second`` is nearest to its own row of ``first`` among all. (B, M) twice -> 0..1."""
    nearest = (second @ first.T).argmax(axis=1)
    return float((nearest == np.arange(len(first))).mean())


def ndcg_at_10(queries: Vectors, passages: Vectors, answers: NDArray[np.integer]) -> float:
    """Return nDCG@10 for one right passage per query. (Q, M), (P, M), (Q,) passage numbers -> 0..1.

    A passage that ties with the right one counts as before it.
    """
    scores = queries @ passages.T
    own = scores[np.arange(len(queries)), answers]
    ranks = (scores >= own[:, None]).sum(axis=1)  # from 1
    return float(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0).mean())


def accuracy_of_centroids(
    train: Vectors, train_labels: NDArray[np.str_], test: Vectors, test_labels: NDArray[np.str_]
) -> float:
    """Return how often a text's nearest class mean, of the classes in ``train``, is its own. -> 0..1."""
    classes, index = np.unique(train_labels, return_inverse=True)
    means = np.zeros((len(classes), train.shape[1]), np.float32)
    np.add.at(means, index, train)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return float((classes[(test @ means.T).argmax(axis=1)] == test_labels).mean())
