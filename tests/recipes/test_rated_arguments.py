"""Compared arguments to rated answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polyvec.data.failure_cases import quality_cases
from polyvec.errors import InputError
from recipes import rated_arguments

PAIR = """<annotatedArgumentPair>
<arg1><stance>Books</stance><text>{a[0]}</text><id>{a[1]}</id></arg1>
<arg2><stance>Books</stance><text>{b[0]}</text><id>{b[1]}</id></arg2>
<debateMetaData><title>TV or books?</title></debateMetaData><goldLabel>{gold}</goldLabel>
</annotatedArgumentPair>"""


def test_an_arguments_quality_is_the_part_of_its_pairs_that_it_won(tmp_path: Path) -> None:
    good, fair, poor = ("Books teach\n you more.", "1"), ("They are calm.", "2"), ("lol books", "3")
    pairs = ((good, fair, "a1"), (poor, good, "a2"), (fair, poor, "a1"))
    folder = tmp_path / "corpus/data/UKPConvArg1Strict-XML"
    folder.mkdir(parents=True)
    body = "".join(PAIR.format(a=a, b=b, gold=gold) for a, b, gold in pairs)
    (folder / "books.xml").write_text(f"<list>{body}</list>")
    rated = tmp_path / "rated.jsonl"
    rated_arguments.main(tmp_path / "corpus", rated)
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    assert {row["query"] for row in rows} == {"TV or books? Books"}
    assert {row["answer"]: row["quality"] for row in rows} == {
        "Books teach you more.": 1.0,
        "They are calm.": 0.5,
        "lol books": 0.0,
    }
    assert [(case.passage, case.negatives) for case in quality_cases(rows)] == [
        ("Books teach you more.", ("They are calm.", "lol books")),
        ("They are calm.", ("lol books",)),
    ]


def test_a_folder_without_the_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must hold data/UKPConvArg1Strict-XML/\*\.xml, got none"):
        rated_arguments.main(tmp_path, tmp_path / "rated.jsonl")
