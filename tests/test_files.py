"""Records in, vectors out, and nothing half-written."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from polyvec import files
from polyvec.atomic import whole_file
from polyvec.errors import InputError
from polyvec.files import check_same_model, column_names, is_vector_file, read_records, read_vectors, vector_writer
from polyvec.inputs import read_input

STAMP = {"weights": "abc", "dimensions": 16, "dtype": "float32"}


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "one\n\ntwo", ["one", "", "two"]),
        ("a.jsonl", '{"text": "one"}\n"two"\n', ["one", "two"]),
        ("a.ndjson", '{"text": "one"}\n"two"\n', ["one", "two"]),
        ("a.csv", 'id,text\n1,"one\nline"\n2,two\n', ["one\nline", "two"]),
        ("a.tsv", "text\tid\none\t1\n", ["one"]),
        ("a.csv", 'text,id\n5" disk,1,\n', ['5" disk']),
        ("a.txt", "\ufeffone\n", ["one"]),
        ("a.jsonl", '\ufeff"one"\n', ["one"]),
        ("a.csv", "\ufefftext,id\none,1\n", ["one"]),
    ],
)
def test_every_format_gives_its_texts(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    assert [r["text"] for r in read_records(path)] == texts
    assert [r["text"] for _, r in read_input(str(path), column="text")] == texts


def test_a_byte_order_mark_is_in_no_column_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufefftext,id\n", encoding="utf-8")
    assert column_names(tmp_path / "a.csv") == ["text", "id"]


def test_columns_are_those_of_the_first_row(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.ndjson"):
        (tmp_path / name).write_text('{"text": "one", "id": 1}\n')
        assert column_names(tmp_path / name) == ["text", "id"]
    (tmp_path / "a.json").write_text('[{"text": "one"}]')
    with pytest.raises(InputError, match=r"a\.json must be JSON Lines"):
        column_names(tmp_path / "a.json")


def test_stdin_is_read_as_a_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for data, texts in ((b"\xef\xbb\xbfone\n\ntwo", ["one", "", "two"]), ("Käse\n".encode(), ["Käse"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
        assert [r["text"] for r in read_records(None)] == texts
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Käse".encode("latin-1")), encoding="utf-8"))
    with pytest.raises(InputError, match="stdin:1 must be UTF-8 text, got byte 0xe4"):
        list(read_records(None))


def test_parquet_gives_its_texts_and_keeps_other_columns(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", "two"], "id": [1, 2]}), path)
    assert list(read_records(path, column="body")) == [{"body": "one", "id": 1}, {"body": "two", "id": 2}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', r"a\.jsonl:2 must have the column 'text', got body"),
        ("a.jsonl", b"{oops\n", r"a\.jsonl:1 must be one JSON value"),
        ("a.jsonl", b'{"text": "a", "n": 1' + b"0" * 5000 + b"}", r"a\.jsonl:1 must be one JSON value"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1 must be a JSON object or string, got list"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: 'text' must be a text, got NoneType"),
        (
            "a.jsonl",
            b'"\\ud83d\\ude00"\n{"text": "b", "more": ["\\uD83D"]}\n',
            r"a\.jsonl:2 must be UTF-8 text, got bytes",
        ),
        (
            "a.json",
            b'["one"]',
            r"a\.json must be JSON Lines, an object or a text a line, got \.json; write an array so",
        ),
        ("a.csv", b"id\n1\n", r"a\.csv:2 must have the column 'text', got id"),
        ("a.csv", b'text\n"one\ntwo\nthree\n', r"a\.csv:2 must be CSV, got unexpected end of data"),
        ("a.tsv", b'text\tid\n"One" she said\t1\n', r"a\.tsv:2 must be CSV, got '\t' expected after '\"'"),
        ("a.csv", b"text,id\none, two,1\n", r"a\.csv:2 must have a value a column, got more; quote values"),
        ("a.txt", b"\xef\xbb\xbf" + b"ok\n" * 9999 + b"\xff\n", r"a\.txt:10000 must be UTF-8 text, got byte 0xff"),
        ("a.csv", b"text\nok\n\xff\n", r"a\.csv:3 must be UTF-8 text, got byte 0xff"),
        ("a.jsonl", b'"ok"\n"\xff"\n', r"a\.jsonl:2 must be UTF-8 text, got byte 0xff"),
        ("a.parquet", b"PAR?", r"a\.parquet must be a readable Parquet file"),
        ("missing.txt", None, r"missing\.txt must be a readable file, got: No such file"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_row(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_records(path))


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary", "ubinary"])
def test_vectors_come_back_bit_for_bit(tmp_path: Path, suffix: str, dtype: str) -> None:
    path = tmp_path / f"vectors{suffix}"
    stamp = {**STAMP, "dtype": dtype}
    rng = np.random.default_rng(0)
    width = 2 if "binary" in dtype else 16
    kind = {"binary": "int8", "ubinary": "uint8"}.get(dtype, dtype)
    whole = "int" in np.dtype(kind).name
    rows = rng.integers(0, 100, (5000, width)) if whole else rng.normal(size=(5000, width))
    rows = rows.astype(kind)
    with vector_writer(path, stamp) as writer:
        for i, row in enumerate(rows):
            writer.write({"text": f"t{i}"}, row)
    vectors, records, found = read_vectors(path)
    np.testing.assert_array_equal(vectors, rows)
    assert vectors.dtype == rows.dtype and found == stamp
    assert records == ([] if suffix == ".npy" else [{"text": f"t{i}"} for i in range(5000)])


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_record_comes_back_whole_beside_the_new_vector(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vectors{suffix}"
    text = "one\u2028two\u2029three\x85four\r\nfive\x0csix"
    with vector_writer(path, STAMP) as writer:
        writer.write({"text": text, "embedding": "of before"}, np.ones(16, np.float32))
    vectors, records, _ = read_vectors(path)
    assert records == [{"text": text}] and vectors.tolist() == [[1.0] * 16]


def test_numbers_that_json_has_no_word_for_are_null(tmp_path: Path) -> None:
    path = tmp_path / "vectors.jsonl"
    record = {"text": "a", "n": float("nan"), "more": [{"x": float("-inf"), "y": 0.5}], "day": date(2026, 1, 2)}
    with vector_writer(path, STAMP) as writer:
        writer.write(record, np.ones(16, np.float32))
    assert "NaN" not in (content := path.read_text()) and "Infinity" not in content
    assert read_vectors(path)[1] == [{"text": "a", "n": None, "more": [{"x": None, "y": 0.5}], "day": "2026-01-02"}]


def test_parquet_has_the_columns_and_types_that_all_rows_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PARQUET_ROWS", 2)
    path = tmp_path / "vectors.parquet"
    rows = np.arange(7 * 16, dtype=np.float32).reshape(7, 16)
    records = [
        {"text": "a", "n": None}, {"text": "b", "id": 7}, {"text": "c", "n": 1}, {"text": "d"}, {"text": "e", "n": 2.5},
        {"text": "f", "tags": ["x"]}, {"text": "g"},
    ]  # fmt: skip
    with vector_writer(path, STAMP) as writer:
        for record, row in zip(records, rows, strict=True):
            writer.write(record, row)
    vectors, found, stamp = read_vectors(path)
    np.testing.assert_array_equal(vectors, rows)
    assert stamp == STAMP and list(tmp_path.iterdir()) == [path]
    assert found == [{name: record.get(name) for name in ("text", "n", "id", "tags")} for record in records]


@pytest.mark.parametrize("place", [1, 3])
def test_a_column_of_two_types_is_told_with_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(files, "_PARQUET_ROWS", 2)
    message = rf"column of Parquet must have one type, got in rows {place} to {place + 1}: .*id.*; write \.jsonl"
    with pytest.raises(InputError, match=message), vector_writer(tmp_path / "vectors.parquet", STAMP) as writer:
        for i in range(1, 5):
            writer.write({"text": "a", "id": "x" if i == place else i}, np.ones(16, np.float32))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_no_rows_make_a_whole_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vectors{suffix}"
    with vector_writer(path, STAMP):
        pass
    assert len(read_vectors(path)[0]) == 0


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_a_failure_leaves_the_good_file_and_no_partial_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"vectors{suffix}"
    row = np.ones(16, np.float32)
    with vector_writer(path, STAMP) as writer:
        writer.write({"text": "good"}, row)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RuntimeError), vector_writer(path, {**STAMP, "weights": "other"}) as writer:
        writer.write({"text": "bad"}, row)
        raise RuntimeError("killed")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        real = getattr(os, name)
        return lambda *arguments: (done.append(name), real(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    with whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert done == ["fsync", "replace", "fsync"]


def test_an_output_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.jsonl, \.parquet, \.npy, got 'vectors\.txt'"):
        vector_writer(tmp_path / "vectors.txt", STAMP).__enter__()
    with pytest.raises(InputError, match="folder must exist"):
        vector_writer(tmp_path / "no" / "vectors.npy", STAMP).__enter__()
    (tmp_path / "vectors.npy").mkdir()
    with pytest.raises(InputError, match=r"output must be a file, got the folder .*vectors\.npy"):
        vector_writer(tmp_path / "vectors.npy", STAMP).__enter__()


def test_vectors_meet_those_of_their_task_or_of_its_partner() -> None:
    def check(first: str | None, second: str | None) -> None:
        check_same_model({**STAMP, "task": first}, {**STAMP, "task": second}, ("a", "b"))

    for first, second in (("separation",) * 2, (None, None), ("retrieval.query", "retrieval.passage")):
        check(first, second)
        check(second, first)
    for first, second in (("separation", "classification"), ("separation", None), (None, "retrieval.query")):
        with pytest.raises(InputError, match=f"b must hold vectors of the same task as a, {first!r}, got {second!r}"):
            check(first, second)


def test_a_vector_file_is_one_that_has_a_stamp(tmp_path: Path) -> None:
    for name, stamp in (("a.txt", STAMP), ("a.jsonl", {"polyvec": "notes"}), ("b.jsonl", []), ("c.jsonl", STAMP)):
        (tmp_path / name).write_text('"one"\n')
        (tmp_path / f"{name}.json").write_text(json.dumps(stamp))
    (tmp_path / "d.jsonl").write_text('"one"\n')
    assert [p.name for p in sorted(tmp_path.iterdir()) if is_vector_file(p)] == ["c.jsonl"]


def test_a_foreign_vector_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "vectors.npy"
    np.save(path, np.ones((2, 16)))
    with pytest.raises(InputError, match="written by polyvec"):
        read_vectors(path)
    (tmp_path / "vectors.jsonl").write_text(json.dumps({"text": "no vector"}))
    with pytest.raises(InputError, match="written by polyvec"):
        read_vectors(tmp_path / "vectors.jsonl")
