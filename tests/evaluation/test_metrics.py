"""Every score against the implementation that its name usually means."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval
from scipy.stats import spearmanr
from sklearn import metrics as reference

from polyvec.errors import InputError
from polyvec.evaluation import metrics
from polyvec.evaluation.intervals import compare, compare_means, interval

RNG = np.random.default_rng(0)


def test_rank_scores_are_those_of_trec_eval() -> None:
    for query in range(40):
        judged = RNG.integers(-2 if query % 2 else 0, 4, 30)  # below 0: spam, for some collections
        qrels = {"q": {f"d{i:02}": int(grade) for i, grade in enumerate(judged)}}
        found = RNG.permutation(40)[:25]  # some unjudged, some judged never found
        run = {"q": {f"d{i:02}": float(-rank) for rank, i in enumerate(found)}}
        names = {"ndcg_cut.10", "map_cut.10", "recall.10", "recip_rank"}
        expected = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run)["q"]
        gains = np.array([judged[i] if i < 30 else 0 for i in found], float)
        relevant = int((judged > 0).sum())
        assert metrics.ndcg(gains, judged, 10) == pytest.approx(expected["ndcg_cut_10"], abs=1e-9), query
        assert metrics.average_precision_of_ranks(gains, relevant, 10) == pytest.approx(expected["map_cut_10"])
        assert metrics.recall(gains, relevant, 10) == pytest.approx(expected["recall_10"])
        assert metrics.reciprocal_rank(gains, 25) == pytest.approx(expected["recip_rank"])


def test_a_query_without_relevant_passages_scores_zero() -> None:
    nothing = np.zeros(3)
    assert metrics.ndcg(nothing, nothing, 10) == 0.0
    assert metrics.average_precision_of_ranks(nothing, 0, 10) == metrics.recall(nothing, 0, 10) == 0.0
    assert metrics.reciprocal_rank(nothing, 10) == 0.0


@pytest.mark.parametrize("levels", [5, 10_000])
def test_spearman_with_and_without_ties_is_that_of_scipy(levels: int) -> None:
    first, second = RNG.integers(0, levels, (2, 200)).astype(float)
    assert metrics.spearman(first, second) == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize("levels", [4, 10_000])
def test_average_precision_is_that_of_scikit_learn(levels: int) -> None:
    scores, labels = RNG.integers(0, levels, 100).astype(float), RNG.integers(0, 2, 100)
    assert metrics.average_precision(scores, labels) == pytest.approx(reference.average_precision_score(labels, scores))


def test_label_scores_are_those_of_scikit_learn() -> None:
    true, guessed = RNG.integers(0, 6, (2, 150))
    assert metrics.accuracy(guessed, true) == pytest.approx(reference.accuracy_score(true, guessed))
    assert metrics.v_measure(true, guessed) == pytest.approx(reference.v_measure_score(true, guessed))
    assert metrics.weighted_f1(guessed, true) == pytest.approx(
        reference.f1_score(true, guessed, average="weighted", zero_division=0)
    )
    assert metrics.v_measure([0, 0, 1, 1], [1, 1, 0, 0]) == pytest.approx(1.0)
    assert metrics.v_measure([0, 0, 1, 1], [0, 0, 0, 0]) == 0.0


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    rows = RNG.normal(0.5, 0.2, (400, 1))
    low, high = interval(rows, "mean")
    half = 1.96 * rows.std() / 20
    assert low == pytest.approx(rows.mean() - half, abs=0.003) and high == pytest.approx(rows.mean() + half, abs=0.003)


def test_a_paired_test_sees_a_small_steady_gain_and_no_gain_in_noise() -> None:
    first = RNG.normal(0.5, 0.2, (200, 1))
    better = compare(first, first + 0.02 + RNG.normal(0, 0.01, (200, 1)), "mean")
    assert better.value == pytest.approx(0.02, abs=0.005) and better.low > 0 and better.p < 0.01
    same = compare(first, RNG.permutation(first), "mean")
    assert same.p > 0.5 and same.low < 0 < same.high


def test_a_paired_test_of_different_data_is_refused() -> None:
    with pytest.raises(InputError, match="same observations of both systems, got 3 and 4"):
        compare(np.zeros((3, 1)), np.zeros((4, 1)), "mean")


def test_means_over_languages_are_compared_language_by_language() -> None:
    first = RNG.random((200, 1))
    second = first + 0.02 + RNG.normal(0, 0.01, (200, 1))
    assert compare_means([("mean", first)], [("mean", second)]) == compare(first, second, "mean")
    # A second language in which nothing differs halves the difference and its interval.
    both = compare_means([("mean", first), ("mean", first)], [("mean", second), ("mean", first)])
    alone = compare(first, second, "mean")
    assert (both.value, both.low, both.high) == pytest.approx((alone.value / 2, alone.low / 2, alone.high / 2))
    with pytest.raises(InputError, match="got 3 and 4"):
        compare_means([("mean", np.zeros((3, 1)))], [("mean", np.zeros((4, 1)))])


def test_resamples_without_a_score_count_neither_for_nor_against() -> None:
    cosines, grades = [0.1, 0.4, 0.2], [0.0, 0.0, 1.0]
    rows = np.array([cosines, grades]).T
    other = np.array([[0.4, 0.1, 0.2], grades]).T
    # A third of the resamples has one grade alone. The two differ in the order of the first two rows, whose grades are
    # equal, so nothing is gained.
    assert compare(rows, other, "spearman").p == 1.0
    low, _ = interval(rows, "average_precision")
    assert low >= 1 / 3  # its one positive comes second, or lower where it is drawn once beside two of the first
    nothing = interval(rows[:2], "average_precision")
    assert np.isnan(nothing).all()
