"""Negatives whose place is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from polyvec.data.negatives import bm25_candidates, mine_hard_negatives
from polyvec.errors import InputError

QUERY = np.array([[1.0, 0.0]], np.float32)


def at(*cosines: float) -> np.ndarray:
    """Return passages with these cosines to ``QUERY``."""
    return np.stack([cosines, np.sqrt(1 - np.square(cosines))], axis=1).astype(np.float32)


def test_the_nearest_wrong_passages_come_first() -> None:
    assert mine_hard_negatives(QUERY, at(0.1, 0.9, 0.5, 0.3), [1], count=2) == [[2, 3]]


def test_what_is_nearly_as_near_as_the_answer_is_no_negative() -> None:
    passages = at(0.9, 0.88, 0.84, 0.95)
    assert mine_hard_negatives(QUERY, passages, [0], count=9, margin=0.95) == [[2]]
    assert mine_hard_negatives(QUERY, passages, [0], count=9, margin=0.98) == [[1, 2]]


def test_lexical_candidates_join_those_beyond_the_depth() -> None:
    passages = at(0.9, 0.6, 0.5, 0.1)
    assert mine_hard_negatives(QUERY, passages, [0], count=9, depth=2) == [[1]]
    assert mine_hard_negatives(QUERY, passages, [0], count=9, depth=2, lexical=np.array([[3, 0]])) == [[1, 3]]


def test_more_queries_than_a_block_give_the_same_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    queries, passages = (rng.normal(size=(n, 8)).astype(np.float32) for n in (600, 50))
    answers = rng.integers(50, size=600).tolist()
    together = mine_hard_negatives(queries, passages, answers, count=3, depth=10)
    for i in (0, 255, 256, 599):
        assert mine_hard_negatives(queries[i : i + 1], passages, answers[i : i + 1], count=3, depth=10) == [together[i]]


def test_bm25_finds_shared_and_rare_pieces() -> None:
    passages = [[5, 6, 7], [5, 5, 8], [9, 10], [5, 11]]
    found = bm25_candidates([[9], [5, 8]], passages, depth=2)
    assert found.shape == (2, 2)
    assert found[0, 0] == 2 and found[1, 0] == 1
    assert bm25_candidates([[9]], passages, depth=100).shape == (1, 4)


def test_rows_that_disagree_are_an_error() -> None:
    with pytest.raises(InputError, match="one row per query, 1, got 2"):
        mine_hard_negatives(QUERY, at(0.1, 0.2), [0, 1], count=1)
    with pytest.raises(InputError, match="below 2, got 5 to 5"):
        mine_hard_negatives(QUERY, at(0.1, 0.2), [5], count=1)
