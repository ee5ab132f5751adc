"""Scores with answers known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from polyvec.evaluation.metrics import accuracy_of_centroids, bitext_accuracy, cosine_spearman, ndcg_at_10

EYE = np.eye(12, dtype=np.float32)


def test_spearman_sees_order_alone() -> None:
    first = EYE[[0, 0, 0]]
    second = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32) @ EYE[:2]
    assert cosine_spearman(first, second, np.array([5.0, 1.0, 0.5])) == pytest.approx(1.0)
    assert cosine_spearman(first, second, np.array([0.0, 1.0, 2.0])) == pytest.approx(-1.0)


def test_bitext_counts_nearest_own_rows() -> None:
    assert bitext_accuracy(EYE[:4], EYE[[0, 1, 3, 2]]) == 0.5


def test_ndcg_discounts_by_rank_and_ends_at_ten() -> None:
    scores = np.linspace(1, 0.1, 12, dtype=np.float32)
    passages = np.stack([scores, np.sqrt(1 - scores**2)], axis=1)
    query = np.array([[1, 0]], np.float32)
    for rank, value in ((0, 1.0), (2, 0.5), (9, 1 / np.log2(11)), (10, 0.0)):
        assert ndcg_at_10(query, passages, np.array([rank])) == pytest.approx(value)


def test_ties_do_not_help() -> None:
    assert ndcg_at_10(EYE[:1], EYE[[0, 0]], np.array([0])) == pytest.approx(1 / np.log2(3))


def test_centroids_class_by_the_nearest_mean() -> None:
    train, labels = EYE[[0, 0, 1, 1]], np.array(["a", "a", "b", "b"])
    assert accuracy_of_centroids(train, labels, EYE[[0, 1, 1, 0]], np.array(["a", "b", "a", "a"])) == 0.75
