"""The command as a user runs it, on real files: the first test in a process, the others in this one.

Most of the time of a process is its start. The commands of ``docs`` and README run in processes (test_docs.py).
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from polyvec import Embedder
from polyvec.batch.job import Job
from polyvec.cli import app
from polyvec.errors import InputError
from polyvec.files import read_vectors
from polyvec.samples import corpus
from polyvec.text.tokenizer import Tokenizer

ENGLISH = ["The train is late.", "A cat sleeps on the chair.", "How do I change my password?"]
GERMAN = ["Wie ändere ich mein Passwort?", "Der Zug hat Verspätung.", "Eine Katze schläft auf dem Stuhl."]


@dataclass(frozen=True)
class Said:
    stdout: str
    stderr: str


def polyvec(*arguments: object, stdin: str = "", code: int = 0, encoding: str = "utf-8") -> Said:
    """Run the command in this process, its stdout in ``encoding`` at first; what it warns of is an error."""
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    err, source = (io.TextIOWrapper(io.BytesIO(text), "utf-8") for text in (b"", stdin.encode()))
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(sys, "stdin", source)
        with pytest.raises(SystemExit) as ended:
            app(list(map(str, arguments)), prog_name="polyvec")
    for stream in (out, err):
        stream.seek(0)
    said = Said(out.read(), err.read())
    assert (ended.value.code or 0) == code, said.stderr
    assert "Traceback" not in said.stderr
    return said


def test_stdin_to_stdout_gives_a_line_for_each(mini: Embedder) -> None:
    command = [sys.executable, "-W", "error", "-m", "polyvec", "embed", "-", "--task", "text-matching"]
    done = subprocess.run(
        [*command, "--dimensions", "64"],
        input="\n".join(ENGLISH) + "\n",
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in rows] == ENGLISH
    expected = mini.encode(ENGLISH, task="text-matching", dimensions=64)
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=2e-6)


def test_stdout_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    for verb in ("embed", "search"):
        path = tmp_path / ("\udcff.txt" if verb == "search" else "a.txt")
        path.write_text("Käse 你好\n", encoding="utf-8")
        arguments = ("embed", path) if verb == "embed" else ("search", "Käse", path)
        assert "Käse 你好" in polyvec(*arguments, encoding="ascii").stdout


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_a_table_becomes_a_vector_file(tmp_path: Path, mini: Embedder, suffix: str) -> None:
    source, output = tmp_path / "notes.csv", tmp_path / f"vectors{suffix}"
    source.write_text("id,body\n" + "".join(f"{i},{t}\n" for i, t in enumerate(ENGLISH)), encoding="utf-8")
    result = polyvec("embed", source, "-o", output, "--column", "body", "--task", "separation", "--dtype", "float16")
    assert result.stdout == "" and "3 vectors of 384 float16" in result.stderr
    vectors, records, stamp = read_vectors(output)
    np.testing.assert_allclose(vectors, mini.encode(ENGLISH, task="separation", dtype="float16"), atol=1e-3)
    assert stamp["task"] == "separation"
    assert stamp["fingerprint"] == mini.fingerprint(task="separation", dtype="float16")
    assert not records or records[1] == {"id": "1", "body": ENGLISH[1]}


def test_search_finds_the_passage_and_its_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("The train is late today.\n\nA cat sleeps on the chair.\n\nBread needs flour and water.\n")
    result = polyvec("search", "Wo schläft die Katze?", path, "--top", 2)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert len(lines) == 2
    assert lines[0][1:] == [f"{path}:3", "A cat sleeps on the chair."]
    assert float(lines[0][0]) >= float(lines[1][0])


def test_a_folder_is_indexed_and_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs, database = tmp_path / "docs", tmp_path / "my.db"
    docs.mkdir()
    (docs / "a.md").write_text("# Trains\n\nThe train is late today.\n\n# Cats\n\nA cat sleeps on the chair.\n")
    (docs / "rows.csv").write_text("text,lang\nBread needs flour.,en\nBrot braucht Mehl.,de\n")
    result = polyvec("index", docs, "-d", database)
    assert result.stdout == "" and result.stderr == f"2 added; 4 passages in {database}\n"
    (docs / "locked.docx").write_bytes(b"\xd0\xcf\x11\xe0")
    (docs / "empty.txt").touch()
    result = polyvec("index", docs, "-d", database, code=2)
    lines = result.stderr.splitlines()
    assert lines[0] == f"2 unchanged, 2 not read; 4 passages in {database}"
    assert all(line.startswith(f"error: {docs}") for line in lines[1:3]) and lines[3] == "2 files were left out"

    lines = polyvec("search", "Wo schläft die Katze?", "-d", database, "--mode", "vector").stdout.splitlines()
    assert lines[0].split("\t")[1:] == [f"{docs}/a.md:5", "# Cats A cat sleeps on the chair."]
    result = polyvec("search", "flour", "-d", database, "--mode", "text", "--json")
    row = json.loads(result.stdout)
    assert (row["text"], row["line"], row["metadata"]) == ("Bread needs flour.", 1, {"lang": "en"})
    assert row["highlights"] == [[12, 17]] and result.stderr.startswith("1 passages in ")
    hits = polyvec("search", "flour", "-d", database, "--where", "lang=de").stdout.splitlines()
    assert [hit.split("\t")[2] for hit in hits] == ["Brot braucht Mehl."]
    result = polyvec("search", "flour", "-d", database, "--where", "lang=fr", code=1)
    assert result.stderr == "no passage found: nothing to search, or nothing passes the filter\n"
    monkeypatch.chdir(docs)  # a file is named as the answers name it
    assert polyvec("search", "flour", "-d", database, "--where", "source=a.md").stdout.count("\ta.md:") == 2
    result = polyvec("search", "flour", "-d", database, "--dimensions", 64, code=2)
    assert "must meet the model that made it, polyvec-mini" in result.stderr


def test_a_place_is_told_to_the_letter_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\tb\nc.txt").write_text("A cat sleeps.\n")
    (tmp_path / "notes.jsonl").write_text('{"text": "A cat sleeps.", "url": "https://a.org//b c"}\n')
    fields = polyvec("search", "cat", tmp_path / "a\tb\nc.txt").stdout.rstrip("\n").split("\t")
    assert fields[1:] == [r"a\tb\nc.txt:1", "A cat sleeps."]
    job = ("embed", "notes.jsonl", "-o", "vectors", "--id", "url", "--keep", "text", "--task", "retrieval.passage")
    polyvec(*job)
    polyvec("index", "--vectors", "vectors", "-d", "db")
    assert polyvec("search", "cat", "-d", "db").stdout.split("\t")[1] == "https://a.org//b c:1"


def test_match_pairs_translations(tmp_path: Path) -> None:
    first, second = tmp_path / "en.txt", tmp_path / "de.txt"
    first.write_text("\n".join(ENGLISH), encoding="utf-8")
    second.write_text("\n".join(GERMAN), encoding="utf-8")
    lines = [line.split("\t") for line in polyvec("match", first, second).stdout.splitlines()]
    assert [line[2] for line in lines] == [GERMAN[1], GERMAN[2], GERMAN[0]]
    score = float(polyvec("match", "The train is late.", "Der Zug hat Verspätung.").stdout.split("\t")[0])
    assert score == pytest.approx(float(lines[0][0]), abs=1e-3)


def test_match_reads_stdin_and_vectors_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "de.txt").write_text("\n".join(GERMAN), encoding="utf-8")
    lines = polyvec("match", "-", tmp_path / "de.txt", stdin="\n".join(ENGLISH)).stdout.splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == sorted(ENGLISH)
    (tmp_path / "none.txt").touch()
    for name in ("none.jsonl", "none.parquet", "none.npy"):
        polyvec("embed", tmp_path / "none.txt", "--task", "text-matching", "-o", tmp_path / name)
        polyvec("match", tmp_path / name, tmp_path / "de.txt", code=1)


def test_match_refuses_vectors_of_another_model(tmp_path: Path, model_folder: Path) -> None:
    source = tmp_path / "en.txt"
    source.write_text("\n".join(ENGLISH))
    polyvec("embed", source, "-o", tmp_path / "mini.npy", "--dimensions", 32)
    polyvec("embed", source, "-o", tmp_path / "tiny.npy", "--model", model_folder)
    result = polyvec("match", tmp_path / "mini.npy", tmp_path / "tiny.npy", code=2)
    assert "must hold vectors of the same weights" in result.stderr and result.stdout == ""
    same = polyvec("match", tmp_path / "mini.npy", tmp_path / "mini.npy").stdout.splitlines()
    assert [line.split("\t")[0] for line in same] == ["1.0000"] * 3


def test_match_embeds_texts_with_the_task_that_meets_a_vector_file(tmp_path: Path, mini: Embedder) -> None:
    source, vectors = tmp_path / "en.txt", tmp_path / "passages.jsonl"
    source.write_text("\n".join(ENGLISH))
    polyvec("embed", source, "-o", vectors, "--task", "retrieval.passage")
    question = mini.encode("Wo schläft die Katze?", task="retrieval.query")
    cosines = mini.encode(ENGLISH, task="retrieval.passage") @ question
    for arguments, place in ((("Wo schläft die Katze?", vectors), 2), ((vectors, "Wo schläft die Katze?"), 1)):
        lines = [line.split("\t") for line in polyvec("match", *arguments).stdout.splitlines()]
        found = {line[place]: float(line[0]) for line in lines}
        assert ENGLISH[1] in found
        for text, cosine in found.items():
            assert cosine == pytest.approx(float(cosines[ENGLISH.index(text)]), abs=1e-3)
    for option, message in (
        (("--task", "classification"), "same task as the vector file, 'retrieval.passage', got 'classification'"),
        (("--dimensions", 64), "--dimensions must be left out beside a vector file"),
    ):
        assert message in polyvec("match", "a cat", vectors, *option, code=2).stderr
    result = polyvec("match", vectors, vectors, "--task", "retrieval.passage", code=2)
    assert "--task must be left out where all vectors are stored" in result.stderr


def test_match_finds_near_duplicates_in_one_file_at_a_stated_precision(tmp_path: Path) -> None:
    source, labelled = tmp_path / "all.txt", tmp_path / "labelled.csv"
    source.write_text("\n".join(ENGLISH + GERMAN), encoding="utf-8")
    pairs = [line.split("\t")[1:] for line in polyvec("match", source, "--threshold", 0.5).stdout.splitlines()]
    assert [ENGLISH[0], GERMAN[1]] in pairs and all(a != b for a, b in pairs)
    assert polyvec("match", source, code=1).stderr == "no pair found; a lower --threshold shows more\n"
    rows = [(ENGLISH[0], GERMAN[1], 1), (ENGLISH[1], GERMAN[2], 1), (ENGLISH[0], GERMAN[0], 0)]
    labelled.write_text("text_a,text_b,score\n" + "".join(f"{a},{b},{s}\n" for a, b, s in rows), encoding="utf-8")
    result = polyvec("match", source, "--precision", 1, "--labelled", labelled)
    assert float(result.stderr.split()[1]) < 0.9
    found = [line.split("\t")[1:] for line in result.stdout.splitlines()]
    assert {(ENGLISH[0], GERMAN[1]), (ENGLISH[1], GERMAN[2])} <= set(map(tuple, found))
    labelled.write_text("text_a,text_b,score\na,b,0.5\n")
    result = polyvec("match", source, "--precision", 1, "--labelled", labelled, code=2)
    assert "labelled.csv:1 must have text_b and a score of 0 or 1" in result.stderr
    labelled.write_text("text_a,text_b,score\na,b,0\n")
    result = polyvec("match", source, "--precision", 1, "--labelled", labelled, code=2)
    assert "must hold a pair with score 1, got none" in result.stderr
    assert "come together" in polyvec("match", source, "--precision", 1, code=2).stderr


def test_classify_learns_from_examples_and_from_names(tmp_path: Path) -> None:
    data, output = tmp_path / "data.csv", tmp_path / "classifier.json"
    rows = [
        (text, "train" if "train" in text else "cat")
        for text in (f"{n} {w}." for n in "12345" for w in ("train", "cat"))
    ]
    data.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    result = polyvec("classify", "train", data, "-o", output)
    assert "accuracy 1.000" in result.stdout and "10 examples of 2 labels" in result.stderr
    result = polyvec("classify", "predict", "-", "-c", output, stdin="Der Zug.\n")
    row = json.loads(result.stdout)
    assert row["text"] == "Der Zug." and row["predicted"] == "train" and 0.5 < row["probability"] <= 1
    result = polyvec("classify", "predict", data, "--label", "cat=cats, pets", "--label", "train", "--truth", "label")
    assert len(result.stdout.splitlines()) == 10 and "accuracy 1.000" in result.stderr
    result = polyvec("classify", "predict", "-", "--label", "cat", "--label", "dog", "--abstain", 1, stdin="A book.\n")
    assert json.loads(result.stdout)["predicted"] is None
    again = polyvec("classify", "predict", "-", "--label", "cat", "--label", "dog", stdin="A book.\n").stdout
    (tmp_path / "again.jsonl").write_text(again)
    result = polyvec("classify", "predict", tmp_path / "again.jsonl", "--label", "a", "--label", "b", code=2)
    assert "records must leave out predicted, probability, which the output has of its own" in result.stderr
    sold = tmp_path / "sold.jsonl"
    sold.write_text("".join(json.dumps({"text": text, "sold": label == "cat"}) + "\n" for text, label in rows))
    assert "\ntrue " in polyvec("classify", "train", sold, "--label-column", "sold", "-o", output).stdout
    assert "accuracy 1.000" in polyvec("classify", "predict", sold, "-c", output, "--truth", "sold").stderr
    data.write_text("text,label\na,x\n")
    result = polyvec("classify", "predict", data, "--label", "a", "--label", "b", "--truth", "label", code=2)
    assert "'label' must be one of the labels a, b, got 'x'" in result.stderr


def test_cluster_groups_texts_and_draws_them(tmp_path: Path) -> None:
    source, output, page = tmp_path / "texts.txt", tmp_path / "out.parquet", tmp_path / "map.html"
    source.write_text("".join(f"The {noun} is {n}.\n" for noun in ("train", "cat") for n in ("late", "early", "slow")))
    lines = polyvec("cluster", source, "--clusters", 2, "-o", output, "--map", page).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["3", "3"]
    assert {line.split("\t")[1].split(", ")[0] for line in lines} == {"train", "cat"}
    _, records, stamp = read_vectors(output)
    assert stamp["task"] == "separation" and "train" in page.read_text()
    assert len({record["cluster"] for record in records[:3]}) == 1 and records[0]["cluster"] != records[3]["cluster"]
    result = polyvec("cluster", source, "-o", "out.npy", code=2)
    assert "output must end in .parquet or .jsonl, got 'out.npy'" in result.stderr
    assert "must hold at least one text" in polyvec("cluster", "-", stdin="\n", code=2).stderr
    result = polyvec("cluster", "-", "--min-size", 3, stdin="A cat.\n\nBread needs flour.\nGood morning.\n", code=1)
    blank = "-: left out 1 of 4 texts that are blank\n"
    assert result.stderr.startswith(f"{blank}3 of 3 texts are in no cluster\nno cluster found; --clusters N makes")


def test_info_names_tasks_dimensions_and_fingerprints(mini: Embedder) -> None:
    facts = json.loads(polyvec("info").stdout)
    assert facts["dimensions"] == [32, 64, 128, 256, 384] and facts["max_tokens"] == 8192
    assert facts["tasks"]["retrieval.query"] == {
        "prompt": mini.config.prompts["retrieval.query"],
        "fingerprint": mini.fingerprint(task="retrieval.query"),
    }


def test_export_writes_every_layout_and_each_loads(tmp_path: Path, model_folder: Path) -> None:
    for layout in ("hf", "original", "polyvec"):
        polyvec("export", model_folder, "-o", tmp_path / layout, "--layout", layout)
        shutil.copyfile(model_folder / "tokenizer.json", tmp_path / layout / "tokenizer.json")
    expected = Embedder(model_folder, engine="torch").encode("the router", task="retrieval.query")
    for layout in ("hf", "original", "polyvec"):
        vector = Embedder(tmp_path / layout, engine="torch").encode("the router", task="retrieval.query")
        np.testing.assert_array_equal(vector, expected)
    result = polyvec("export", tmp_path / "polyvec", "--onnx", "int8")
    assert "int8 graph" in result.stderr and (tmp_path / "polyvec" / "model.int8.onnx").exists()


def test_train_tokenizer_writes_one_and_reports_each_language(tmp_path: Path) -> None:
    data, output = tmp_path / "texts.jsonl", tmp_path / "tokenizer.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in corpus()), encoding="utf-8")
    options = ("--vocab-size", 900, "-o", output)
    rows = [json.loads(line) for line in polyvec("train", "tokenizer", "--data", data, *options).stdout.splitlines()]
    assert [row["lang"] for row in rows] == sorted({row["lang"] for row in corpus()})
    assert all(row["tokens_per_word"] >= 1 for row in rows)
    tokenizer = Tokenizer.from_file(output, vocab_size=900, bos_token_id=0, eos_token_id=2)
    assert len(tokenizer.encode("a text")) > 2
    with data.open("a", encoding="utf-8") as file:
        file.write('{"text": " "}\n{"text": ""}\n{"text": "...", "lang": "gd"}\n')
    total = len(corpus()) + 3
    result = polyvec("train", "tokenizer", "--data", data, *options)
    assert f"{data}: left out 2 of {total} texts that are blank" in result.stderr
    assert "gd: left out of the report, got no word in 1 texts" in result.stderr and '"lang": "en"' in result.stdout
    with data.open("a", encoding="utf-8") as file:
        file.write('{"text": "printer", "lang": "jp"}\n')
    result = polyvec("train", "tokenizer", "--data", data, "-o", tmp_path / "x.json", code=2)
    assert f"{data}: example {total + 1}: 'lang' must be a language's code (BCP 47), such as de" in result.stderr
    result = polyvec("train", "tokenizer", "--data", data, "--vocab-size", 10, "-o", tmp_path / "x.json", code=2)
    assert "vocab_size must be at least 300" in result.stderr and not (tmp_path / "x.json").exists()
    result = polyvec("train", "tokenizer", "--data", data, "-o", tmp_path / "none" / "x.json", code=2)
    assert "output folder must exist" in result.stderr  # before the row in jp


def test_train_adapter_adds_a_task_that_embed_knows(tmp_path: Path, model_folder: Path) -> None:
    data, output = tmp_path / "mine.csv", tmp_path / "legal"
    data.write_text("text,label\n" + "".join(f"{t},{i % 2}\n" for i, t in enumerate(ENGLISH * 4)), encoding="utf-8")
    options = ("--kind", "classification", "--name", "legal", "--steps", 3, "--batch-size", 4, "-o", output)
    result = polyvec("train", "adapter", "--data", data, "--model", model_folder, *options)
    assert result.stdout == "" and f"legal in {output}" in result.stderr
    result = polyvec("embed", "-", "--model", output, "--task", "legal", stdin="one\n")
    assert len(json.loads(result.stdout)["embedding"]) == 32
    assert "legal" in json.loads(polyvec("info", "--model", output).stdout)["tasks"]
    result = polyvec(
        "train", "adapter", "--data", data, "--kind", "ranking", "--name", "x", "-o", tmp_path / "x", code=2
    )
    assert result.stderr.startswith("error: kind must be one of retrieval")
    command = ("train", "adapter", "--data", data, "--model", model_folder, "--kind", "separation")
    polyvec(*command, "--name", "groups", "--steps", 1, "--batch-size", 4, "-o", tmp_path / "groups")
    with safe_open(tmp_path / "groups/checkpoint.safetensors", "np") as file:
        recorded = json.loads(file.metadata()["run"])
    assert (recorded["stage"], recorded["classmates"], recorded["learning_rate"]) == ("separation", True, 0.003)
    options = ("--name", "", "-o", tmp_path / "x")
    result = polyvec(*command, *options, code=2)
    assert "got none; name the new task" in result.stderr and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "missing.txt"], "missing.txt must be a readable file"),
        (["embed", "notes.txt", "--task", "query"], "task must be one of retrieval.query"),
        (["embed", "notes.txt", "--dimensions", "385"], "dimensions must be a whole number between 1 and 384"),
        (["embed", "notes.txt", "--dtype", "int4"], "dtype must be one of"),
        (["embed", "notes.txt", "-o", "out.bin"], "output must end in"),
        (["embed", "notes.txt", "--model", "nowhere"], "model must be"),
        (["embed", "notes.jsonl", "--column", "body"], "notes.jsonl:1 must have the column 'body'"),
        (["embed", "long.txt", "--no-truncate"], "texts[0] must be at most 8192 tokens"),
        (["embed", "notes.txt", "-o", "v", "--dedupe", "jbo"], "dedupe must be job or part, got 'jbo'"),
        (["embed", "notes.txt", "-o", "v", "--part-rows", "0"], "part_rows must be at least 1, got 0"),
        (["embed", "notes.txt", "-o", "v", "--cpus", "2"], "--cpus needs --cluster, got none"),
        (["embed", "notes.txt", "-o", "v.npy", "--gpus", "1"], "--gpus needs --cluster, got none"),
        (["embed", "notes.txt", "-o", "v.npy", "--part-rows", "0"], "--part-rows needs a folder as output, got"),
        (["embed", "notes.txt", "--dedupe", "job"], "--dedupe needs a folder as output, got '-'"),
        (["embed", "notes.txt", "-o", "v", "--batch-tokens", "64"], "--batch-tokens needs a file as output, got 'v'"),
        (
            ["embed", "notes.txt", "-o", "v", "--cluster", "auto", "--gpus", "1", "--engine", "onnx"],
            "engine 'onnx' runs on the CPU, got --gpus 1; use --engine torch",
        ),
        (["search", " ", "notes.txt"], "query must hold text"),
        (["search", "train", "missing.txt"], "missing.txt must be a readable file"),
        (["search", "train", "notes.txt", "--top", "0"], "top must be at least 1"),
        (["search", "train"], "search needs FILES or --database, one of the two, got neither"),
        (["search", "train", "notes.txt", "-d", "db"], "one of the two, got both"),
        (["search", "train", "notes.txt", "--mode", "text"], "--mode, --weight and --where need a database"),
        (["search", "train", "-d", "db"], "database must be one that polyvec made, got none in db"),
        (["search", "train", "-d", "notes.txt"], "database must be one that polyvec made"),
        (["index", "notes.txt", "-d", "notes.jsonl"], "database must be a folder or a URL"),
        (["match", "missing.npy", "text"], "missing.npy must be a readable file"),
        (["match", "missing.md", "text"], "missing.md must be a readable file"),
        (["match", "folder", "text"], "folder must be a text or a file, got a folder"),
        (["embed", "notes.txt", "-o", "/proc/x.jsonl"], "files must be readable, or writable, got /proc/"),
        (["embed", "-", "-o", "v"], "got stdin, which cannot be read again"),
        (["embed", "/dev/null", "-o", "v"], "got /dev/null, a pipe, which cannot be read again"),
        (
            ["embed", "notes.jsonl", "-o", "v", "--keep", "embedding"],
            "which the output has of its own, got 'embedding'",
        ),
        (
            ["embed", "notes.jsonl", "-o", "v", "--keep", "a", "--keep", "a"],
            "keep must name a column once, got 'a' again",
        ),
        (["search", "a", "-d", "db", "--where", "x=1", "--where", "x=2"], "--where must name a key once, got x again"),
        (["evaluate", "pairs.jsonl", "--dimensions", "0"], "must be between 1 and 384, got 0"),
        (["match", "notes.txt", "--top", "2"], "--top needs B, and no threshold, got A alone"),
        (["match", "a", "b", "--top", "2", "--threshold", "0.5"], "--top needs B, and no threshold, got a threshold"),
        (["cluster", "notes.txt", "--map", "no/x.html", "--model", "nowhere"], "output folder must exist, got no"),
        (
            ["cluster", "own.csv", "-o", "x.parquet", "--model", "nowhere"],
            "records must leave out cluster, cluster_label, which the output has of its own, got 'cluster'; rename",
        ),
        (["cluster", "notes.txt", "-o", "no/x.parquet", "--model", "nowhere"], "output folder must exist, got no"),
        (["classify", "train", "notes.jsonl", "-o", "no/c.json"], "output folder must exist, got no"),
        (["classify", "predict", "notes.txt"], "predict needs --classifier or --label, one of the two, got neither"),
        (["classify", "predict", "notes.txt", "--label", "a", "--abstain", "2"], "abstain must be a probability"),
        (["classify", "train", "notes.jsonl", "-o", "c.json"], "notes.jsonl:1 must have the column 'label'"),
        (["classify", "train", "blank.csv", "-o", "c.json"], "blank.csv:1 must hold text under 'label', got nothing"),
        (
            ["classify", "train", "blank.csv", "--label-column", "other", "-o", "c.json"],
            "blank.csv:2 must hold text under 'text', got nothing; fill it in",
        ),
        (
            ["classify", "predict", "notes.txt", "--label", "a", "--label", "a=b"],
            "--label must name a label once, got 'a' again",
        ),
        (["classify", "predict", "notes.txt", "--label", "=b"], "--label must be NAME or NAME=DESCRIPTION, got '=b'"),
        (["export", "polyvec-mini"], "export needs --output or --onnx"),
        (["export", "polyvec-mini", "-o", ".", "--layout", "hf"], "output must be a new or empty folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "notes.txt").write_text("one\n")
    (tmp_path / "notes.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "long.txt").write_text("one " * 9000)
    (tmp_path / "pairs.jsonl").write_text('{"text_a": "a", "text_b": "b", "score": 0.5}\n' * 2)
    (tmp_path / "own.csv").write_text("text,cluster\none,mine\n")
    (tmp_path / "blank.csv").write_text("text,label,other\none, ,a\n ,b,a\n")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = polyvec(*arguments, code=2)
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_a_cut_text_is_told_on_stderr(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("one " * 900)
    result = polyvec("embed", path, "--model", model_folder)
    assert result.stderr.startswith("warning: 1 of 1 texts were longer than 512 tokens")
    assert len(json.loads(result.stdout)["embedding"]) == 32


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        (("--gpus", "0.5"), "torch"),
        (("--gpus", "1", "--engine", "torch-float8"), "torch-float8"),
        (("--engine", "torch"), "torch"),
    ],
)
def test_a_job_opens_the_engine_that_its_options_ask_for(
    tmp_path: Path, mini: Embedder, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], engine: str
) -> None:
    opened, jobs = [], []

    def prepare(job: Job, *_: object, **__: object) -> None:
        jobs.append(job)
        raise InputError("enough")

    monkeypatch.setattr("polyvec.cli.batch.Embedder", lambda _, *, engine, **__: opened.append(engine) or mini)
    monkeypatch.setattr("polyvec.cli.batch._place", lambda *_: None)
    monkeypatch.setattr("polyvec.batch.run.prepare", prepare)
    polyvec("embed", "notes.txt", "-o", tmp_path / "v", "--cluster", "auto", *options, code=2)
    assert opened == [job.engine for job in jobs] == [engine]


def test_a_job_keeps_the_engine_it_began_with_where_another_is_faster(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("one\ntwo\n")
    command = ("embed", tmp_path / "notes.txt", "-o", tmp_path / "v", "--model", model_folder)
    faster = "polyvec.inference.engines.opening.faster_precision"
    monkeypatch.setattr(faster, lambda *_, **__: "fp32")
    polyvec(*command)
    monkeypatch.setattr(faster, lambda *_, **__: "int8")
    assert "1 of 1 parts are finished" in polyvec(*command).stderr
    assert json.loads(polyvec(*command, "--dry-run").stdout)["parts_to_do"] == 0
    refused = polyvec(*command, "--engine", "onnx-int8", code=2)
    assert "with other engine from 'onnx' to 'onnx-int8'" in refused.stderr
