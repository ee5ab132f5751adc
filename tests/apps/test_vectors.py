"""The output of a job becomes a database without a second embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyvec import Embedder
from polyvec.apps.index import Index
from polyvec.apps.vectors import add_vectors
from polyvec.batch.engines import Here
from polyvec.batch.job import Job
from polyvec.batch.run import prepare, run
from polyvec.cli.common import make_stamp
from polyvec.errors import InputError

TEXTS = ["The train is late.", "A cat sleeps. It dreams.", "Bread needs flour.", "The train is early.", "A dog."]


@pytest.fixture
def embed(tmp_path: Path, embedder: Embedder) -> Callable[..., str]:
    def start(**fields: Any) -> str:
        source, output = tmp_path / "in.txt", str(tmp_path / "out")
        source.write_text("".join(f"{text}\n" for text in TEXTS))
        options = {"task": "retrieval.passage", "keep": ("text",), "part_rows": 2, **fields}
        names = ("task", "dimensions", "dtype")
        stamp = make_stamp(
            embedder, **{"dimensions": None, "dtype": "float32"} | {k: options[k] for k in names if k in options}
        )
        job = Job(source=str(source), model=str(embedder.folder), stamp=stamp, **options)
        run(prepare(job, output, Here()), Here())
        return output

    return start


def test_rows_are_found_by_meaning_and_words_and_added_once(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = embed()
    index = Index(tmp_path / "db", embedder, create=True)
    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "encode_stream", None)  # nothing is embedded again
        assert add_vectors(index, output) == 5
        assert add_vectors(index, output) == 0
    assert len(index.store) == 5
    hit = index.search("flour", mode="text")[0].passage
    assert (hit.source, hit.text) == ("in.txt:3", "Bread needs flour.")
    expected = Index(tmp_path / "own", embedder, create=True)
    (tmp_path / "docs").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "docs" / f"{i}.txt").write_text(text)
    expected.update([tmp_path / "docs"])
    found = [[h.passage.text for h in x.search("train", mode="vector", top=5)] for x in (index, expected)]
    assert found[0] == found[1]


def test_chunks_become_passages_with_their_characters(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder
) -> None:
    index = Index(tmp_path / "db", embedder, create=True)
    assert add_vectors(index, embed(late_chunking="sentence")) == 6
    hit = index.search("dreams", mode="text")[0].passage
    assert (hit.source, hit.text.strip(), hit.end) == ("in.txt:2", "It dreams.", 24)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "separation"}, "must have the task of the database, retrieval.passage, got separation"),
        ({"dtype": "binary"}, "must be float32 or float16 to be searched, got binary"),
        ({"dimensions": 16}, "must have the dimensions of the database, 32, got 16"),
        ({"keep": ()}, "must keep their texts under 'text', got none; embed with --keep text"),
    ],
)
def test_vectors_that_cannot_be_searched_are_refused(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        add_vectors(Index(tmp_path / "db", embedder, create=True), embed(**fields))
    with pytest.raises(InputError, match="must be a folder with a _manifest.json, got"):
        add_vectors(Index(tmp_path / "db", embedder, create=True), str(tmp_path / "docs"))
