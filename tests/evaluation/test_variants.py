"""Ablations do what their names say, through the one path that measures everything."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.cli import app
from polyvec.errors import InputError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.run import comparisons, plan, run_cells
from polyvec.evaluation.suites import Pairs, Ranking, Suite, rank
from polyvec.evaluation.systems import System, of_embedder, open_system
from polyvec.evaluation.variants import ABLATIONS, WHOLE, variants_of
from polyvec.model.hub import resolve_model_folder
from polyvec.tasks import TASK_PROMPTS
from polyvec.text.chunking import sentence_spans

PASSAGES = {f"p{i}": f"Rain falls. Number {i} is a train. Bread {i * 7}." for i in range(12)}
DATA = Ranking(
    {f"q{i}": f"Number {i} is what?" for i in range(12)}, PASSAGES, {f"q{i}": {f"p{i}": 1} for i in range(12)}
)
RETRIEVAL = Suite("retrieval", "r", DATA)
STS = Suite("sts", "s", Pairs(["a", "b", "c"], ["d", "e", "f"], [0.1, 0.5, 0.9]))
QUERY, PASSAGE = TASK_PROMPTS["retrieval.query"], TASK_PROMPTS["retrieval.passage"]


@pytest.mark.parametrize(
    ("ablation", "ways"),
    [
        ("task", [[(None, ""), (None, "")]]),
        ("adapter", [[(None, QUERY), (None, PASSAGE)]]),
        ("prompt", [[("retrieval.query", ""), ("retrieval.passage", "")]]),
        (
            "one-adapter",
            [
                [("retrieval.query", QUERY), ("retrieval.query", PASSAGE)],
                [("retrieval.passage", QUERY), ("retrieval.passage", PASSAGE)],
                [("text-matching", ""), ("text-matching", "")],
            ],
        ),
    ],
)
def test_an_ablation_changes_adapter_and_prompt_of_both_sides(
    ablation: str, ways: list[list[tuple[str | None, str]]]
) -> None:
    seen: list[tuple[str | None, str]] = []

    def encode(texts: Sequence[str], adapter: str | None, prompt: str) -> Vectors:
        seen.append((adapter, prompt))
        rows = [np.random.default_rng(list(text.encode())).normal(size=8) for text in texts]
        return np.array(rows, np.float32)

    system = System("noting", "w", "none", 8, encode, prompts=dict(TASK_PROMPTS))
    for variant, expected in zip(ABLATIONS[ablation], ways, strict=True):
        (cell,) = plan([system], [RETRIEVAL], variants=[variant])
        assert cell.ways == expected


def test_the_ways_of_a_cell_are_those_of_its_vectors(embedder: Embedder, tmp_path: Path) -> None:
    """What is embedded is what the stamp says."""
    asked: list[tuple[str | None, str]] = []
    system = of_embedder(embedder, "tiny")
    real = system.encode
    assert real is not None

    def encode(texts: Sequence[str], adapter: str | None, prompt: str) -> Vectors:
        asked.append((adapter, prompt))
        return real(texts, adapter, prompt)

    cells = plan([replace(system, encode=encode)], [RETRIEVAL], variants=variants_of(["prompt", "adapter"]))
    rows = run_cells(cells, tmp_path)
    assert asked == [way for cell in cells for way in cell.ways]
    assert [row["variant"] for row in rows] == ["", "no-prompt", "no-adapter"]
    assert [test["second"].rpartition(", ")[2] for test in comparisons(rows)] == ["no-prompt", "no-adapter"]


def test_late_chunks_read_their_context_and_naive_ones_do_not(embedder: Embedder) -> None:
    system = of_embedder(embedder, "tiny")
    assert system.encode_chunks is not None
    texts = list(PASSAGES.values())[:3]
    late, naive = (system.encode_chunks(texts, "retrieval.passage", PASSAGE, mode) for mode in (True, False))
    for text, in_context, alone in zip(texts, late, naive, strict=True):
        chunks = embedder.encode(text, task="retrieval.passage", late_chunking="sentence")
        np.testing.assert_allclose(in_context, chunks.vectors, atol=1e-5)
        parts = [text[slice(*span)] for span in sentence_spans(text)]
        np.testing.assert_allclose(alone, embedder.encode(parts, task="retrieval.passage"), atol=1e-5)
    assert np.abs(late[0] - naive[0]).max() > 1e-3


def test_a_passage_of_chunks_is_as_near_as_its_nearest() -> None:
    eye = np.eye(3, dtype=np.float32)
    data = Ranking({"q": "?"}, {"a": "", "b": "", "c": ""}, {"q": {"b": 1}})
    passages = np.stack([eye[1], eye[2], eye[0], -eye[0]])  # a has one chunk, b two, c one
    assert rank(data, eye[:1], passages, np.array([0, 1, 1, 2])) == [["b", "a", "c"]]
    assert rank(data, eye[:1], passages[:3], np.array([0, 1, 1])) == [["b", "a", "c"]]  # c has none and comes last


def test_rescoring_ranks_the_nearest_by_the_exact_query() -> None:
    data = Ranking({"q": "?"}, {"a": "", "b": ""}, {"q": {"b": 1}})
    signs = np.array([[1, 1, -1, 1], [1, -1, 1, 1]], np.float32) / 2
    coarse, exact = np.ones((1, 4), np.float32) / 2, np.array([[0.1, 0.1, 0.9, 0.1]], np.float32)
    assert rank(data, coarse, signs, np.arange(2)) == [["b", "a"]]  # a tie, by id
    exact_a = exact[:, [0, 2, 1, 3]]
    assert rank(data, coarse, signs, np.arange(2), exact) == [["b", "a"]]
    assert rank(data, coarse, signs, np.arange(2), exact_a) == [["a", "b"]]


def test_variants_are_planned_where_they_can_differ(embedder: Embedder) -> None:
    ours, peer = of_embedder(embedder, "tiny"), System("peer", "w", "none", 32, lambda t, a, p: np.zeros((len(t), 32)))
    variants = variants_of(ABLATIONS)
    names = [c.variant.name for c in plan([ours], [STS], dtypes=["binary"], variants=variants)]
    assert names == ["", "no-task", "no-adapter", "no-prompt"]
    planned = plan([peer], [RETRIEVAL], dtypes=["float32", "binary"], variants=variants)
    assert [(c.dtype, c.variant.name) for c in planned] == [("float32", ""), ("binary", ""), ("binary", "rescored")]
    widths = [c.dimensions for c in plan([ours, peer], [STS], every_width=True)]
    assert widths == [32, 8, 16, 32]
    with pytest.raises(InputError, match="ablation must be one of task, .* got 'sleep'"):
        variants_of(["sleep"])
    assert variants_of([]) == [WHOLE]


def test_another_theta_changes_long_texts_alone(model_folder: Path) -> None:
    same, other = (open_system(str(model_folder), rope_theta=theta) for theta in (20_000.0, 100.0))
    graph = open_system(str(model_folder), engine="onnx")
    assert graph.encode and same.encode and other.encode
    texts = ["a", "rain " * 60]
    np.testing.assert_allclose(same.encode(texts, None, ""), graph.encode(texts, None, ""), atol=1e-5)
    assert np.abs(other.encode(texts, None, "") - graph.encode(texts, None, "")).max() > 1e-4
    assert other.weights != same.weights != graph.weights and other.name.endswith("rope theta 100")
    with pytest.raises(InputError, match="rope_theta needs a model of polyvec, got bm25"):
        open_system("bm25", rope_theta=1.0)
    for theta in (1.0, -5.0, math.nan, math.inf):
        with pytest.raises(InputError, match=f"rope_theta must be a finite number greater than 1, got {theta}"):
            open_system(str(model_folder), rope_theta=theta)


def test_the_command_measures_every_ablation(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"query": DATA.queries[f"q{i}"], "passage": PASSAGES[f"p{i}"]} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", str(tmp_path / "pairs.jsonl"), "--model", str(model_folder), "-o", str(tmp_path / "out")]
    options = [part for name in (*ABLATIONS, "width") for part in ("--ablate", name)]
    engines = ["--engine", "onnx", "--engine", "onnx-int8"]
    result = CliRunner().invoke(app, [*command, *options, *engines, "--dtype", "binary", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)["results"]
    variants = {row["variant"] for row in answer}
    assert variants == {v.name for found in ABLATIONS.values() for v in found} | {""}
    assert {row["engine"] for row in answer} == {"onnx-float32", "onnx-int8"}
    assert {row["dimensions"] for row in answer} == {8, 16, 32}
    late = next(row for row in answer if row["variant"] == "late-chunks")
    assert late["bytes_per_vector"] == 3 * late["dimensions"] / 8  # three sentences a passage
    again = CliRunner().invoke(app, [*command, *options, *engines, "--dtype", "binary"])
    assert again.exit_code == 0 and "about" not in again.stderr  # all of it was there
    assert "late-chunks" in again.stdout


def test_the_command_runs_with_another_theta(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": "rain?", "passage": "Rain falls."}\n')
    command = ["evaluate", str(tmp_path / "pairs.jsonl"), "--model", str(model_folder), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, "--engine", "onnx", "--rope-theta", "10000", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["model"] for row in rows] == [str(model_folder), f"{model_folder}, rope theta 10000"]


def test_a_model_takes_what_its_graph_reads_too() -> None:
    sizes = {path.name: path.stat().st_size for path in resolve_model_folder(None).iterdir()}
    whole = of_embedder(Embedder(engine="onnx"), "mini").num_bytes
    assert whole == sizes["model.onnx"] + sizes["model.safetensors"]
    codes = sum(size for name, size in sizes.items() if name.startswith("model.int8."))
    int8 = of_embedder(Embedder(engine="onnx-int8"), "mini").num_bytes
    assert int8 == codes + sizes["model.safetensors"] and codes > 10e6
