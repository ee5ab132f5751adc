"""MTEB's own task classes over local data give the scores of our suites: one protocol, two implementations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # mteb and datasets warn of their own dependencies

mteb = pytest.importorskip("mteb")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import (  # noqa: E402
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from polyvec import Embedder  # noqa: E402
from polyvec.errors import InputError  # noqa: E402
from polyvec.evaluation.metrics import Vectors  # noqa: E402
from polyvec.evaluation.mteb import MtebModel, find_tasks, run_mteb, task_of  # noqa: E402
from polyvec.evaluation.suites import Labelled, Pairs, Ranking, Suite, score  # noqa: E402
from polyvec.evaluation.systems import System, of_embedder  # noqa: E402
from polyvec.samples import corpus  # noqa: E402

RNG = np.random.default_rng(0)
WORDS = sorted({word for row in corpus() if row["lang"] == "en" for word in row["text"].split()})
TEXTS = [" ".join(RNG.choice(WORDS, 6)) for _ in range(120)]
GRADES = RNG.integers(0, 6, 60).astype(float)
LABELS = RNG.integers(0, 2, 60)
CLASSES = RNG.integers(0, 4, 120)
PASSAGES = {f"d{i}": text for i, text in enumerate(TEXTS[:80])}
QUERIES = {f"q{i}": text for i, text in enumerate(TEXTS[80:100])}
QRELS = {q: {f"d{j}": int(1 + j % 2) for j in RNG.choice(80, 3, replace=False)} for q in QUERIES}
CANDIDATES = {q: [*grades, *(f"d{j}" for j in range(80) if f"d{j}" not in grades)][:12] for q, grades in QRELS.items()}
PAIRS = Pairs(TEXTS[:60], TEXTS[60:120])


def local_task(base: type, kind: str, main_score: str, dataset: Any, **attributes: Any) -> Any:
    """Return a task of mteb's class ``base`` that has its data at hand."""
    metadata = TaskMetadata(
        type=kind, name=f"Local{kind}", main_score=main_score, description="local", reference=None,
        dataset={"path": "local", "revision": "1"}, category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"],
        date=None, dialect=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
        modalities=["text"], sample_creation=None, bibtex_citation="",
    )  # fmt: skip

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = dataset, True

    return type(f"Local{kind}", (base,), {"metadata": metadata, "load_data": load_data, **attributes})()


def split(**columns: Any) -> DatasetDict:
    return DatasetDict({"test": Dataset.from_dict(columns)})


def ranking(candidates: dict[str, list[str]] | None) -> dict[str, Any]:
    texts = (Dataset.from_list([{"id": i, "text": t} for i, t in side.items()]) for side in (QUERIES, PASSAGES))
    queries, passages = texts
    own = {"queries": queries, "corpus": passages, "relevant_docs": QRELS, "top_ranked": candidates}
    return {"default": {"test": own}}


def labelled() -> DatasetDict:
    parts = {"train": slice(0, 70), "test": slice(70, 120)}
    return DatasetDict(
        {k: Dataset.from_dict({"text": TEXTS[s], "label": CLASSES[s].tolist()}) for k, s in parts.items()}
    )


