"""Cells are measured once, resumed, compared, and never mixed with those of other weights or data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from polyvec import Embedder
from polyvec.cli import app
from polyvec.errors import InputError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.report import _comparable, html_report
from polyvec.evaluation.run import comparisons, plan, run_cells
from polyvec.evaluation.suites import Pairs, Suite
from polyvec.evaluation.systems import System, open_system
from polyvec.inference.quantize import unit

WORDS = ("rain", "snow", "router", "train", "bread", "music", "river", "stone")
SUITE = Suite("sts", "words", Pairs(list(WORDS), list(WORDS[::-1]), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]), "en")


def random_system(name: str = "random", weights: str = "w1", seed: int = 0) -> System:
    def encode(texts: Sequence[str], adapter: str | None, prompt: str) -> Vectors:
        rows = [np.random.default_rng([seed, *text.encode()]).normal(size=16) for text in texts]
        return unit(np.array(rows, np.float32))

    return System(name, weights, "none", 16, encode)


def test_a_finished_cell_is_read_and_not_measured_again(tmp_path: Path) -> None:
    told: list[str] = []
    cells = plan([random_system()], [SUITE], dimensions=[8, 16], dtypes=["float32", "binary"])
    first = run_cells(cells, tmp_path, report=told.append)
    assert len(first) == len(told) == 4
    assert run_cells(cells, tmp_path, report=told.append) == first and len(told) == 4
    assert [row["bytes_per_vector"] for row in first] == [32, 1, 64, 2]


def test_a_result_of_other_weights_or_data_is_refused_and_kept(tmp_path: Path) -> None:
    run_cells(plan([random_system()], [SUITE]), tmp_path)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"must be of the same weights \(w2\), got a result of w1"):
        run_cells(plan([random_system(weights="w2")], [SUITE]), tmp_path)
    other = replace(SUITE, data=Pairs(["a", "b"], ["c", "d"], [1.0, 2.0]))
    with pytest.raises(InputError, match="must be of the same data"):
        run_cells(plan([random_system()], [other]), tmp_path)
    assert path.read_bytes() == before
    row = json.loads(before)
    for damaged in (
        {},
        {"stamp": []},
        {"stamp": row["stamp"]},
        {**row, "stamp": []},
        {**row, "stamp": "w1"},
        row["stamp"],
    ):
        path.write_text(json.dumps(damaged))
        with pytest.raises(InputError, match="must be (a result of this command|of the same protocol)"):
            run_cells(plan([random_system()], [SUITE]), tmp_path)


def test_a_width_beyond_the_model_is_named() -> None:
    with pytest.raises(InputError, match="dimensions of random must be between 1 and 16, got 17"):
        plan([random_system()], [SUITE], dimensions=[17])


def test_two_models_are_compared_on_the_same_observations(tmp_path: Path) -> None:
    systems = [random_system(), random_system("other", "w2", seed=1)]
    first, second = run_cells(plan(systems, [SUITE]), tmp_path)
    (test,) = comparisons([first, second])
    assert test["difference"] == pytest.approx(second["score"] - first["score"]) and test["low"] < test["high"]


def test_the_report_is_one_page_that_asks_for_nothing(tmp_path: Path) -> None:
    long = [replace(SUITE, name="long", group=str(n), num_tokens=n) for n in (256, 512)]
    suites = [SUITE, replace(SUITE, name="<odd>", group=""), *long]
    systems = [random_system(), random_system("other", "w2", seed=1)]
    results = run_cells(plan(systems, suites, dimensions=[8, 16]), tmp_path)
    page = html_report(results, list(comparisons(results)))
    headings = re.findall("<(?:h2|caption)>([^<]+)</", page)
    assert headings == [
        "By suite", "By language", "Quality against dimensions", "Quality against bytes", "Quality against length",
        "Quality against time", "All scores", "Paired tests",
    ]  # fmt: skip
    assert page.count("<svg") == 6 and "&lt;odd&gt;" in page and "<odd>" not in page
    links = re.findall(r"""(?:href|src|url)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "<script" not in page and "@import" not in page


def test_a_page_of_one_number_has_the_plots_that_say_something(tmp_path: Path) -> None:
    page = html_report(run_cells(plan([random_system()], [SUITE]), tmp_path), [])
    assert re.findall("<(?:h2|caption)>([^<]+)</", page) == ["By suite", "All scores"]


def test_means_are_over_suites_that_every_model_has(tmp_path: Path) -> None:
    """A line through means of other suites would compare what does not compare."""
    first, other = random_system(), random_system("other", "w2", seed=1)
    lonely = replace(SUITE, group="de", data=Pairs(SUITE.data.first[:4], SUITE.data.second[:4], [1.0, 2.0, 3.0, 4.0]))
    cells = plan([first], [SUITE, lonely], dimensions=[8, 16]) + plan([other], [SUITE], dimensions=[8, 16])
    rows = run_cells(cells, tmp_path)
    assert [(r["model"], r["group"]) for r in _comparable(rows)] == [("random", "en")] * 2 + [("other", "en")] * 2


