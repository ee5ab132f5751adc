"""Ablations of the base: each variant against what it differs from in one thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from polyvec.errors import InputError
from recipes.base_ablations import Results, app, baseline_of, save_observations, table


def test_a_variant_is_measured_against_the_one_that_it_changes(tmp_path: Path) -> None:
    assert baseline_of("distance and relation") == "the start"
    assert baseline_of("distance alone") == baseline_of("no teacher: translations as pairs") == "distance and relation"
    rows = np.random.default_rng(0).random((200, 1))
    found: dict[str, Results] = {}
    variants = {
        "the start": 0.1, "distance and relation": 0.2, "no teacher: translations as pairs": 0.4,
        "the same with hardness 5": 0.45,
    }  # fmt: skip
    for name, gain in variants.items():
        save_observations(tmp_path, found, name, {"retrieval": [("mean", rows + gain)]})
    lines = CliRunner().invoke(app, ["table", "--work", str(tmp_path)]).stdout.splitlines()
    level = 100 * rows.mean()
    for line, name, gain in zip(lines[3:], list(variants)[1:], (10, 20, 5), strict=True):
        value = level + 100 * variants[name]
        assert line == f"| {name} | {value:.1f} ({gain:+.1f}, {gain:+.1f} to {gain:+.1f}) |"


def test_a_table_without_its_baseline_names_it(tmp_path: Path) -> None:
    found: dict[str, Results] = {}
    for name in ("the start", "distance and relation", "the same with guard 0.1"):
        save_observations(tmp_path, found, name, {"retrieval": [("mean", np.arange(3.0))]})
    with pytest.raises(InputError, match="must hold results of no teacher: translations as pairs, got none"):
        table(tmp_path)
