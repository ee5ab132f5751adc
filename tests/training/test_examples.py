"""Training data on disk: any source, checked once, mapped from the cache, read again when it has changed."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from polyvec.errors import InputError
from polyvec.model.weights import load_encoder
from polyvec.text.tokenizer import Tokenizer
from polyvec.training import examples
from polyvec.training.examples import read_dataset
from polyvec.training.vocabulary import read_texts
from polyvec.training.windows import read_windows

PAIRS: list[dict[str, Any]] = [
    {"query": f"question {i}", "passage": f"An answer of its own, number {i * i}.", "lang": "en" if i % 2 else "de"}
    for i in range(24)
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_folder_of_any_formats_is_one_dataset_in_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(PAIRS[:6])))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(PAIRS[6:12])))
    (tmp_path / "c.csv").write_text(
        "query,passage,lang\n" + "".join(f'{r["query"]},"{r["passage"]}",{r["lang"]}\n' for r in PAIRS[12:18])
    )
    pq.write_table(pa.Table.from_pylist(PAIRS[18:]), tmp_path / "d.parquet")
    for source in (str(tmp_path), f"{tmp_path}/*", f"file://{tmp_path}"):
        dataset = read_dataset(source, "retrieval")
        assert len(dataset) == 24 and dataset.kind == "pairs"
        assert list(dataset.walk("query", "passage", "lang")) == [tuple(row.values()) for row in PAIRS]
    taken = dataset.take([20, 3, 20])
    assert [row["query"] for row in taken] == ["question 20", "question 3", "question 20"]
    assert taken[0]["negatives"] == [] and taken[0]["source"] == ""


def test_what_was_read_is_mapped_and_not_read_again_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(lines(PAIRS))
    first = read_dataset(str(data), "retrieval")
    assert [Path(file["filename"]).suffix for file in first.rows.cache_files] == [".arrow"]
    read = examples.read_examples
    calls = []
    monkeypatch.setattr(examples, "read_examples", lambda *arguments: calls.append(1) or read(*arguments))
    assert list(read_dataset(str(data), "retrieval").walk("query")) == list(first.walk("query")) and not calls
    data.write_bytes(lines(PAIRS[::-1]))
    os.utime(data, ns=(1, 1))
    assert next(read_dataset(str(data), "retrieval").walk("query")) == ("question 23",) and calls == [1]


def test_a_lance_dataset_that_has_grown_is_read_again(tmp_path: Path) -> None:
    source = str(tmp_path / "pairs.lance")
    lance.write_dataset(pa.Table.from_pylist(PAIRS[:12]), source)
    assert len(read_dataset(source, "retrieval")) == 12
    date = os.stat(source).st_mtime_ns
    lance.write_dataset(pa.Table.from_pylist(PAIRS[12:]), source, mode="append")
    os.utime(source, ns=(date, date))  # as on object storage, where a folder has no date
    assert len(read_dataset(source, "retrieval")) == 24


def test_a_teacher_s_vectors_come_as_an_array(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    rows = [{"text": f"text {i}", "embedding": vector.tolist()} for i, vector in enumerate(vectors)]
    (tmp_path / "t.jsonl").write_bytes(lines(rows))
    found = read_dataset(str(tmp_path / "t.jsonl"), "distillation").embeddings([4, 0])
    expected = vectors[[4, 0]] / np.linalg.norm(vectors[[4, 0]], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
    (tmp_path / "t.jsonl").write_bytes(lines([{**row, "embedding": [10**400]} for row in rows]))
    with pytest.raises(InputError, match=r"example 1: 'embedding' must be a list of finite numbers, .* got \[1000"):
        read_dataset(str(tmp_path / "t.jsonl"), "distillation")


def test_the_row_at_fault_is_named_and_nothing_of_the_source_is_kept(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    for change, sentence in (
        ({"passage": None}, "example 24 must have the columns query, passage for retrieval"),
        ({"passage": "\ud800"}, "pairs.jsonl:24 must be UTF-8 text, got bytes or surrogates that are none"),
    ):
        data.write_bytes(lines([*PAIRS[:-1], {**PAIRS[-1], **change}]))
        with pytest.raises(InputError, match=sentence):
            read_dataset(str(data), "retrieval")
        with pytest.raises(InputError, match=sentence):  # again: a part of a source is no source
            read_dataset(str(data), "retrieval")
    data.write_bytes(lines(PAIRS).replace(PAIRS[-1]["passage"].encode(), b"\xff"))
    with pytest.raises(InputError, match="example 24 must be UTF-8 text, got bytes or surrogates that are none"):
        read_dataset(str(data), "retrieval")
    with pytest.raises(InputError, match="must be a file, folder, glob or URL, got .*, which is not there"):
        read_dataset(str(tmp_path / "none.jsonl"), "retrieval")
    with pytest.raises(InputError, match="must be a URL of a known kind"):
        read_dataset("nowhere://bucket/pairs.jsonl", "retrieval")


def test_the_file_and_row_at_fault_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(PAIRS[:12]))
    (tmp_path / "b.jsonl").write_bytes(lines([*PAIRS[12:14], {**PAIRS[14], "passage": 3}]))
    with pytest.raises(InputError, match=f"{tmp_path}: b.jsonl: example 3: 'passage' must be a text, got int"):
        read_dataset(str(tmp_path), "retrieval")
    (tmp_path / "b.jsonl").write_bytes(lines([{"text": "no lang", "lang": "jp"}]))
    (tmp_path / "a.jsonl").write_bytes(lines([{"text": "one"}]))
    with pytest.raises(InputError, match=f"{tmp_path}: b.jsonl: example 1: 'lang' must be a language's code"):
        read_texts([str(tmp_path)], print)


@pytest.mark.parametrize("in_memory", [False, True])
def test_graded_pairs_behind_a_first_row_without_a_grade_are_no_positives(tmp_path: Path, in_memory: bool) -> None:
    rows = [{"text_a": f"a {i}", "text_b": f"b {i}"} for i in range(9)]
    graded = [*rows[:4], *({**row, "score": i / 9} for i, row in enumerate(rows[4:]))]
    data = tmp_path / "sts.jsonl"
    sentence = f"{data}: example 5 must be of the kind of the first example (text_a, text_b) for text-matching, got "
    for found in (graded, rows):
        data.write_bytes(lines(found))
        if found is rows:
            assert read_dataset(str(data), "text-matching", found if in_memory else None).kind == "equals"
            continue
        with pytest.raises(InputError) as error:
            read_dataset(str(data), "text-matching", found if in_memory else None)
        assert str(error.value).startswith(f"{sentence}text_a, text_b, score; give all")


def test_a_cache_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_bytes(lines(PAIRS[:10]))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", full)
        with pytest.raises(InputError, match="room left, got .*: .*No space left on device; make room, or set HF_"):
            read_dataset(str(data), "retrieval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", data / "datasets")
    with pytest.raises(InputError, match=f"cache of datasets must be a folder to write in, .*got {data}/datasets: "):
        read_dataset(str(data), "retrieval")
    assert len(read_dataset(str(data), "retrieval", PAIRS[:10])) == 10


def test_running_text_is_stored_as_windows_of_tokens(model_folder: Path, tmp_path: Path) -> None:
    text = "The router of the house is slow today. " * 20
    rows = [{"text": text, "lang": "en"}] * 4 + [{"text": "Der Router ist langsam.", "lang": "de"}] * 6
    (tmp_path / "t.jsonl").write_bytes(lines(rows))
    config = load_encoder(model_folder).config
    file = model_folder / "tokenizer.json"
    windows = read_windows(str(tmp_path / "t.jsonl"), file, config.tokenizer_ids, 64)
    tokenizer = Tokenizer.from_file(file, **config.tokenizer_ids)
    inner = tokenizer.encode(text).input_ids[1:-1]
    first = windows.take(range(-(-len(inner) // 62)))  # of the first text: all of its tokens, in order
    assert [i for window in first for i in window["input_ids"][1:-1]] == inner.tolist()
    assert all(window["input_ids"][0] == config.bos_token_id and len(window["input_ids"]) <= 64 for window in first)
    assert {lang for (lang,) in windows.walk("lang")} == {"en", "de"}
