"""Pairs found in cells are those of all pairs, but for the few that the sample allows; each is told once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from typer.testing import CliRunner

from polyvec.apps import cells
from polyvec.apps.cells import block_pairs, block_partners, blocked_pairs, blocked_partners
from polyvec.apps.match import best_partners, near_pairs
from polyvec.cli import app
from polyvec.inference.quantize import unit

RNG = np.random.default_rng(0)
TOPICS = RNG.normal(size=(60, 32))
ROWS = unit((TOPICS[RNG.integers(60, size=4000)] + 0.8 * RNG.normal(size=(4000, 32))).astype(np.float32))
TWINS = unit(ROWS[:300] + 0.05 * RNG.normal(size=(300, 32)).astype(np.float32))
BOTH = np.concatenate((ROWS, TWINS))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "_BLOCK", 100)


def test_pairs_of_one_side_are_found_once_with_a_part_of_the_comparisons() -> None:
    exact = {(i, j): cosine for cosine, i, j in near_pairs(BOTH, threshold=0.95)}
    blocking = block_pairs(BOTH, None, threshold=0.95, recall=0.99)
    found = list(blocked_pairs(BOTH, None, blocking, threshold=0.95))
    pairs = {(i, j): cosine for cosine, i, j in found}
    assert len(pairs) == len(found) and pairs.keys() <= exact.keys() and len(exact) > 250
    assert all(abs(cosine - exact[pair]) < 1e-6 for pair, cosine in pairs.items())
    assert len(pairs) > 0.97 * len(exact) and blocking.recall >= 0.99
    assert blocking.comparisons < len(BOTH) ** 2 / 8


def test_every_cell_visited_is_every_pair() -> None:
    blocking = block_pairs(ROWS, TWINS, threshold=0.5, recall=1.01)  # never reached: all cells are visited
    found = sorted((i, j) for _, i, j in blocked_pairs(ROWS, TWINS, blocking, threshold=0.5))
    assert found == sorted((i, j) for _, i, j in near_pairs(ROWS, TWINS, threshold=0.5)) and len(found) > 300
    assert blocking.comparisons == len(ROWS) * len(TWINS) and blocking.recall == 1


@pytest.mark.parametrize("top", [1, 3])
def test_best_partners_are_those_of_all_rows_but_for_a_few(top: int) -> None:
    exact = [(i, j) for _, i, j in best_partners(TWINS, ROWS, top=top)]
    blocking = block_partners(TWINS, ROWS, top=top, recall=0.98)
    found = [(i, j) for _, i, j in blocked_partners(TWINS, ROWS, blocking, top=top)]
    assert len(set(found) & set(exact)) > 0.96 * len(exact)
    assert [i for i, _ in found] == [i for i in range(300) for _ in range(top)]
    assert blocking.comparisons < len(TWINS) * len(ROWS)


def test_a_sample_without_pairs_says_so() -> None:
    blocking = block_pairs(ROWS[:200], None, threshold=0.9999, recall=0.99)
    assert math.isnan(blocking.recall) and blocking.visits.shape == (200, 8)
    assert list(blocked_pairs(ROWS[:200], None, blocking, threshold=0.9999)) == []


def test_the_command_tells_what_was_left_out(tmp_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"the router number {i} is late" for i in range(40)] + ["the router number 7 is late!"]
    with open("texts.txt", "w") as file:
        file.write("\n".join(lines))
    blocked = CliRunner().invoke(app, ["match", "texts.txt", "--threshold", "0.97", "--no-exact"])
    exact = CliRunner().invoke(app, ["match", "texts.txt", "--threshold", "0.97", "--exact"])
    assert blocked.exit_code == exact.exit_code == 0, blocked.output
    assert sorted(blocked.stdout.splitlines()) == sorted(exact.stdout.splitlines())
    assert "of the pairs of a sample found; --exact makes all" in blocked.stderr and not exact.stderr
