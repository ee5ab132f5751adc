"""Failure cases: each builder finds the planted mistake and never calls an answer a negative."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyvec import Embedder
from polyvec.data.failure_cases import (
    entity_cases,
    overlap_cases,
    polar_cases,
    quality_cases,
    read_cases,
)
from polyvec.errors import InputError
from polyvec.training.mining import cases_file, mine_file


def test_overlap_takes_passages_that_repeat_the_query() -> None:
    pairs = [
        ("reset the router", "hold the button for ten seconds"),
        ("a song", "the router will reset the clock"),
        ("a film", "reset the old router the right way"),
        ("a cat", "it sleeps all day"),
    ]
    words = {w: i for i, w in enumerate(sorted({w for pair in pairs for text in pair for w in text.split()}))}
    ids = [tuple([words[w] for w in text.split()] for text in pair) for pair in pairs]
    cases = list(overlap_cases(pairs, [(q, p) for q, p in ids]))
    assert [case.query for case in cases] == ["reset the router"]
    assert cases[0].passage == pairs[0][1] and set(cases[0].negatives) == {pairs[1][1], pairs[2][1]}


def test_entities_share_a_part_of_the_name() -> None:
    pairs = [("Paris Hilton", "An heiress."), ("Paris France", "A city."), ("Conrad Hilton", "An hotelier."),
             ("Lake Como", "A lake.")]  # fmt: skip
    cases = {case.query: case.negatives for case in entity_cases(pairs)}
    assert set(cases["Paris Hilton"]) == {"A city.", "An hotelier."}
    assert "Lake Como" not in cases


def test_polar_questions_are_answered_by_what_entails_them() -> None:
    rows = [
        {"premise": "The shop opens at nine.", "hypothesis": "The shop opens in the morning.", "label": "entailment"},
        {"premise": "The shop opens at nine.", "hypothesis": "The shop never opens.", "label": "contradiction"},
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"},
    ]
    cases = list(polar_cases({**row, "lang": "en"} for row in rows))
    assert [c.query for c in cases] == ["Is it true that the shop opens in the morning?"]
    assert cases[0].passage == "The shop opens at nine." and cases[0].negatives == ("The shop never opens.",)
    with pytest.raises(InputError, match="label must be one of entailment, neutral, contradiction, got 'maybe'"):
        list(polar_cases([{**rows[0], "label": "maybe", "lang": "en"}]))


def test_quality_prefers_the_better_answer_by_a_clear_gap() -> None:
    rows = [{"query": "q", "answer": a, "quality": v} for a, v in (("best", 0.9), ("fair", 0.7), ("poor", 0.5))]
    rows += [{"query": f"r{i}", "answer": f"other {i}", "quality": 0.5} for i in range(20)]
    (case,) = quality_cases(rows)
    assert (case.passage, case.negatives[0], len(case.negatives)) == ("best", "poor", 7)
    assert "fair" not in case.negatives  # nearly as good is no mistake
    with pytest.raises(InputError, match="quality must lie between 0 and 1, got 3"):
        list(quality_cases([{"query": "q", "answer": "a", "quality": 3}]))
    with pytest.raises(InputError, match="quality must lie between 0 and 1, got 1000"):
        list(quality_cases([{"query": "q", "answer": "a", "quality": 10**400}]))


def test_written_cases_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"query": "q", "passage": "p", "negatives": ["n"]}) + "\n")
    assert read_cases(path)[0].negatives == ("n",)
    path.write_text(
        path.read_text() + json.dumps({"query": "f", "passage": "p", "negatives": ["n"], "lang": "fr"}) + "\n"
    )
    assert [case.query for case in read_cases(path, ["fr"])] == ["f"]
    with pytest.raises(InputError, match="at least one case of de, got none"):
        read_cases(path, ["de"])
    for row, sentence in (
        ({"query": "q", "passage": "p"}, "a list of texts 'negatives', got 'p' and None"),
        ({"query": "q", "passage": "p", "negatives": []}, "a list of texts 'negatives'"),
        ({"query": "q", "passage": "p", "negatives": ["p"]}, "'passage' must not be a negative too"),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(InputError, match=sentence):
            read_cases(path)


def test_files_of_pairs_become_files_of_negatives_and_cases(embedder: Embedder, tmp_path: Path) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    rows = [{"query": f"Paris number {i}", "passage": f"Paris number {i % 5} and something {i}"} for i in range(10)]
    rows.append({"query": "Paris number 0", "passage": "Paris number 0, again"})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, negatives = mine_file(embedder, str(data), output, count=3, margin=1.0)
    mined = [json.loads(line) for line in output.read_text().splitlines()]
    assert pairs == len(mined) == 11 and negatives == sum(len(row["negatives"]) for row in mined) > 0
    for row in mined:
        answers = {r["passage"] for r in rows if r["query"] == row["query"]}
        assert not answers & set(row["negatives"]) and len(row["negatives"]) <= 3
    dated = tmp_path / "dated.parquet"
    pq.write_table(
        pa.Table.from_pylist([{**row, "on": date(2026, 1, 2), "cost": Decimal("1.5")} for row in rows]), dated
    )
    assert mine_file(embedder, str(dated), output, count=3, margin=1.0) == (pairs, negatives)
    first = json.loads(output.read_text().splitlines()[0])
    assert (first["on"], first["cost"]) == ("2026-01-02", "1.5")
    cases, _ = cases_file(embedder, str(data), output, kind="overlap")
    assert cases == len(read_cases(output)) > 0
    with pytest.raises(InputError, match="kind must be one of overlap, entities, polar, quality, got 'f9'"):
        cases_file(embedder, str(data), output, kind="f9")
    data = tmp_path / "rated.csv"
    data.write_text("query,answer,quality\n" + "".join(f"q{i % 4},answer {i},0.{i}\n" for i in range(9)))
    assert cases_file(embedder, str(data), output, kind="quality")[0] == len(read_cases(output)) > 0
    data.write_text(data.read_text() + "q,a,better\n")
    with pytest.raises(InputError, match=r"rated.csv: example 10: quality must lie between 0 and 1, got 'better'"):
        cases_file(embedder, str(data), output, kind="quality")
    data = tmp_path / "inferences.jsonl"
    data.write_text('{"premise": "p", "hypothesis": "h", "label": "maybe", "lang": "en"}\n')
    with pytest.raises(InputError, match=r"inferences.jsonl: example 1: 'label' must be one of .*, got 'maybe'"):
        cases_file(embedder, str(data), output, kind="polar")
    with pytest.raises(InputError, match="margin between 0 and 1, got 3 and 2"):
        mine_file(embedder, str(data), output, count=3, margin=2)


def test_an_output_that_cannot_be_is_told_before_the_work_and_one_that_is_stays(
    embedder: Embedder, tmp_path: Path
) -> None:
    data, output = tmp_path / "pairs.jsonl", tmp_path / "cases.jsonl"
    data.write_text("".join(json.dumps({"query": f"q {i}", "passage": f"{i} p"}) + "\n" for i in range(9)))
    output.write_text("of before")
    with pytest.raises(InputError, match="must hold material for entities cases, got none"):
        cases_file(embedder, str(data), output, kind="entities")
    assert output.read_text() == "of before"
    for name, sentence in (
        ("out.parquet", "output must be JSON Lines, a name ending in .jsonl, got 'out.parquet'"),
        ("none/out.jsonl", "output folder must exist, got "),
    ):
        with pytest.raises(InputError, match=sentence):  # before the input, which is not there either
            mine_file(embedder, "none.jsonl", tmp_path / name)
        with pytest.raises(InputError, match=sentence):
            cases_file(embedder, "none.jsonl", tmp_path / name, kind="overlap")
