"""A graph that loses more than half a percent of a score is not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.cli import app
from polyvec.errors import WeightsError
from polyvec.evaluation.gate import graph_gate
from polyvec.evaluation.suites import Pairs, Suite
from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import OnnxEngine

FIRST = [f"rain {i} train" for i in range(12)]
SECOND = [f"bread {i * 3} stone" for i in range(12)]


@pytest.fixture
def graded(embedder: Embedder) -> list[Suite]:
    """Grades that the float32 weights rank without a fault."""
    sides = [embedder.encode(side, task="text-matching") for side in (FIRST, SECOND)]
    return [Suite("sts", "graded", Pairs(FIRST, SECOND, (sides[0] * sides[1]).sum(axis=1).astype(float).tolist()))]


class Noisy(OnnxEngine):
    """A graph whose vectors are those of a text with a part of noise."""

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        vectors = super().pool(batch)
        noise = np.random.default_rng(0).normal(size=vectors.shape).astype(np.float32)
        return vectors + noise * vectors.std()


def test_a_graph_as_good_as_the_weights_passes_and_a_noisy_one_is_refused(
    model_folder: Path, embedder: Embedder, graded: list[Suite]
) -> None:
    check = graph_gate(model_folder, graded)
    path = model_folder / "model.onnx"
    check(OnnxEngine(path, embedder.config))
    with pytest.raises(WeightsError, match=r"must keep 99.5% of every score, got graded 1.0000 to 0\.\d+; it was not"):
        check(Noisy(path, embedder.config))


def test_a_refused_graph_leaves_the_one_before(
    model_folder: Path, tmp_path: Path, graded: list[Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    data = tmp_path / "graded.jsonl"
    pairs = graded[0].data
    assert isinstance(pairs, Pairs)
    rows = zip(pairs.first, pairs.second, pairs.values, strict=True)
    data.write_text("".join(json.dumps({"text_a": a, "text_b": b, "score": s}) + "\n" for a, b, s in rows))
    command = ["export", str(folder), "--onnx", "int8", "--gate", str(data)]
    before = (folder / "model.int8.onnx").read_bytes()
    monkeypatch.setattr("polyvec.evaluation.gate.MOST_LOST", -1.0)  # what no graph keeps
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "it was not written, use fp32" in refused.stderr
    assert (folder / "model.int8.onnx").read_bytes() == before
    assert not list(folder.glob("*partial*"))
    monkeypatch.setattr("polyvec.evaluation.gate.MOST_LOST", 0.5)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, ["export", str(folder), "-o", "x", "--gate", str(data)]).exit_code == 2
