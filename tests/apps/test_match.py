"""Pairs found block by block are those of all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from polyvec.apps import match
from polyvec.apps.match import best_partners, near_pairs, threshold_for
from polyvec.errors import InputError
from polyvec.inference.quantize import unit


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "_BLOCK", 7)


RNG = np.random.default_rng(0)
FIRST = unit(RNG.normal(size=(30, 4)).astype(np.float32))
SECOND = unit(RNG.normal(size=(23, 4)).astype(np.float32))


@pytest.mark.parametrize("top", [1, 3, 40])
def test_best_partners_are_those_of_the_whole_matrix(top: int) -> None:
    cosines = FIRST @ SECOND.T
    expected = [(i, int(j)) for i in range(30) for j in np.argsort(-cosines[i], kind="stable")[:top]]
    assert [(i, j) for _, i, j in best_partners(FIRST, SECOND, top=top)] == expected


def test_near_pairs_are_all_pairs_from_the_threshold_on() -> None:
    across = {(i, j) for _, i, j in near_pairs(FIRST, SECOND, threshold=0.7)}
    assert across == set(map(tuple, np.argwhere(FIRST @ SECOND.T >= 0.7).tolist())) and across
    within = [(i, j) for _, i, j in near_pairs(FIRST, threshold=0.7)]
    assert sorted(within) == list(map(tuple, np.argwhere(np.triu(FIRST @ FIRST.T, 1) >= 0.7).tolist())) and within


@pytest.mark.parametrize("rows", [(FIRST * 127).astype(np.int8), FIRST[0], FIRST[:, :3]])
def test_rows_whose_products_are_no_cosines_are_refused(rows: np.ndarray) -> None:
    with pytest.raises(InputError, match="rows of floats of one width, got .*as_unit first"):
        next(best_partners(rows, SECOND, top=1))
    with pytest.raises(InputError, match="rows of floats of one width, got .*as_unit first"):
        next(near_pairs(rows, SECOND, threshold=0.5))


def test_a_threshold_holds_the_precision_that_was_asked_for() -> None:
    cosines = np.array([0.9, 0.8, 0.8, 0.6, 0.5], np.float32)
    is_match = np.array([True, True, False, True, False])
    assert threshold_for(cosines, is_match, precision=1) == pytest.approx(0.9, abs=2e-4)
    assert threshold_for(cosines, is_match, precision=0.75) == pytest.approx(0.6, abs=2e-4)
    assert threshold_for(cosines, is_match, precision=0.5) == pytest.approx(0.5, abs=2e-4)
    with pytest.raises(InputError, match=r"at most 0\.50, got 0\.9"):
        threshold_for(cosines[1:3], is_match[1:3], precision=0.9)
    with pytest.raises(InputError, match="precision must be above 0"):
        threshold_for(cosines, is_match, precision=0)


def test_what_is_no_cosine_or_count_is_an_error() -> None:
    with pytest.raises(InputError, match="threshold must be a cosine between -1 and 1, got 90"):
        next(near_pairs(FIRST, threshold=90))
    with pytest.raises(InputError, match="top must be at least 1"):
        next(best_partners(FIRST, SECOND, top=0))
