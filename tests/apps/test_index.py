"""A database that follows its files, and survives being killed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyvec import Embedder
from polyvec.apps.index import Index
from polyvec.errors import InputError


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "router.md").write_text("# Reset\n\nHold the button of the router.\n\nThen wait.\n")
    (folder / "cat.txt").write_text("A cat sleeps on the chair.")
    return folder


@pytest.fixture
def index(tmp_path: Path, embedder: Embedder) -> Index:
    return Index(tmp_path / "db", embedder, create=True)


def rows(index: Index) -> list[tuple[object, ...]]:
    """Everything the database holds, in one order."""
    table = index.store._table.to_arrow().to_pylist()
    return sorted(tuple(map(repr, row.values())) for row in table)


def test_an_index_says_what_it_holds(index: Index, docs: Path) -> None:
    index.update([docs])
    assert repr(index) == f"<Index {index.store.location}: {len(index.store)} passages of {index.embedder.model_name}>"


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_that_is_in_no_list_is_refused_and_not_read_letter_by_letter(
    index: Index, docs: Path, kind: type[str | Path]
) -> None:
    with pytest.raises(InputError, match="paths must be a list of files and folders, got .* put it into a list"):
        index.update(kind(docs))  # type: ignore[arg-type]


def test_the_database_follows_its_files(index: Index, docs: Path) -> None:
    assert str(index.update([docs])) == "2 added"
    assert str(index.update([docs, docs / "cat.txt"])) == "2 unchanged"
    (docs / "cat.txt").write_text("A dog barks.")
    (docs / "router.md").rename(docs / "moved.md")
    assert str(index.update([docs])) == "1 changed, 1 moved"
    texts = {hit.passage.text: Path(hit.passage.source).name for hit in index.search("dog")}
    assert texts == {
        "A dog barks.": "cat.txt",
        "# Reset\n\nHold the button of the router.": "moved.md",
        "Then wait.": "moved.md",
    }
    (docs / "moved.md").unlink()
    assert str(index.update([docs / "cat.txt"])) == "1 unchanged"  # moved.md was not asked about
    assert str(index.update([docs])) == "1 removed, 1 unchanged"
    shutil.rmtree(docs)
    assert str(index.update([docs])) == "1 removed" and len(index.store) == 0


def test_what_is_still_there_stays_in_the_database(index: Index, docs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (docs / "LICENSE").write_text("Use it freely.")  # read where it is asked for alone
    (docs / "sub").mkdir()
    (docs / "sub" / "tea.txt").write_text("Tea is hot.")
    index.update([docs, docs / "LICENSE"])
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == docs / "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        report = index.update([docs])
        assert (report.removed, report.unchanged) == (0, 2)
        assert report.failed == [f"{docs}/sub must be a readable folder, got: Permission denied"]
        assert len(index.update([docs / "sub"]).failed) == 1
    assert {Path(source).name for source in index.store.sources()} == {"router.md", "cat.txt", "LICENSE", "tea.txt"}
    (docs / "LICENSE").unlink()
    shutil.rmtree(docs / "sub")
    assert str(index.update([docs])) == "2 removed, 2 unchanged"


def test_passages_are_late_chunked_and_know_their_place(index: Index, docs: Path, embedder: Embedder) -> None:
    index.update([docs])
    text = (docs / "router.md").read_text()
    hit = index.search("button", mode="text")[0].passage
    assert (hit.line, hit.heading, text[hit.start : hit.end]) == (1, "Reset", hit.text)
    alone = embedder.encode(hit.text, task="retrieval.passage")
    query = embedder.encode("button", task="retrieval.query")
    found = index.search("button", mode="vector", where={"heading": "Reset"})
    score = next(h.score for h in found if h.passage == hit)
    chunks = embedder.encode(text, task="retrieval.passage", late_chunking=[(hit.start, hit.end)])
    assert score == pytest.approx(float(chunks.vectors[0] @ query), abs=1e-4)
    assert score != pytest.approx(float(alone @ query), abs=1e-3)


def test_a_bad_file_is_told_and_the_rest_goes_on(index: Index, docs: Path) -> None:
    index.update([docs])
    (docs / "cat.txt").write_bytes(b"\0")
    (docs / "new.txt").write_text("News of today.")
    (docs / "empty.csv").write_text("")
    report = index.update([docs, docs / "missing.txt"])
    assert (report.added, report.unchanged, len(report.failed)) == (1, 1, 3)
    assert "cat.txt must be text, got a binary file" in "".join(report.failed)
    assert index.search("cat", mode="text")  # what was read last stays
    (docs / "zero.txt").write_text("one \u200b\u200b")
    assert str(index.update([docs / "zero.txt"])) == "1 added"
    os.mkfifo(docs / "pipe")  # which nobody would ever open to write
    assert "pipe must be a file that can be read again" in index.update([docs / "pipe"]).failed[0]
    if sys.platform == "linux":  # others have no such names
        Path(os.fsdecode(os.fsencode(docs) + b"/caf\xe9.txt")).write_text("coffee")
        report = index.update([docs])
        assert report.unchanged == 3 and "must be a name in UTF-8" in "".join(report.failed)


def test_words_however_long_are_found(index: Index, docs: Path) -> None:
    digest = "da39a3ee5e6b4b0d3255bfef95601890afd80709" * 2
    (docs / "hash.txt").write_text(f"The sum is {digest} here.")
    index.update([docs])
    assert [hit.passage.source for hit in index.search(digest, mode="text")] == [str(docs / "hash.txt")]


def test_one_text_that_cannot_be_embedded_does_not_stop_its_group(
    index: Index, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = index.embedder.encode

    def refuse(texts: list[str], **options: object) -> object:
        if any("cat" in text for text in texts):
            raise InputError("late_chunking[0] must hold text")
        return encode(texts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(index.embedder, "encode", refuse)
    report = index.update([docs])
    assert report.added == 1 and "cat.txt must be text that can be embedded" in report.failed[0]


def test_another_model_or_width_is_refused(index: Index, docs: Path, mini: Embedder, embedder: Embedder) -> None:
    index.update([docs])
    with pytest.raises(InputError, match=r"must meet the model that made it.*got polyvec-mini"):
        Index(index.store.location, mini)
    with pytest.raises(InputError, match="must meet the model that made it"):
        Index(index.store.location, embedder, dimensions=16, create=True)
    with pytest.raises(InputError, match="query must hold text"):
        Index(index.store.location, embedder).search(" ")
    with pytest.raises(InputError, match="query must be a str, got list"):
        Index(index.store.location, embedder).search(["a"])  # type: ignore[arg-type]


def test_a_narrow_index_is_searched_at_its_width(tmp_path: Path, docs: Path, embedder: Embedder) -> None:
    Index(tmp_path / "db", embedder, dimensions=16, create=True).update([docs])
    assert len(Index(tmp_path / "db", embedder).search("cat", mode="vector")) == 3


def test_vectors_are_stored_in_the_dtype_that_is_asked_for(tmp_path: Path, docs: Path, embedder: Embedder) -> None:
    Index(tmp_path / "db", embedder, dtype="float16", create=True).update([docs])
    again = Index(tmp_path / "db", embedder, create=True)  # the dtype of the database stands
    assert again.store.dtype == "float16" and str(again.update([docs])) == "2 unchanged"
    with pytest.raises(InputError, match="must keep its dtype, float16, got int8"):
        Index(tmp_path / "db", embedder, dtype="int8", create=True)
    with pytest.raises(InputError, match="dtype of a database must be one of"):
        Index(tmp_path / "new", embedder, dtype="int4", create=True)


KILLED = """
import os, signal, sys, threading
import polyvec.apps.index as module
from polyvec import Embedder
database, folder, model, seconds = sys.argv[1:]
module._GROUP_CHARACTERS = 1  # a commit a file
embedder = Embedder(model, engine="onnx", threads=1)
import lancedb
threading.Timer(float(seconds), os.kill, (os.getpid(), signal.SIGKILL)).start()
module.Index(database, embedder, create=True).update([folder])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ten_kills_leave_the_database_of_one_clean_run(tmp_path: Path, embedder: Embedder) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.txt").write_text("\n\n".join(f"Number {j} of file {i} is here." for j in range(5)))
    clean = Index(tmp_path / "clean", embedder, create=True)
    clean.update([folder])
    rng = random.Random(0)
    held = []
    for _ in range(10):
        arguments = (str(tmp_path / "db"), str(folder), str(embedder.folder), str(rng.uniform(0.01, 0.5)))
        result = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
        assert result.returncode == -9, result.stderr
        opened = Index(tmp_path / "db", embedder, create=True)
        assert len(opened.store) == 5 * len(opened.store.sources())  # every file whole
        assert opened.search("number", top=1) or not len(opened.store)
        held.append(len(opened.store))
    assert held == sorted(held)
    final = Index(tmp_path / "db", embedder, create=True)
    final.update([folder])
    assert rows(final) == rows(clean)