def test_our_vectors_are_converted_as_the_embedder_gives_them(model_folder: Path, embedder: Embedder) -> None:
    system = open_system(str(model_folder), engine="onnx")
    assert system.encode is not None
    full = system.encode(WORDS, "separation", "")
    for width, dtype in ((32, "float32"), (16, "binary")):
        expected = embedder.encode(list(WORDS), task="separation", dimensions=width, dtype=dtype)
        np.testing.assert_allclose(system.convert(full, width, dtype), expected, atol=1e-6)


def test_the_command_scores_a_file_and_writes_the_page(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"text_a": a, "text_b": b, "label": int(a < b)} for a, b in zip(WORDS, WORDS[1:], strict=False)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "pairs.jsonl", "--model", str(model_folder), "--engine", "onnx", "--ablate", "task"]
    result = CliRunner().invoke(app, [*command, "--json", "--html", "page.html"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    with_task, without = answer["results"]
    assert with_task["kind"] == "pair-classification" and with_task["variant"] == ""
    assert with_task["stamp"]["tasks"] == [{"adapter": "classification", "prompt": ""}] * 2
    assert without["stamp"]["tasks"] == [{"adapter": None, "prompt": ""}] * 2 and without["variant"] == "no-task"
    assert len(answer["comparisons"]) == 1
    assert Path("page.html").read_text().startswith("<!doctype html>")
    assert "cosine_ap" in CliRunner().invoke(app, command).stdout
    bad = CliRunner().invoke(app, ["evaluate", "sts=pairs.jsonl"])
    assert bad.exit_code == 2 and "must have the column 'score' for sts" in bad.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "pairs.jsonl",
            '{"left": "x", "right": "y"}\n',
            "must have columns of a suite, .* got left, right; rename them",
        ),
        ("set/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq\tnobody\t1\n", "1 unknown, the first 'nobody'"),
        (
            "set/corpus.jsonl",
            '{"_id": "d", "text": "x"}\n{"_id": "d", "text": "y"}\n',
            "an id of its own, got 'd' again",
        ),
        ("set/corpus.jsonl", "", "corpus must hold at least one text, got none"),
    ],
)
def test_bad_data_ends_the_command_before_anything_is_written(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "?"}\n')
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    (tmp_path / name).write_text(text)
    page = tmp_path / "page.html"
    page.write_text("of before")
    command = ["evaluate", str(tmp_path / name.split("/")[0]), "--model", "bm25", "--html", str(page)]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and re.search(message, result.stderr), result.output
    assert page.read_text() == "of before" and not (tmp_path / "out").exists()


def test_vectors_with_nan_end_a_run_and_leave_what_is_there(tmp_path: Path) -> None:
    def broken(texts: Sequence[str], adapter: str | None, prompt: str) -> Vectors:
        return np.full((len(texts), 16), np.nan, np.float32)

    run_cells(plan([random_system()], [SUITE]), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="vectors must be finite, got 8 of 8 with NaN or infinity in words en"):
        run_cells(plan([random_system(), System("peer", "w", "none", 16, broken)], [SUITE]), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_of_any_script_and_sign_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ["data[red] :smile:", "cost$\\frac$", "评估", "a_name_that_is_wider_than_a_terminal" * 3]
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text('{"query": "rain?", "passage": "Rain falls.", "source": "[/red]"}\n')
    command = ["evaluate", *(str(tmp_path / f"{name}.jsonl") for name in names), "--model", "bm25"]
    command += ["-o", str(tmp_path / "out"), "--html"]
    page = tmp_path / "page.html"
    result = CliRunner().invoke(app, [*command, str(page)])
    assert result.exit_code == 0 and "warning" not in result.stderr, result.output
    suites = "".join(line.split("│")[2].strip() for line in result.stdout.splitlines() if line.count("│") == 5)
    plots = re.sub("<[^>]*>", "", page.read_text(encoding="utf-8").split("<table>")[0])
    for name in names:
        assert f"{name}[/red]".replace(" ", "") in suites.replace(" ", "")
        assert name in plots
    result = CliRunner().invoke(app, [*command, str(tmp_path / "none" / "page.html")])
    assert result.exit_code == 2 and "output folder must exist" in result.stderr


def test_two_files_of_one_name_end_the_command_before_any_work(tmp_path: Path) -> None:
    files = [tmp_path / folder / "test.jsonl" for folder in ("mine", "yours")]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"query": "rain?", "passage": "Rain falls."}\n')
    command = ["evaluate", *map(str, files), "--model", "bm25", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert f"got bm25 on test (retrieval) twice, of {files[0]} and {files[1]}; name a file once" in result.stderr


def test_results_of_other_weights_end_the_command(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"query": "rain?", "passage": "Rain falls."}\n')
    command = ["evaluate", str(tmp_path / "pairs.jsonl"), "--model", "bm25", "-o", str(tmp_path / "out"), "--json"]
    assert CliRunner().invoke(app, command).exit_code == 0
    (cell,) = (tmp_path / "out").iterdir()
    row = json.loads(cell.read_text())
    cell.write_text(json.dumps({**row, "stamp": {**row["stamp"], "weights": "another"}}))
    before = cell.read_bytes()
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and "must be of the same weights" in result.stderr
    assert "choose another --output folder, or move it away" in result.stderr and cell.read_bytes() == before
    nothing = CliRunner().invoke(app, ["evaluate"])
    assert nothing.exit_code == 2 and "evaluate needs DATA or --mteb, got neither" in nothing.stderr
