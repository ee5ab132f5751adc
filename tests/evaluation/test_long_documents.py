"""Long documents have the lengths that they say and the answers that they hide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyvec.cli import app
from polyvec.errors import InputError
from polyvec.evaluation.long_documents import _num_tokens, articles, needle, passkey
from polyvec.evaluation.readers import open_suites
from polyvec.evaluation.suites import Ranking, Suite
from polyvec.samples import corpus

LENGTHS = (256, 1024)
TEXTS = [row["text"] for row in corpus()]
ROWS = [
    {"query": f"What is {lang} {i}?", "passage": f"{TEXTS[i]} {TEXTS[i + 1]} Mark {lang} {i}.", "lang": lang}
    for lang in ("en", "de")
    for i in range(len(TEXTS) - 1)
]


def ranking(suite: Suite) -> Ranking:
    assert suite.kind == "retrieval" and isinstance(suite.data, Ranking)
    return suite.data


def check_lengths(suites: list[Suite]) -> None:
    for suite in suites:
        tokens = _num_tokens(list(ranking(suite).corpus.values()))
        assert suite.num_tokens * 0.85 <= min(tokens) <= max(tokens) <= suite.num_tokens, (suite.label, tokens)


def test_a_passkey_is_in_its_own_document_alone() -> None:
    suites = passkey(6, LENGTHS)
    check_lengths(suites)
    for suite in suites:
        data = ranking(suite)
        for query, (document,) in data.qrels.items():
            match = re.fullmatch(r"What is the pass key for (.+)\?", data.queries[query])
            assert match is not None
            assert [d for d, text in data.corpus.items() if match[1] in text] == [document]
    depths = [ranking(suites[1]).corpus[f"d{i}"].index("pass key") for i in range(6)]
    assert len(set(depths)) == 6  # anywhere in the document


def test_a_needle_lies_between_passages_of_its_language() -> None:
    suites = needle(ROWS, Path("rows"), count=12, lengths=LENGTHS)
    assert [suite.group for suite in suites] == ["en 256", "en 1024", "de 256", "de 1024"]
    check_lengths(suites)
    passages = {row["query"]: row for row in ROWS}
    for suite in suites:
        data, lang = ranking(suite), suite.group.split()[0]
        assert len(data.queries) == 12
        for query, (document,) in data.qrels.items():
            row = passages[data.queries[query]]
            assert row["lang"] == lang and row["passage"] in data.corpus[document]
    same = [ranking(suite).queries for suite in suites]
    assert same[0] == same[1] and same[2] == same[3]  # only the length varies


def test_articles_are_cut_to_each_length() -> None:
    rows = [{"title": f"Article {i}", "text": f"{i} goes on. " * 400, "lang": "en"} for i in range(11)]
    suites = articles([*rows, {"title": "short", "text": "no", "lang": "en"}], Path("rows"), lengths=LENGTHS)
    check_lengths(suites)
    assert [len(ranking(suite).queries) for suite in suites] == [11, 11]
    assert all(ranking(suites[1]).corpus[d].startswith(ranking(suites[0]).corpus[d]) for d in ranking(suites[0]).corpus)


def test_too_little_for_long_documents_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rows must hold ten passages of at most 232 tokens in a language"):
        needle(ROWS[:3], Path("rows"))
    with pytest.raises(InputError, match="rows must hold ten titled texts of 4096 tokens in a language"):
        articles([{"title": "a", "text": "b"}], Path("rows"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"passage": "x", "lang": "en"}\n')
    with pytest.raises(InputError, match="must have rows with query and passage for needle"):
        open_suites(f"needle={path}")
    with pytest.raises(InputError, match="must have rows with query and passage for needle, got none; see --lang"):
        open_suites(f"needle={path}", langs=["de"])


def test_failure_cases_rank_an_answer_among_its_negatives(tmp_path: Path) -> None:
    path = tmp_path / "overlap.jsonl"
    case = {"query": "q", "passage": "right", "negatives": ["wrong", "worse"]}
    path.write_text(json.dumps(case) + "\n" + json.dumps({**case, "query": "r", "negatives": ["bad"]}) + "\n")
    (suite,) = open_suites(f"failure-cases={path}")
    assert suite.kind == "failure-cases" and isinstance(suite.data, Ranking)
    assert suite.data.candidates is not None and [len(c) for c in suite.data.candidates.values()] == [3, 2]
    assert len(open_suites(f"failure-cases={path}", limit=1)[0].data.queries) == 1  # type: ignore[union-attr]
    path.write_text(json.dumps({**case, "negatives": []}) + "\n")
    with pytest.raises(InputError, match="must have a text 'passage' and a list of texts 'negatives'"):
        open_suites(f"failure-cases={path}")


RATED = [
    {"query": f"How do I reset the {thing}?", "answer": f"{answer} {thing}.", "quality": quality}
    for thing in ("router", "printer", "phone", "clock")
    for answer, quality in (
        ("Hold its button for ten seconds, says the manual of the", 0.9),
        ("How do I reset the", 0.2),
    )
]
#: Kind of failure -> material, of which the first case has a mistake for those who count words.
MATERIAL = {
    "overlap": [
        {"query": f"how to reset model {n}", "passage": f"Hold the button of {n} for {i} seconds."}
        for i, n in enumerate("ABCDE")
    ]
    + [{"query": f"song {n}", "passage": f"{n} sings how to reset model {n}"} for n in "VWXYZ"],
    "entities": [
        {"query": f"{first} {last}", "passage": f"{first} is known for {last} {i}."}
        for i, (first, last) in enumerate(
            (f, n) for f in ("Paris", "Berlin", "Rome") for n in ("Hilton", "Ford", "Way")
        )
    ],
    "polar": [
        {"premise": f"Shop {i} opens at nine.", "hypothesis": hypothesis.format(i), "label": label, "lang": "en"}
        for i in range(3)
        for hypothesis, label in (
            ("Shop {} opens in the morning.", "entailment"),
            ("Shop {} never opens in the morning.", "contradiction"),
            ("Shop {} sells bread in the morning.", "neutral"),
        )
    ],
    "quality": RATED,
}


@pytest.mark.parametrize("kind", MATERIAL)
def test_every_kind_of_failure_is_built_and_measured(kind: str, tmp_path: Path, model_folder: Path) -> None:
    """Words prefer what repeats the query, which is the mistake that polar and rated answers are made of."""
    data, cases = tmp_path / "material.jsonl", tmp_path / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in MATERIAL[kind]))
    build = ["train", "cases", "--kind", kind, "--data", str(data), "-o", str(cases), "--model", str(model_folder)]
    built = CliRunner().invoke(app, build)
    assert built.exit_code == 0, built.output
    scores = {}
    for model in ("bm25", str(model_folder)):
        command = ["evaluate", f"failure-cases={cases}", "--model", model, "-o", str(tmp_path / "out"), "--json"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)["results"][-1:]
        assert (row["kind"], row["suite"]) == ("failure-cases", kind)
        assert 0 < row["low"] <= row["score"] <= row["high"] <= 1
        scores[model] = row["score"]
    if kind in ("polar", "quality"):
        assert scores["bm25"] < 0.6


def test_the_command_runs_words_over_a_passkey(tmp_path: Path) -> None:
    command = ["evaluate", "passkey", "--limit", "4", "--model", "bm25", "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, [*command, "--html", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["num_tokens"] for row in rows] == [256, 512, 1024, 2048, 4096, 8192]
    assert [row["score"] for row in rows] == [1.0] * 6
    assert "Quality against length" in (tmp_path / "page.html").read_text()
