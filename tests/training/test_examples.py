"""Training data on disk: any source, checked once, mapped from the cache, read again when it has changed."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

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


def test_the_row_at_fault_is_named_and_nothing_of_the_source_is_kept(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    for change, sentence in (
        ({"passage": None}, "example 24 must have the columns query, passage for retrieval"),
        ({"passage": "\ud800"}, "example 24 must be UTF-8 text, got bytes or surrogates that are none"),
    ):
        data.write_bytes(lines([*PAIRS[:-1], {**PAIRS[-1], **change}]))
        with pytest.raises(InputError, match=sentence):
            read_dataset(str(data), "retrieval")
        with pytest.raises(InputError, match=sentence):  # again: a part of a source is no source
            read_dataset(str(data), "retrieval")
    with pytest.raises(InputError, match="must be a file, folder, glob or URL, got .*, which is not there"):
        read_dataset(str(tmp_path / "none.jsonl"), "retrieval")
    with pytest.raises(InputError, match="must be a URL of a known kind"):
        read_dataset("nowhere://bucket/pairs.jsonl", "retrieval")


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
