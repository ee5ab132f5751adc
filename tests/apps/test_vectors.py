"""The output of a job becomes a database without a second embedding."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.apps.index import Index
from polyvec.apps.vectors import add_vectors
from polyvec.batch.engines import Here
from polyvec.batch.job import Job
from polyvec.batch.output import Output
from polyvec.batch.run import prepare, run
from polyvec.cli import app
from polyvec.cli.common import make_stamp
from polyvec.errors import InputError

TEXTS = ["The train is late.", "A cat sleeps. It dreams.", "Bread needs flour.", "The train is early.", "A dog."]


@pytest.fixture
def embed(tmp_path: Path, embedder: Embedder) -> Callable[..., str]:
    def start(
        texts: list[str] = TEXTS, rows: list[dict[str, Any]] | None = None, into: str = "out", **fields: Any
    ) -> str:
        source, output = tmp_path / "in.txt", str(tmp_path / into)
        source.write_text("".join(f"{text}\n" for text in texts))
        if rows is not None:
            source = tmp_path / "in.jsonl"
            source.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
        assert add_vectors(index, Output(output)) == (5, 0)
        assert add_vectors(index, Output(output)) == (0, 0)
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
    assert add_vectors(index, Output(embed(late_chunking="sentence"))) == (6, 0)
    hit = index.search("dreams", mode="text")[0].passage
    assert (hit.source, hit.text.strip(), hit.end) == ("in.txt:2", "It dreams.", 24)


def test_a_changed_input_is_an_update_and_another_folder_takes_no_id(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = Index(tmp_path / "db", embedder, create=True)
    add_vectors(index, Output(embed()))
    changed = [*TEXTS[:2], "Milk.", *TEXTS[3:]]
    embed(changed)
    monkeypatch.chdir(tmp_path)
    assert (add_vectors(index, Output("db/../out")), len(index.store)) == ((2, 0), 5)  # the one part that is new
    assert not index.search("flour", mode="text") and index.search("milk", mode="text")
    embed()
    assert (add_vectors(index, Output("out")), add_vectors(index, Output("out"))) == ((2, 0), (0, 0))
    assert index.search("flour", mode="text")
    other = embed(["The next month.", *TEXTS[1:]], into="next")
    with pytest.raises(InputError, match=rf"got 'in.txt:1' in {other} part-\w+ and in {tmp_path}/out part-\w+; embed"):
        add_vectors(index, Output(other))
    assert len(index.store) == 5 and not index.search("month", mode="text")


def test_rows_that_the_folder_has_no_longer_go_and_those_of_others_stay(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder
) -> None:
    index = Index(tmp_path / "db", embedder, create=True)
    rows = [{"id": f"a{i}", "text": text} for i, text in enumerate(TEXTS)]
    add_vectors(index, Output(embed(rows=rows, id_column="id")))
    other = [{"id": f"b{i}", "text": text} for i, text in enumerate(TEXTS)]
    add_vectors(index, Output(embed(rows=other, id_column="id", into="out of b")))
    fewer = [rows[0], *rows[3:]]  # the second part's rows are its third and fourth no longer
    assert add_vectors(index, Output(embed(rows=fewer, id_column="id"))) == (2, 2)  # its last part is the same
    assert sorted(index.store.sources()) == ["a0", "a3", "a4", *(f"b{i}" for i in range(5))]
    assert not any(hit.passage.source == "a2" for hit in index.search("flour", mode="text"))


def test_a_part_made_again_with_a_row_more_brings_the_row(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, output = Index(tmp_path / "db", embedder, create=True), embed()
    tables = Output.tables
    with monkeypatch.context() as patch:  # as if the second row of each part had needed more than --memory
        patch.setattr(Output, "tables", lambda self: ((name, table[:1]) for name, table in tables(self)))
        assert add_vectors(index, Output(output)) == (3, 0)
    assert (add_vectors(index, Output(output)), len(index.store)) == ((4, 0), 5)
    assert add_vectors(index, Output(output)) == (0, 0)


def test_an_id_that_two_parts_have_is_refused(tmp_path: Path, embed: Callable[..., str], embedder: Embedder) -> None:
    rows = [{"id": i, "text": text} for i, text in zip((1, 2, 3, 2), TEXTS, strict=False)]
    output = embed(rows=rows, id_column="id")
    with pytest.raises(InputError, match=r"must tell all rows of a database apart, got '2' in .*; embed with --id"):
        add_vectors(Index(tmp_path / "db", embedder, create=True), Output(output))


def test_columns_called_start_and_end_are_none_of_a_chunk(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder
) -> None:
    index = Index(tmp_path / "db", embedder, create=True)
    row = {"text": TEXTS[0], "start": 4, "end": 9, "sold": True}
    add_vectors(index, Output(embed(rows=[row], keep=tuple(row))))
    (hit,) = index.search("train", mode="text")
    assert (hit.passage.text, hit.passage.start, hit.passage.end) == (TEXTS[0], 0, len(TEXTS[0]))
    assert hit.passage.metadata == {"start": "4", "end": "9", "sold": "true"}


def test_vectors_of_another_model_are_refused_with_its_option(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder, mini: Embedder
) -> None:
    with pytest.raises(InputError, match="the weights of the database, .*; embed again with --model"):
        add_vectors(Index(tmp_path / "db", mini, create=True), Output(embed()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "separation"}, "must have the task of the database, retrieval.passage, got separation"),
        ({"dtype": "binary"}, "must be float32 or float16 to be searched, got binary"),
        ({"dimensions": 16, "dtype": "binary"}, "must be float32 or float16 to be searched, got binary"),
        ({"dimensions": 16}, "dimensions of the database, 32, got 16; .*or index into a new database with"),
        ({"keep": ()}, "must keep their texts under 'text', got none; embed with --keep text"),
    ],
)
def test_vectors_that_cannot_be_searched_are_refused(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        add_vectors(Index(tmp_path / "db", embedder, create=True), Output(embed(**fields)))
    with pytest.raises(InputError, match="must be a folder with a _manifest.json, got"):
        add_vectors(Index(tmp_path / "db", embedder, create=True), Output(str(tmp_path / "docs")))


def test_a_new_database_has_the_width_of_the_vectors(
    tmp_path: Path, embed: Callable[..., str], embedder: Embedder
) -> None:
    output, database = embed(dimensions=16), str(tmp_path / "db")
    command = ["index", "--vectors", output, "-d", database, "--model", str(embedder.folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "5 added; 5 passages" in result.stderr, result.stderr
    assert Index(database, embedder).store.dimensions == 16
    result = CliRunner().invoke(app, [*command[:2], embed(into="whole"), *command[3:]])
    assert result.exit_code == 2 and "must meet the model that made it" in result.stderr
    assert "with 16 dimensions, or index into a new database" in result.stderr