CLASS_NAMES = list(map(str, CLASSES))
CASES = {
    "STS": (
        lambda: local_task(
            AbsTaskSTS, "STS", "cosine_spearman",
            split(sentence1=PAIRS.first, sentence2=PAIRS.second, score=GRADES.tolist()), min_score=0, max_score=5,
        ),
        Suite("sts", "s", Pairs(PAIRS.first, PAIRS.second, GRADES.tolist())),
    ),
    "BitextMining": (
        lambda: local_task(
            AbsTaskBitextMining, "BitextMining", "f1", split(sentence1=PAIRS.first, sentence2=PAIRS.second)
        ),
        Suite("bitext", "b", PAIRS),
    ),
    "PairClassification": (
        lambda: local_task(
            AbsTaskPairClassification, "PairClassification", "cosine_ap",
            split(sentence1=PAIRS.first, sentence2=PAIRS.second, labels=LABELS.tolist()),
        ),
        Suite("pair-classification", "p", Pairs(PAIRS.first, PAIRS.second, LABELS.astype(float).tolist())),
    ),
    "Classification": (
        lambda: local_task(AbsTaskClassification, "Classification", "accuracy", labelled()),
        Suite("classification", "c", Labelled(TEXTS[70:], CLASS_NAMES[70:], TEXTS[:70], CLASS_NAMES[:70])),
    ),
    "Clustering": (
        lambda: local_task(
            AbsTaskClustering, "Clustering", "v_measure", split(sentences=TEXTS, labels=CLASSES.tolist()),
            max_fraction_of_documents_to_embed=None,
        ),
        Suite("clustering", "k", Labelled(TEXTS, CLASS_NAMES)),
    ),
    "Retrieval": (
        lambda: local_task(AbsTaskRetrieval, "Retrieval", "ndcg_at_10", ranking(None)),
        Suite("retrieval", "r", Ranking(QUERIES, PASSAGES, QRELS)),
    ),
    "Reranking": (
        lambda: local_task(AbsTaskRetrieval, "Reranking", "map_at_1000", ranking(CANDIDATES)),
        Suite("reranking", "r", Ranking(QUERIES, PASSAGES, QRELS, CANDIDATES)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_mteb_and_our_suites_agree(kind: str, model_folder: Path, embedder: Embedder) -> None:
    task, suite = CASES[kind]
    model = MtebModel(model_folder, engine="onnx")
    result = mteb.evaluate(model, task(), cache=None, co2_tracker=False, show_progress_bar=False)
    theirs = result.task_results[0].scores["test"][0]["main_score"]
    ours = score(suite, lambda texts, name: embedder.encode(list(texts), task=name)).value
    assert 0 < ours < 1 or kind == "STS"
    if suite.kind in ("retrieval", "reranking"):
        ours = round(ours, 5)  # as mteb gives them
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "side", "task"),
    [
        ("Retrieval", "SciFact", "query", "retrieval.query"),
        ("Retrieval", "SciFact", "document", "retrieval.passage"),
        ("Retrieval", "QuoraRetrieval", "document", "text-matching"),
        ("Retrieval", "CQADupstackUnixRetrieval", "query", "text-matching"),
        ("Retrieval", "LEMBNeedleRetrieval", "document", "text-matching"),
        ("Reranking", "AskUbuntu", "query", "separation"),
        ("Clustering", "Reddit", None, "separation"),
        ("MultilabelClassification", "x", None, "classification"),
        ("PairClassification", "x", None, "classification"),
        ("Summarization", "x", None, "text-matching"),
        ("BitextMining", "x", None, "text-matching"),
    ],
)
def test_each_task_type_has_the_adapter_of_the_paper(kind: str, name: str, side: str | None, task: str) -> None:
    assert task_of(kind, name, side) == task


def test_a_task_type_without_adapter_is_named() -> None:
    with pytest.raises(InputError, match="task type must be one of STS, .* got 'ImageClustering' of x"):
        task_of("ImageClustering", "x", None)


def test_a_width_and_dtype_are_in_the_name_that_mteb_keeps_results_under(model_folder: Path) -> None:
    meta = MtebModel(model_folder, engine="onnx", dimensions=16, dtype="binary").mteb_model_meta
    assert meta.name == "polyvec/tiny-onnx-float32-16-binary" and meta.embed_dim == 16


@pytest.mark.parametrize(
    "options", [{"dimensions": 0}, {"dimensions": 33}, {"dimensions": 12, "dtype": "binary"}, {"dtype": "int4"}]
)
def test_a_width_or_dtype_that_the_model_has_not_is_told_before_a_run(model_folder: Path, options: Any) -> None:
    with pytest.raises(InputError, match="^(dimensions|dtype) must be"):
        MtebModel(model_folder, engine="onnx", **options)
    peer = System("peer", "w", "none", 32, lambda texts, _, __: np.zeros((len(texts), 32), np.float32))
    with pytest.raises(InputError, match="^(dimensions|dtype) must be"):
        MtebModel(peer, **options)


def test_an_open_embedder_is_a_model_too(embedder: Embedder) -> None:
    assert MtebModel(embedder).stamp == MtebModel(embedder.folder, engine="onnx").stamp


def test_a_run_keeps_mtebs_json_and_our_stamp_and_goes_on(embedder: Embedder, tmp_path: Path) -> None:
    calls = 0
    system = of_embedder(embedder, "tiny")
    real = system.encode
    assert real is not None

    def encode(texts: Sequence[str], adapter: str | None, prompt: str) -> Vectors:
        nonlocal calls
        calls += 1
        return real(texts, adapter, prompt)

    counted = replace(system, encode=encode)
    (line,) = run_mteb([CASES["STS"][0]()], [counted], tmp_path, dimensions=[16])
    assert line.startswith("polyvec/tiny-onnx-float32-16-float32  LocalSTS  ") and calls > 0
    result = json.loads(
        (tmp_path / f"results/polyvec__tiny-onnx-float32-16-float32/{system.weights}/LocalSTS.json").read_text()
    )
    assert f"{result['scores']['test'][0]['main_score']:.4f}" == line.split()[-1]
    (path,) = (tmp_path / "stamps").iterdir()
    stamp = json.loads(path.read_text())
    assert stamp["weights"] == system.weights and stamp["dimensions"] == 16 and "mteb" in stamp["versions"]
    query, document = stamp["tasks"]["Retrieval"]
    assert query["adapter"] == "retrieval.query" and query["prompt"].startswith("Represent the query")
    assert document["adapter"] == "retrieval.passage"
    before = calls
    assert list(run_mteb([CASES["STS"][0]()], [counted], tmp_path, dimensions=[16])) == [line] and calls == before
    other = replace(counted, weights="0" * 16)  # of which mteb's cache holds nothing
    assert list(run_mteb([CASES["STS"][0]()], [other], tmp_path, dimensions=[16])) and calls > before


def test_task_types_without_a_suite_of_ours_run_too(embedder: Embedder, tmp_path: Path) -> None:
    machine = [[TEXTS[(i + j) % 120] for j in range(4)] for i in range(10)]
    relevance = [[float((i * j) % 5) for j in range(4)] for i in range(10)]
    summaries = local_task(
        AbsTaskSummarization, "Summarization", "cosine_spearman",
        split(text=TEXTS[:10], human_summaries=[[t] for t in TEXTS[10:20]], machine_summaries=machine,
              relevance=relevance),
        min_score=0, max_score=5,
    )  # fmt: skip
    many = DatasetDict(
        {
            k: Dataset.from_dict({"text": TEXTS[s], "label": [[int(c), 4 + int(c) % 2] for c in CLASSES[s]]})
            for k, s in {"train": slice(0, 70), "test": slice(70, 120)}.items()
        }
    )
    labels = local_task(AbsTaskMultilabelClassification, "MultilabelClassification", "accuracy", many)
    lines = list(run_mteb([summaries, labels], [of_embedder(embedder, "tiny")], tmp_path))
    assert [line.split()[1] for line in lines] == ["LocalSummarization", "LocalMultilabelClassification"]


def test_names_of_mteb_are_found_or_named() -> None:
    assert [task.metadata.name for task in find_tasks("STSBenchmark")] == ["STSBenchmark"]
    assert len(find_tasks("MTEB(eng, v2)")) == 41
    with pytest.raises(InputError, match="--mteb must name a benchmark or task of mteb .*, got 'MTEB-nowhere'"):
        find_tasks("MTEB-nowhere")


def test_without_the_hub_the_command_says_so(model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "polyvec", "evaluate", "--mteb", "STSBenchmark", "--model", str(model_folder)]
    result = subprocess.run(
        [*command, "-o", str(tmp_path / "out")], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "the data of MTEB's STSBenchmark must come from huggingface.co or its cache on this machine" in result.stderr


def test_a_peer_without_vectors_is_refused() -> None:
    with pytest.raises(InputError, match="mteb scores vectors, and bm25 has none"):
        MtebModel("bm25")
