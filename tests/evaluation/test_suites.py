"""Suites with answers known by construction, and readers of files as users have them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from polyvec.errors import InputError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import data_hash, read_suites
from polyvec.evaluation.suites import TASKS, Labelled, Pairs, Ranking, Suite, score

EYE = np.eye(12, dtype=np.float32)


def by_number(texts: Sequence[str], task: str) -> Vectors:
    """The text "a 3" lies along axis 3, whatever else it says."""
    return EYE[[int(text.split()[-1]) for text in texts]]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def beir(folder: Path) -> Path:
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "t", "text": f"x {i}"} for i in range(4)])
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": f"? {i}"} for i in range(3)])
    (folder / "qrels").mkdir()
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td1\t2\n")
    return folder


def test_retrieval_finds_what_lies_nearest(tmp_path: Path) -> None:
    (suite,) = read_suites(beir(tmp_path / "set"))
    assert (
        isinstance(suite.data, Ranking)
        and suite.data.corpus["d0"] == "t x 0"
        and list(suite.data.queries) == ["q0", "q1"]
    )
    result = score(suite, by_number)
    assert (
        result.value == result.others["map"] == 1.0 and result.metric == "ndcg_at_10" and len(result.observations) == 2
    )


def test_a_folder_of_beir_is_read_up_to_a_limit_and_has_no_languages(tmp_path: Path) -> None:
    folder = beir(tmp_path / "set")
    (suite,) = read_suites(folder, limit=1)
    assert isinstance(suite.data, Ranking)
    assert list(suite.data.queries) == ["q0"] and suite.data.qrels == {"q0": {"d0": 1}} and len(suite.data.corpus) == 4
    with pytest.raises(InputError, match="must be a table for its languages to be chosen, got a folder; leave --lang"):
        read_suites(folder, langs=["de"])


def test_equal_scores_rank_as_in_trec_eval() -> None:
    def same(texts: Sequence[str], task: str) -> Vectors:
        return EYE[[0] * len(texts)]

    data = Ranking({"q": "q"}, {"a": "x", "b": "y"}, {"q": {"a": 1}})
    assert score(Suite("retrieval", "ties", data), same).others["mrr_at_10"] == 0.5  # b before a


def test_reranking_ranks_the_candidates_alone() -> None:
    data = Ranking({"q": "2"}, {"a": "2", "b": "2", "c": "3"}, {"q": {"c": 1}}, {"q": ["b", "c"]})
    assert score(Suite("reranking", "r", data), by_number).value == 0.5  # a would come before c too
    first = Ranking({"q": "3"}, data.corpus, data.qrels, data.candidates)
    assert score(Suite("reranking", "r", first), by_number).value == 1.0


def test_bitext_counts_own_translations() -> None:
    data = Pairs(["1", "2", "3", "4"], ["1", "2", "4", "3"])
    result = score(Suite("bitext", "b", data), by_number)
    assert result.value == result.others["accuracy"] == 0.5


def test_classification_and_clustering_of_separate_classes_are_perfect() -> None:
    labels = [str(i % 3) for i in range(36)]
    data = Labelled(labels, labels, labels, labels)
    assert score(Suite("classification", "c", data), by_number).value == 1.0
    assert score(Suite("clustering", "c", Labelled(labels, labels)), by_number).value == pytest.approx(1.0)


def test_each_kind_is_embedded_for_its_own_task() -> None:
    seen = []

    def noting(texts: Sequence[str], task: str) -> Vectors:
        seen.append(task)
        return by_number(texts, task)

    data = Ranking({"q": "1"}, {"a": "1"}, {"q": {"a": 1}}, {"q": ["a"]})
    score(Suite("reranking", "r", data), noting)
    score(Suite("retrieval", "r", Ranking(data.queries, data.corpus, data.qrels)), noting)
    score(Suite("sts", "s", Pairs(["1", "2"], ["1", "3"], [1.0, 0.0])), noting)
    score(Suite("retrieval", "ArguAna", data), noting, tasks=("text-matching", "text-matching"))
    assert seen == ["separation"] * 2 + ["retrieval.query", "retrieval.passage"] + ["text-matching"] * 4
    assert set(TASKS) == {
        "sts", "bitext", "retrieval", "reranking", "clustering", "classification", "pair-classification",
        "failure-cases",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"text_a": "1", "text_b": "1", "score": 0.5}, "sts"),
        ({"text_a": "1", "text_b": "1", "label": 1}, "pair-classification"),
        ({"text_a": "1", "text_b": "1"}, "bitext"),
        ({"en": "1", "text": "1", "lang": "de"}, "bitext"),
        ({"query": "1", "passage": "1"}, "retrieval"),
        ({"query": "1", "positives": ["1"], "negatives": ["2"]}, "reranking"),
        ({"text": "1", "label": "a"}, "clustering"),
    ],
)
def test_columns_say_the_kind(tmp_path: Path, row: dict[str, object], kind: str) -> None:
    (suite,) = read_suites(write_rows(tmp_path / "data.jsonl", [row]))
    assert suite.kind == kind and suite.group == row.get("lang", "")


def test_splits_make_classification_and_kind_overrides(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"{i % 2}", "label": i % 2, "split": s} for s in ("val", "test") for i in range(8)
    ]
    path = write_rows(tmp_path / "c.jsonl", rows)
    (suite,) = read_suites(path)
    assert suite.kind == "classification" and isinstance(suite.data, Labelled) and len(suite.data.train_texts) == 8
    assert read_suites(path, kind="clustering")[0].kind == "clustering"


def test_languages_are_suites_of_their_own(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text_a": "1", "text_b": "2", "score": i, "lang": lang} for lang in "de fr".split() for i in range(3)
    ]
    suites = read_suites(write_rows(tmp_path / "s.jsonl", rows), limit=2)
    assert [(s.group, len(s.data.first)) for s in suites if isinstance(s.data, Pairs)] == [("de", 2), ("fr", 2)]
    assert data_hash(suites[0]) == data_hash(suites[1])  # the same pairs, whatever they are called


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"left": "x"}\n', "must have columns of a suite, .* got left"),
        ("a.jsonl", "", "must have columns of a suite, .* got none"),
        ("a.jsonl", "{", "must be one JSON value"),
        ("a.jsonl", '{"text_a": "x", "score": 1}\n', "must have the columns of one kind of suite"),
        ("a.jsonl", '{"text_a": "x", "text_b": "y", "score": "high"}\n', "'score' must be a finite number, got 'high'"),
        ("a.jsonl", '{"text_a": "x", "text_b": "y", "score": NaN}\n', "1: 'score' must be a finite number, got nan"),
        ("a.jsonl", f'{{"text_a": "x", "text_b": "y", "score": 1{"0" * 400}}}\n', "a finite number, got 1000"),
        ("a.jsonl", '{"text_a": "x", "text_b": 5, "score": 1}\n', "example 1: 'text_b' must be a text, got int"),
        ("a.jsonl", '{"query": "x", "passage": ["y"]}\n', "example 1: 'passage' must be a text, got list"),
        ("a.jsonl", '{"text_a": "x", "text_b": "y"}\n{"text_a": "x"}\n', "example 2 must have the column 'text_b'"),
        ("a.jsonl", '{"text": "x", "label": "a", "split": ["test"]}\n', "'split' must be a text, got list"),
        ("a.jsonl", '{"text": "x", "label": ["a"]}\n', r"a text or a number, and not blank, got \['a'\]"),
        ("a.csv", "text,label\nx,a\ny,\n", "example 2: 'label' must be a text or a number, and not blank, got ''"),
        ("a.jsonl", '{"text": "x", "label": NaN}\n', "and not blank, got nan"),
        ("a.csv", "text,label,split\nx,a,test\n", "'split' must be train, val or test, with .* got test"),
        ("a.csv", "text,label,split\nx,a,test\nx,a,train\nx,a,dev\n", "'split' must be .* got dev, test, train"),
        ("a.csv", "text_a,text_b,score\n", "must hold at least one row, got none"),
        ("a.pdf", "x", "must be a folder, .jsonl"),
        ("a.jsonl", '{"query": "x", "positives": "y", "negatives": []}\n', "'positives' must be a list of texts"),
        ("a.jsonl", '{"query": "x", "positives": ["y"], "negatives": [5]}\n', r"must be a list of texts, got \[5\]"),
        ("a.jsonl", '{"query": "x", "positives": [], "negatives": ["y"]}\n', "at least one text, got none; leave"),
        ("a.parquet", "x", "must be a readable Parquet file"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_suites(tmp_path / name)


def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kind must be one of sts, .* got 'sum'"):
        read_suites(tmp_path, kind="sum")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq0\td9\t1\n",
            "qrels must name ids .* 1 unknown, the first 'd9'",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq9\td0\t1\n", "qrels must name ids .* the first 'q9'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "qrels must judge at least one query"),
        ("qrels/test.tsv", "query-id\tdoc\nq0\td0\n", "must have the columns query-id, corpus-id, score"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0.5\n", "'score' must be a whole number, got '0.5'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\tinf\n", "1: 'score' must be a finite number"),
        ("corpus.jsonl", "", "corpus must hold at least one text, got none"),
        (
            "corpus.jsonl",
            '{"_id": "d", "text": "x"}\n{"_id": "d", "text": "y"}\n',
            ":2 must have an id of its own, got 'd' again",
        ),
        ("queries.jsonl", '{"text": "x"}\n', "must have the column '_id', got text"),
    ],
)
def test_a_bad_beir_folder_is_named(tmp_path: Path, file: str, text: str, message: str) -> None:
    folder = beir(tmp_path / "set")
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_suites(folder)


def test_vectors_that_are_not_finite_are_refused() -> None:
    def broken(texts: Sequence[str], task: str) -> Vectors:
        vectors = by_number(texts, task).copy()
        vectors[1, 0] = np.nan
        return vectors

    with pytest.raises(InputError, match="vectors must be finite, got 1 of 2 with NaN or infinity in peer de"):
        score(Suite("bitext", "peer", Pairs(["1", "2"], ["1", "2"]), "de"), broken)
    with pytest.raises(InputError, match=r"one vector a text, got shape \(12, 12\) for 1 texts"):
        score(Suite("bitext", "peer", Pairs(["1"], ["1"])), lambda texts, task: EYE)


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        (Suite("sts", "s", Pairs(["1"], ["1"], [1.0])), "grades must differ"),
        (Suite("sts", "s", Pairs([], [], [])), "at least one pair"),
        (Suite("pair-classification", "s", Pairs(["1"], ["1"], [0.5])), "labels of pairs must be 0 or 1, got 0.5"),
        (Suite("pair-classification", "s", Pairs(["1", "2"], ["1", "3"], [1.0, 1.0])), "0 and 1, got 1 alone"),
        (Suite("classification", "s", Labelled(["1"], ["a"], ["1", "2"], ["a", "a"])), "two labels, got 'a' alone"),
        (Suite("clustering", "s", Labelled([], [])), "at least one text"),
        (Suite("clustering", "s", Labelled(["1"], ["1"])), "at least two labels"),
        (Suite("classification", "s", Labelled(["1"], ["1"])), "texts to learn from"),
        (Suite("summary", "s", Labelled(["1"], ["1"])), "kind must be one of"),
        (
            Suite("reranking", "s", Ranking({"q": "1"}, {"a": "1"}, {"q": {"a": 1}}, {})),
            "of every judged query, got none for 'q'",
        ),
    ],
)
def test_data_that_cannot_be_scored_is_named(suite: Suite, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(suite, by_number)
