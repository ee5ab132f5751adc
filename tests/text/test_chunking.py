"""Spans: sentences of many scripts, fixed sizes, windows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvec.errors import InputError
from polyvec.text.chunking import check_spans, fixed_spans, passage_spans, sentence_spans, token_ranges, windows


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("今日は晴れ。明日は雨！", ["今日は晴れ。", "明日は雨！"]),
        ("यह एक है। यह दो है।", ["यह एक है।", "यह दो है।"]),
        ("هل هذا سؤال؟ نعم.", ["هل هذا سؤال؟", "نعم."]),
        ("Dr. Smith met J. Doe. They spoke.", ["Dr. Smith met J. Doe.", "They spoke."]),
        ("Use e.g. this one. It costs 3.50 euros.", ["Use e.g. this one.", "It costs 3.50 euros."]),
        ("A heading\nand a line", ["A heading", "and a line"]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("  ", []),
        ("", []),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text: str, sentences: list[str]) -> None:
    assert [text[a:b] for a, b in sentence_spans(text)] == sentences


@given(st.text(alphabet="ab .!?。\n\"'éД", max_size=80))
def test_sentences_cover_everything_but_whitespace(text: str) -> None:
    spans = sentence_spans(text)
    left = list(text)
    previous = 0
    for start, end in spans:
        assert previous <= start < end
        left[start:end] = [" "] * (end - start)
        previous = end
    assert "".join(left).strip() == ""


def test_passages_join_sentences_up_to_a_size_and_stop_at_blank_lines() -> None:
    text = "Aaaa. Bbbb. Cccc.\n\nDddd."
    assert [text[a:b] for a, b in passage_spans(text, size=12)] == ["Aaaa. Bbbb.", "Cccc.", "Dddd."]


def test_a_heading_opens_the_passage_below_it() -> None:
    text = "# Reset\n\nHold the button.\n\n***\n\nWait a while."
    assert [text[a:b] for a, b in passage_spans(text)] == ["# Reset\n\nHold the button.", "Wait a while."]


def test_a_heading_begins_a_passage_without_a_blank_line_too() -> None:
    text = "# Reset\nHold the button.\n## Passwords ##\nOpen the settings.\n#hash is no heading."
    assert [text[a:b] for a, b in passage_spans(text)] == [
        "# Reset\nHold the button.", "## Passwords ##\nOpen the settings.\n#hash is no heading.",
    ]  # fmt: skip


def test_headings_that_follow_each_other_open_one_passage_however_long() -> None:
    text = "# Manual\n\n## What if it is stuck? ##\n\n" + "Hold the button " * 20
    assert passage_spans(text) == [(0, len(text) - 1)]


def test_headings_without_end_are_cut() -> None:
    spans = passage_spans("# A comment of a program\n" * 1000)
    assert all(end - start <= 1400 for start, end in spans) and spans[-1][1] == 24_999


def test_the_head_of_a_table_stays_with_its_rows() -> None:
    text = "Prices follow.\n\n| kind | price |\n|---|---|\n| round | 3 euros |\n\nNo cards."
    assert [text[a:b] for a, b in passage_spans(text)] == [
        "Prices follow.", "| kind | price |\n|---|---|\n| round | 3 euros |", "No cards.",
    ]  # fmt: skip


def test_a_sentence_without_end_is_cut_between_words() -> None:
    text = "word " * 500 + "x" * 3000
    parts = [text[a:b] for a, b in passage_spans(text, size=100)]
    assert all(len(part) <= 400 for part in parts) and "".join(parts).replace(" ", "") == text.replace(" ", "")
    assert all(part.startswith("word") for part in parts[:5])


def test_tokens_belong_to_the_spans_they_overlap() -> None:
    offsets = np.array([[0, 3], [4, 6], [6, 9], [10, 12]], dtype=np.int32)
    assert token_ranges(offsets, [(0, 6), (6, 12), (3, 4), (5, 7)]).tolist() == [[0, 2], [2, 4], [1, 1], [1, 3]]
    assert fixed_spans(offsets, 3) == [(0, 9), (10, 12)]


@given(st.integers(1, 500), st.integers(2, 60), st.data())
def test_windows_keep_every_token_once(num_tokens: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    plan = windows(num_tokens, size, overlap)
    kept = [i for first, stop, keep in plan for i in range(keep, stop)]
    assert kept == list(range(num_tokens))
    assert all(stop - first <= size and first <= keep for first, stop, keep in plan)


@pytest.mark.parametrize("span", [(3, 2), (0, 99), (-1, 2), (1,), "ab"])
def test_a_span_outside_the_text_is_an_error(span: object) -> None:
    with pytest.raises(InputError, match=r"late_chunking\[0\]"):
        check_spans([span], 10)  # type: ignore[list-item]
