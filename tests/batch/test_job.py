"""A job into a folder: every row once, in any format; the same again after any stop; nothing trusted by luck."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from polyvec import Embedder
from polyvec.batch.ceiling import told
from polyvec.batch.engines import Here
from polyvec.batch.job import Job
from polyvec.batch.run import Prepared, prepare, run
from polyvec.batch.trial import WorkerError
from polyvec.batch.worker import Worker
from polyvec.errors import InputError
from tests.batch.conftest import Output

Embed = Callable[..., Output]
Plan = Callable[..., Prepared]

TEXTS = [f"the router number {i % 9} is late {'again ' * (i % 3)}" for i in range(26)]


def write(path: Path, texts: list[Any] = TEXTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": t, "lang": "en", "key": i}) + "\n" for i, t in enumerate(texts)))
    return path


def vectors(table: pa.Table) -> np.ndarray:
    return np.array(table["embedding"].to_pylist())


def test_every_row_is_there_once_in_order_with_what_was_kept(tmp_path: Path, embed: Embed, embedder: Embedder) -> None:
    output = embed(write(tmp_path / "in.jsonl"), tmp_path / "out", keep=("lang",), task="separation")
    table = output.table
    assert table["id"].to_pylist() == [f"in.jsonl:{i + 1}" for i in range(26)]
    assert table["lang"].to_pylist() == ["en"] * 26
    expected = list(embedder.encode_stream(TEXTS, task="separation"))
    np.testing.assert_allclose(vectors(table), [e.vector for e in expected], atol=1e-6)
    assert table["num_tokens"].to_pylist() == [e.num_tokens for e in expected]
    summary = output.manifest["summary"]
    assert summary["rows"] == 26 and summary["distinct"] == len(set(TEXTS)) < 26 and summary["parts"] == 7
    assert sorted(p.name for p in output.folder.iterdir() if p.name[0] == "_") == ["_manifest.json", "_rejects.jsonl"]
    stamp = json.loads(pq.read_schema(output.folder / output.manifest["parts"][0]["name"]).metadata[b"polyvec"])
    assert stamp["fingerprint"] == embedder.fingerprint(task="separation")


def test_every_format_gives_the_same_vectors(tmp_path: Path, embed: Embed) -> None:
    plain = write(tmp_path / "in.jsonl")
    data = plain.read_bytes()
    for name in ("in.jsonl.gz", "in.JSONL.GZ"):
        (tmp_path / name).write_bytes(gzip.compress(data))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(data))
    (tmp_path / "in.csv").write_text("key,text,lang\n" + "".join(f'{i},"{t}",en\n' for i, t in enumerate(TEXTS)))
    table = pa.table({"text": TEXTS, "lang": ["en"] * 26, "key": range(26)})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=10)
    (tmp_path / "in.txt").write_text("".join(f"{t}\n" for t in TEXTS))
    lancedb.connect(tmp_path).create_table("in", table)
    first = embed(plain, tmp_path / "out", dtype="int8").table
    for name in ("in.jsonl.gz", "in.JSONL.GZ", "in.jsonl.zst", "in.csv", "in.parquet", "in.txt", "in.lance"):
        found = embed(tmp_path / name, tmp_path / f"out-{name}".replace(".", "-"), dtype="int8").table
        assert found["embedding"].equals(first["embedding"]), name
        assert found["id"].to_pylist() == [f"{name}:{i + 1}" for i in range(26)]


def test_a_broken_quote_in_csv_stops_the_job_before_anything_is_embedded(tmp_path: Path, embed: Embed) -> None:
    (tmp_path / "in.csv").write_text('key,text\n1,one\n2,"two" or\nthree\n4,four\n')
    with pytest.raises(InputError, match=r"in\.csv:3 must be CSV, got ',' expected after"):
        embed(tmp_path / "in.csv", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_folders_globs_and_urls_are_inputs(tmp_path: Path, embed: Embed, new_job: Callable[..., Job]) -> None:
    write(tmp_path / "in" / "a.jsonl", TEXTS[:5])
    write(tmp_path / "in" / "deep" / "b.jsonl", TEXTS[5:9])
    write(tmp_path / "in" / ".hidden.jsonl")
    write(tmp_path / "in" / "_work" / "c.jsonl")
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    ids = [f"a.jsonl:{i}" for i in range(1, 6)] + [f"deep/b.jsonl:{i}" for i in range(1, 5)]
    sources = [tmp_path / "in", f"{tmp_path}/in/**.jsonl", (tmp_path / "in").as_uri()]
    for number, source in enumerate(sources):
        assert embed(source, tmp_path / f"out{number}").table["id"].to_pylist() == ids
    url = (tmp_path / "url").as_uri()
    place = Here()
    ready = prepare(new_job(tmp_path / "in"), url, place)
    run(ready, place)
    assert Output(tmp_path / "url").table["id"].to_pylist() == ids


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_late_chunking_gives_a_row_for_each_chunk(tmp_path: Path, embed: Embed, embedder: Embedder, dtype: str) -> None:
    texts = ["First one. Then another.", "Only one.", "First one. Then another.", "A. B. C.", "D.", "Only one."]
    output = embed(write(tmp_path / "in.jsonl", texts), tmp_path / "out", late_chunking="sentence", dtype=dtype)
    rows = output.table.to_pylist()
    expected = embedder.encode(texts, late_chunking="sentence", dtype=dtype)
    spans = [(f"in.jsonl:{i + 1}", c, *span) for i, e in enumerate(expected) for c, span in enumerate(e.spans)]
    assert [(r["id"], r["chunk"], r["start"], r["end"]) for r in rows] == spans
    flat = np.concatenate([e.vectors for e in expected])
    np.testing.assert_allclose(vectors(output.table), flat, atol=1 if dtype in ("int8",) else 1e-3)


def test_files_whose_names_begin_with_an_underscore_are_left_out_and_told(tmp_path: Path, plan: Plan) -> None:
    for name in ("a.jsonl", "_b.jsonl", "_c/d.jsonl", ".e.jsonl", "old/_rejects.jsonl", "_work/f.jsonl", "_g.bin"):
        write(tmp_path / "in" / name)
    ready = plan(tmp_path / "in", tmp_path / "out")
    assert [unit.file.name for unit in ready.plan.units] == ["a.jsonl"]
    assert ready.news == ["left out _b.jsonl and 1 more: names that begin with _ are hidden"]
    assert plan(f"{tmp_path}/in/a*.jsonl", tmp_path / "out").news == []


@pytest.mark.parametrize("late_chunking", ["sentence", 4])
def test_a_text_without_a_chunk_is_set_aside(tmp_path: Path, embed: Embed, late_chunking: Any) -> None:
    texts = ["One. Two.", "", "Three.", "Four.", "Five.", " \n", "Six.", "", "Seven."]  # one part lends the empty one
    output = embed(write(tmp_path / "in.jsonl", texts), tmp_path / "out", late_chunking=late_chunking)
    rejects = {reject["row"]: reject["reason"] for reject in output.rejects}
    assert rejects.keys() >= {"in.jsonl:2", "in.jsonl:8"}
    assert set(rejects.values()) == {"must hold text to cut into chunks, got none"}
    rows = {*output.table["id"].to_pylist(), *rejects}
    assert rows == {f"in.jsonl:{i + 1}" for i in range(9)}


def test_two_equal_slices_are_two_parts(tmp_path: Path, embed: Embed) -> None:
    write(tmp_path / "in" / "a.jsonl", TEXTS[:4])
    write(tmp_path / "in" / "b.jsonl", TEXTS[:4])
    output = embed(tmp_path / "in", tmp_path / "out", id_column="key")
    names = [part["name"] for part in output.manifest["parts"]]
    assert names[1] == names[0].replace(".parquet", "-1.parquet")
    assert output.table["id"].to_pylist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("dedupe", ["job", "part"])
def test_equal_texts_are_embedded_once_and_get_equal_bits(
    tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch, dedupe: str
) -> None:
    seen: list[str] = []
    encode = Worker._encode

    def counted(self: Worker, texts: list[str]) -> Any:
        seen.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Worker, "_encode", counted)
    output = embed(write(tmp_path / "in.jsonl"), tmp_path / "out", dedupe=dedupe)
    by_part = [set(TEXTS[i : i + 4]) for i in range(0, 26, 4)]
    assert sorted(seen) == sorted(set(TEXTS) if dedupe == "job" else [t for part in by_part for t in part])
    assert output.manifest["summary"]["distinct"] == len(seen)
    if dedupe == "job":
        found = vectors(output.table)
        first = {text: i for i, text in reversed(list(enumerate(TEXTS)))}
        for i, text in enumerate(TEXTS):
            np.testing.assert_array_equal(found[i], found[first[text]])


def test_a_stopped_job_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, embed: Embed, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl")
    whole = embed(source, tmp_path / "whole", dtype="int8").parts()
    place = Here()
    ready = plan(source, tmp_path / "out", dtype="int8")

    def stop(progress: Any) -> None:
        if progress.parts_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ready, place, stop)
    out = tmp_path / "out"
    assert not (out / "_manifest.json").exists() and len(list(out.glob("part-*"))) == 3
    torn, unsigned = sorted(out.glob("part-*"))[:2]
    torn.write_bytes(torn.read_bytes()[:-1])
    (out / "_work" / "receipts" / f"{unsigned.stem}.json").unlink()
    (out / "_work" / "left.partial").write_bytes(b"half")
    again = plan(source, out, dtype="int8")
    assert len(again.done) == 1 and again.news == []
    run(again, place)
    assert Output(out).parts() == whole
    assert not (out / "_work").exists()


def stop_at(parts_done: int) -> Callable[[Any], None]:
    """Return a report that stops its job when so many parts are done; with 0, when there is something to lend."""

    def stop(progress: Any) -> None:
        if progress.parts_done == parts_done:
            raise KeyboardInterrupt

    return stop


def test_a_stopped_job_whose_input_has_changed_lends_what_the_new_one_shares(
    tmp_path: Path, embed: Embed, plan: Plan
) -> None:
    write(tmp_path / "in" / "a.jsonl", [f"text {i}" for i in range(4)])
    write(tmp_path / "in" / "b.jsonl", ["text 0", "b"])
    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "in", tmp_path / "out"), Here(), stop_at(0))
    write(tmp_path / "in" / "c.jsonl", ["text 1", "text 2", "c"])
    parts = embed(tmp_path / "in", tmp_path / "out").parts()
    assert parts == embed(tmp_path / "in", tmp_path / "whole").parts()


def test_a_stopped_job_whose_input_has_changed_suspects_the_same_text(
    tmp_path: Path, embed: Embed, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Worker._encode

    def failing(self: Worker, texts: list[str]) -> Any:
        if "bad" in texts:
            raise RuntimeError("the graph says no")
        return encode(self, texts)

    def stopping(self: Worker, texts: list[str]) -> Any:
        if texts == ["one", "two", "three"]:  # found, and not yet in a receipt
            raise KeyboardInterrupt
        return failing(self, texts)

    monkeypatch.setattr(Worker, "_encode", stopping)
    write(tmp_path / "in" / "b.jsonl", ["one", "bad", "two", "three"])
    with pytest.raises(KeyboardInterrupt):
        run(plan(tmp_path / "in", tmp_path / "out"), Here())
    monkeypatch.setattr(Worker, "_encode", failing)
    write(tmp_path / "in" / "a.jsonl", ["one"])  # which lends it: the second text of b is another one
    assert [reject["row"] for reject in embed(tmp_path / "in", tmp_path / "out").rejects] == ["b.jsonl:2"]


def test_an_output_that_lies_in_its_input_is_not_read(tmp_path: Path, embed: Embed, plan: Plan) -> None:
    folder = tmp_path / "in"
    write(folder / "a.jsonl", TEXTS[:8])
    (tmp_path / "link").symlink_to(folder)
    fields = {"keep": ("text",), "dedupe": "part"}
    with pytest.raises(KeyboardInterrupt):
        run(plan(folder, folder / "out", **fields), Here(), stop_at(1))
    for source in (folder, tmp_path / "link", f"{tmp_path}/in/**", folder.as_uri()):
        ready = plan(source, f"{tmp_path}/link/../in/out", **fields)
        assert len(ready.plan.parts) == 2 and len(ready.done) == 1
    assert embed(folder, folder / "out", **fields).table["id"].to_pylist() == [f"a.jsonl:{i + 1}" for i in range(8)]
    with pytest.raises(InputError, match="input must hold other files than the output's, got"):
        plan(folder / "out", folder / "out", **fields)


def test_a_text_that_needed_more_memory_is_tried_again_with_more(
    tmp_path: Path, new_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Worker._encode

    def needing(self: Worker, texts: list[str]) -> Any:
        if "large" in texts and self._memory_mb in (50, 100):
            raise told(MemoryError(), self._memory_mb)
        return encode(self, texts)

    monkeypatch.setattr(Worker, "_encode", needing)
    monkeypatch.setattr("polyvec.batch.worker.set_ceiling", lambda megabytes: None)
    source = write(tmp_path / "in.jsonl", ["large", *"abc", "large", *"defghij"])

    def start(memory_mb: float | None, output: str, parts_done: int = -1) -> tuple[Prepared, Output]:
        place = Here(memory_mb=memory_mb)
        ready = prepare(new_job(source), str(tmp_path / output), place)
        run(ready, place, stop_at(parts_done))
        return ready, Output(tmp_path / output)

    _, output = start(100, "out")
    assert [reject["row"] for reject in output.rejects] == ["in.jsonl:1", "in.jsonl:5"]
    assert output.rejects[0]["reason"] == "needs more memory than --memory 100 MB"
    assert not start(100, "out")[0].pending and not start(50, "out")[0].pending
    with pytest.raises(KeyboardInterrupt):
        start(200, "out", 2)
    ready, output = start(200, "out")
    assert ready.news == ["more memory: 1 of 3 parts hold texts that needed it"]  # the other one is done
    assert output.rejects == [] and len(output.table) == 12

    for parts_done in (0, 1):  # what is lent was too large, then a part of its own
        with pytest.raises(KeyboardInterrupt):
            start(100, f"stopped-{parts_done}", parts_done)
        assert start(None, f"stopped-{parts_done}")[1].rejects == []


def test_a_name_that_says_lance_is_one_dataset_with_the_rows_of_the_parts(
    tmp_path: Path, embed: Embed, plan: Plan
) -> None:
    source = write(tmp_path / "in.jsonl", [*TEXTS[:8], *[7] * 4, *TEXTS[8:]])  # a part of rejects alone
    parquet = embed(source, tmp_path / "parquet", keep=("lang",))
    out = tmp_path / "vectors.lance"
    place = Here()

    def stop(progress: Any) -> None:
        if progress.parts_done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan(source, out, keep=("lang",)), place, stop)
    receipts = sorted((out / "_work" / "receipts").glob("*.json"))
    with pytest.raises(ValueError, match="not found|was not"):  # nothing is seen before all of it is there
        lance.dataset(str(out))
    next(r for r in receipts if json.loads(r.read_text())["name"]).unlink()  # its fragment stays, named by nobody
    ready = plan(source, out, keep=("lang",))
    assert len(ready.done) == 4
    run(ready, place)
    dataset = lance.dataset(str(out))
    assert dataset.to_table().equals(parquet.table) and Output(out).table.equals(parquet.table)
    assert dataset.schema.metadata[b"polyvec"] == parquet.table.schema.metadata[b"polyvec"]
    assert len(list((out / "data").iterdir())) == len(dataset.get_fragments()) == 7
    assert not (out / "_work").exists()
    found = lancedb.connect(tmp_path).open_table("vectors").search(dataset.head(1)["embedding"][0].as_py()).limit(1)
    assert found.to_list()[0]["id"] == "in.jsonl:1"

    write(source, TEXTS[:8])
    after = embed(source, out, keep=("lang",))
    assert lance.dataset(str(out)).count_rows() == 8 == after.manifest["summary"]["rows"]
    assert len(list((out / "data").iterdir())) == 2
    long = write(tmp_path / "long.jsonl", ["router " * 600])
    with pytest.raises(InputError, match=r"none\.lance must get a row at least, got none"):
        embed(long, tmp_path / "none.lance", truncate=False)


def test_a_finished_job_does_nothing(tmp_path: Path, embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.jsonl")
    before = embed(source, tmp_path / "out").parts()
    monkeypatch.setattr(Worker, "__init__", None)  # no model is opened
    assert embed(source, tmp_path / "out").parts() == before


def test_a_changed_input_makes_only_its_own_parts_anew(tmp_path: Path, embed: Embed, plan: Plan) -> None:
    source = write(tmp_path / "in.jsonl", [f"text {i}" for i in range(12)])
    before = embed(source, tmp_path / "out").parts()
    write(source, [f"text {i}" for i in range(11)] + ["another"])
    ready = plan(source, tmp_path / "out")
    assert ready.news == ["input has changed: 1 of 3 parts are new"] and len(ready.pending) == 1
    after = embed(source, tmp_path / "out").parts()
    assert len(after) == 3 and len(set(before) & set(after)) == 2
    assert all(before[name] == after[name] for name in set(before) & set(after))


@pytest.mark.parametrize("name", ["out", "out.lance"])
def test_a_changed_input_that_gives_a_column_another_type_gives_it_to_all_parts(
    tmp_path: Path, embed: Embed, plan: Plan, name: str
) -> None:
    def rows(path: Path, values: list[Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"text {v}", "value": v}) + "\n" for v in values))

    rows(tmp_path / "in" / "a.jsonl", [1, 2, 3])
    embed(tmp_path / "in", tmp_path / name, keep=("value",))
    rows(tmp_path / "in" / "b.jsonl", [1.5, None])
    ready = plan(tmp_path / "in", tmp_path / name, keep=("value",))
    assert ready.news[1:] == ["columns have other types: 1 of 2 parts are written again"] and len(ready.pending) == 1
    after = embed(tmp_path / "in", tmp_path / name, keep=("value",))
    assert after.table["value"].to_pylist() == [1.0, 2.0, 3.0, 1.5, None]
    if name == "out":
        assert after.parts() == embed(tmp_path / "in", tmp_path / "clean", keep=("value",)).parts()
        assert pq.read_table(after.folder).num_rows == 5
    else:
        assert lance.dataset(str(after.folder)).to_table().equals(after.table)
    (tmp_path / "in" / "b.jsonl").unlink()
    table = embed(tmp_path / "in", tmp_path / name, keep=("value",)).table
    assert table["value"].type == pa.int64() and table["value"].to_pylist() == [1, 2, 3]
    rows(tmp_path / "in" / "a.jsonl", [None, None])  # without a value it is written as texts, which become no list
    embed(tmp_path / "in", tmp_path / name, keep=("value",))
    rows(tmp_path / "in" / "b.jsonl", [[1]])
    assert embed(tmp_path / "in", tmp_path / name, keep=("value",)).table["value"].to_pylist() == [None, None, [1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "separation"}, "task from None to 'separation'"),
        ({"dtype": "int8"}, "dtype from 'float32' to 'int8'"),
        ({"dimensions": 16}, "dimensions from None to 16"),
        ({"keep": ("lang",)}, r"keep from \[\] to \['lang'\]"),
        ({"truncate": False}, "truncate from True to False"),
    ],
)
def test_other_options_are_refused_by_name_until_they_may_replace(
    tmp_path: Path, embed: Embed, plan: Plan, change: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "in.jsonl", TEXTS[:6])
    before = embed(source, tmp_path / "out").parts()
    with pytest.raises(InputError, match=f"same model, task and options, got .* with other {words}"):
        plan(source, tmp_path / "out", **change)
    assert Output(tmp_path / "out").parts() == before
    ready = plan(source, tmp_path / "out", replace=True, **change)
    assert ready.news[0].startswith("all parts are new: ") and len(ready.pending) == 2
    after = embed(source, tmp_path / "out", replace=True, **change).parts()
    assert len(after) == 2 and not set(before) & set(after)


def test_rows_without_a_text_are_set_aside_with_their_reason(tmp_path: Path, embed: Embed) -> None:
    source = tmp_path / "in.jsonl"
    lines = [b'{"text": "one"}', b'{"text": 7}', b"{oops", b'{"text": "two"}', b'{"body": "x"}', b'{"text": null}',
             b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text": 8}']  # fmt: skip
    source.write_bytes(b"\n".join(lines))
    output = embed(source, tmp_path / "out")
    assert output.table["id"].to_pylist() == ["in.jsonl:1", "in.jsonl:4"]
    rejects = {reject["row"]: reject for reject in output.rejects}
    assert list(rejects) == [f"in.jsonl:{i}" for i in (2, 3, 5, 6, 7, 8, 9)]
    assert rejects["in.jsonl:2"]["reason"] == "'text' must be a text, got int" and rejects["in.jsonl:2"]["count"] == 2
    assert rejects["in.jsonl:3"]["reason"].startswith("must be one JSON value")
    assert rejects["in.jsonl:5"]["reason"].startswith("must have the column 'text', got body")
    assert rejects["in.jsonl:7"]["reason"].startswith("must be UTF-8 text")
    assert output.manifest["summary"]["rejected"] == 7


def test_a_row_with_bytes_that_are_no_text_in_a_kept_object_is_set_aside(tmp_path: Path, embed: Embed) -> None:
    source = tmp_path / "in.jsonl"
    values = [b'{"a": ["b"]}', b'{"a": ["\xff"]}', b'{"\xff": ["b"]}']
    source.write_bytes(b"".join(b'{"text": "one", "x": %b}\n' % value for value in values))
    output = embed(source, tmp_path / "out", keep=("x",))
    assert output.table["x"].to_pylist() == [{"a": ["b"]}]
    assert [reject["row"] for reject in output.rejects] == ["in.jsonl:2", "in.jsonl:3"]
    assert all(reject["reason"].startswith("must be UTF-8 text") for reject in output.rejects)


def test_a_whole_number_that_a_fraction_elsewhere_leaves_no_place_is_one_sentence(tmp_path: Path, embed: Embed) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"text": "a", "x": {x}}}\n' for x in [2**60 + 1] * 4 + [1.5]))
    with pytest.raises(InputError, match=r"must each have one type, got near in\.jsonl:1: .*leave the column out"):
        embed(source, tmp_path / "out", keep=("x",))


def test_a_text_over_the_limit_is_set_aside_or_cut_and_marked(tmp_path: Path, embed: Embed, embedder: Embedder) -> None:
    long = "router " * (embedder.max_tokens + 5)
    source = write(tmp_path / "in.jsonl", ["one", long, "two"])
    cut = embed(source, tmp_path / "cut")
    assert cut.table["truncated"].to_pylist() == [False, True, False]
    assert cut.manifest["summary"]["truncated"] == 1
    whole = embed(source, tmp_path / "whole", truncate=False)
    assert whole.table["id"].to_pylist() == ["in.jsonl:1", "in.jsonl:3"]
    assert whole.rejects[0]["reason"] == f"must be at most {embedder.max_tokens} tokens, got more"


def test_bad_input_is_said_before_any_work(tmp_path: Path, plan: Plan) -> None:
    out = tmp_path / "out"
    good = write(tmp_path / "good.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(good.read_bytes())[:-9])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("mine")
    (tmp_path / "none.jsonl").write_text('{"text": 1}\n')
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(f'{{"text": "a", "x": {x}}}\n' for x in (1, '"b"')))
    large, hollow = tmp_path / "large.jsonl", tmp_path / "hollow.jsonl"
    large.write_text(f'{{"text": "a", "x": {2**64}}}\n')
    hollow.write_text('{"text": "a", "x": [{"y": {}}]}\n')
    apart = tmp_path / "apart.jsonl"
    apart.write_text("".join(f'{{"text": "a", "x": {x}}}\n' for x in [1] * 4 + ['"b"'] * 4))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "missing.jsonl", {}, r"input must be a file, folder, glob or URL, got .*missing\.jsonl"),
        (tmp_path / "empty", {}, "input must hold files ending in"),
        (f"{tmp_path}/*.docx", {}, "input must hold files ending in"),
        (tmp_path / "bad.parquet", {}, r"bad\.parquet must be a readable Parquet file"),
        (tmp_path / "half.jsonl.gz", {}, r"half\.jsonl\.gz must be readable to its end"),
        (good, {"column": "body"}, r"good\.jsonl:1 must have the column 'body', got text, lang, key; see --column"),
        (good, {"id_column": "uuid"}, r"good\.jsonl:1 must have the column 'uuid'"),
        (good, {"keep": ("city",)}, r"good\.jsonl:1 must have the column 'city'"),
        (tmp_path / "none.jsonl", {}, "input must hold at least one text under 'text', got 1 rows without"),
        (mixed, {"keep": ("x",)}, "column 'x' must have one type to be kept"),
        (large, {"keep": ("x",)}, "column 'x' must have one type to be kept, got near large.jsonl:1: .*large"),
        (hollow, {"keep": ("x",)}, "column 'x' must have objects with a field to be kept, got empty ones"),
        (apart, {"keep": ("x",)}, "columns that are kept must each have one type"),
        ("nowhere://host/x", {}, "must be a URL of a known kind"),
    ]
    for source, fields, message in cases:
        with pytest.raises(InputError, match=message):
            plan(source, out, **fields)
    for name, other in (("empty_object", "{}"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "_manifest.json").write_text(other)
    for taken in ("used", "good.jsonl", "empty_object", "list"):
        with pytest.raises(InputError, match="output must be a"):
            plan(good, tmp_path / taken)
    assert not out.exists() and os.listdir(tmp_path / "used") == ["letter.txt"]


def test_an_output_without_room_or_permission_is_said_and_finished_parts_stay(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="output must be a folder"):
        plan(source, tmp_path / "file" / "out")
    # /dev/full is a disk without room that every Linux has.
    ready = plan(source, tmp_path / "out")
    put = type(ready.folder)._put
    parts: list[str] = []

    def full(self: Any, path: str, data: bytes) -> None:
        if data[:4] == b"PAR1":
            parts.append(path)
            if len(parts) > 2:
                put(self, path, data[:9])
                with open("/dev/full", "wb") as file:
                    file.write(data)
        put(self, path, data)

    monkeypatch.setattr(type(ready.folder), "_put", full)
    with pytest.raises(WorkerError, match="output must be a folder to write in, with room left, got .*No space left"):
        run(ready, Here())
    monkeypatch.undo()
    assert not (tmp_path / "out" / "_manifest.json").exists()
    assert not list((tmp_path / "out" / "_work").glob("*.partial"))
    run(plan(source, tmp_path / "out"), Here())
    assert len(Output(tmp_path / "out").table) == 26


def test_a_job_whose_folder_another_has_finished_says_so_and_goes_on_the_next_time(
    tmp_path: Path, embed: Embed, plan: Plan
) -> None:
    source = write(tmp_path / "in.jsonl")
    first = embed(source, tmp_path / "first").parts()

    def finish(progress: Any) -> None:
        if progress.parts_done == 1:
            shutil.copy(tmp_path / "first" / "_manifest.json", tmp_path / "out")
            shutil.rmtree(tmp_path / "out" / "_work")

    with pytest.raises(WorkerError, match=r"must be of one job at a time, got .*out without what part-\w+ lends"):
        run(plan(source, tmp_path / "out"), Here(), finish)
    assert embed(source, tmp_path / "out").parts() == first

    class Shared:  # a file system on which somebody else removes a folder at the same time
        def __getattr__(self, name: str) -> Any:
            return getattr(ready.folder.fs, name)

        def delete_dir(self, path: str) -> None:
            ready.folder.fs.delete_dir(path)
            ready.folder.fs.delete_dir(path)

    ready = plan(source, tmp_path / "second")
    run(replace(ready, folder=replace(ready.folder, fs=Shared())), Here())
    assert Output(tmp_path / "second").parts() == first


def test_another_model_on_a_machine_stops_the_job(tmp_path: Path, plan: Plan) -> None:
    ready = plan(write(tmp_path / "in.jsonl"), tmp_path / "out")
    ready.job.stamp["weights"] = "0123456789abcdef"
    with pytest.raises(WorkerError, match="every machine must have the same .* for 0123456789abcdef"):
        run(ready, Here())


def test_an_input_that_changes_under_the_job_stops_it(tmp_path: Path, plan: Plan) -> None:
    source = write(tmp_path / "in.jsonl")
    ready = plan(source, tmp_path / "out")
    write(source, ["something else", *TEXTS[1:]])
    with pytest.raises(InputError, match=r"in\.jsonl must not change while the job runs"):
        run(ready, Here())
