"""Texts that end their worker: found by halves, whatever else dies, and never tried again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyvec.batch.storage import Folder
from polyvec.batch.trial import Trial, WorkerError
from tests.batch.conftest import Output
from tests.batch.test_job import write


class Death(BaseException):
    """The end of a process, as far as a trial can know: nothing runs after it."""


def until_it_ends(folder: Path, texts: list[str], encode: Callable[[list[str]], list[str]]) -> tuple[Any, int]:
    """Run a trial as a supervisor would, and return its results and the number of deaths."""
    for deaths in range(100):
        trial = Trial(Folder.of(str(folder)), "part-0")
        try:
            return trial.run(texts, encode), deaths
        except Death:
            continue
    raise AssertionError("livelock")


@pytest.mark.parametrize("poison", [{3}, {0, 6}, {5, 6}, set(range(7))])
def test_the_guilty_are_found_and_the_innocent_run_whole(tmp_path: Path, poison: set[int]) -> None:
    texts = [f"t{i}" for i in range(7)]
    calls = []

    def encode(batch: list[str]) -> list[str]:
        calls.append(batch)
        if any(int(text[1:]) in poison for text in batch):
            raise Death
        return [text.upper() for text in batch]

    results, _ = until_it_ends(tmp_path, texts, encode)
    assert results == [None if i in poison else f"T{i}" for i in range(7)]
    assert calls[0] == texts
    if len(poison) < 7:
        assert calls[-1] == [t for i, t in enumerate(texts) if i not in poison]


def test_deaths_by_chance_convict_nobody(tmp_path: Path) -> None:
    texts = [f"t{i}" for i in range(8)]
    left = 6

    def encode(batch: list[str]) -> list[str]:
        nonlocal left
        if left:
            left -= 1
            raise Death
        return batch

    results, deaths = until_it_ends(tmp_path, texts, encode)
    assert results == texts and deaths == 6


def test_an_error_convicts_at_once_and_keeps_its_reason(tmp_path: Path) -> None:
    def encode(batch: list[str]) -> list[str]:
        if "bad" in batch:
            raise RuntimeError("the graph says no")
        return batch

    trial = Trial(Folder.of(str(tmp_path)), "part-0")
    assert trial.run(["a", "bad", "b"], encode) == ["a", None, "b"]
    assert trial.guilty == {1: ("the graph says no", 1)}
    trial.close()
    assert list(tmp_path.rglob("*.json")) == []


def test_a_slice_that_only_dies_whole_ends_the_job_with_a_sentence(tmp_path: Path) -> None:
    def encode(batch: list[str]) -> list[str]:
        if len(batch) == 8:
            raise Death
        return batch

    with pytest.raises(WorkerError, match="lost 12 workers though no text alone ends one"):
        until_it_ends(tmp_path, [f"t{i}" for i in range(8)], encode)
    results, deaths = until_it_ends(tmp_path, [f"t{i}" for i in range(8)], list)  # with more memory, for one
    assert len(results) == 8 and deaths == 0


def test_a_stop_by_the_user_is_no_loss(tmp_path: Path) -> None:
    def encode(batch: list[str]) -> list[str]:
        raise KeyboardInterrupt

    for _ in range(20):
        with pytest.raises(KeyboardInterrupt):
            Trial(Folder.of(str(tmp_path)), "part-0").run(["a"], encode)
    assert Trial(Folder.of(str(tmp_path)), "part-0").losses == 0


KILLER = """
import os, signal, sys
from polyvec.batch.worker import Worker
encode = Worker._encode
def killing(self, texts):
    if any("POISON" in text for text in texts):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, texts)
Worker._encode = killing
from polyvec.cli import app
app()
"""


def test_a_text_that_kills_its_process_ends_in_the_rejects(tmp_path: Path, calibrated: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["a", "b", "the POISON", "c", "the POISON", "d"])
    command = [sys.executable, "-c", KILLER, "embed", str(source), "-o", str(tmp_path / "out"), "--engine", "onnx"]
    command += ["--model", str(calibrated), "--part-rows", "4"]
    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        assert len(codes) < 15, "livelock"
        codes.append(subprocess.run(command, capture_output=True, env={**os.environ}).returncode)
    assert codes[-1] == 0
    output = Output(tmp_path / "out")
    assert [r["row"] for r in output.rejects] == ["in.jsonl:3", "in.jsonl:5"]
    assert output.rejects[0]["reason"] == "ended its worker 2 times"
    assert len(output.table) == 4


def test_a_text_that_needs_more_memory_than_is_allowed_is_set_aside(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ["one", "router " * 9000, "two"])

    def embed(memory: int, output: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", "from polyvec.cli import app; app()", "embed", str(source), "--engine", "onnx"]
        command = [*program, "-o", str(tmp_path / output), "--memory", str(memory)]
        return subprocess.run(command, capture_output=True, text=True)

    refused = embed(20, "refused")
    assert refused.returncode == 2
    model_mb = int(re.search(r"memory must be more than the (\d+) MB", refused.stderr)[1])  # type: ignore[index]
    tight = model_mb + 60  # polyvec-mini needs about 150 for 8192 tokens
    assert embed(tight, "tight").returncode == 0
    output = Output(tmp_path / "tight")
    assert output.table["id"].to_pylist() == ["in.jsonl:1", "in.jsonl:3"]
    assert output.rejects[0]["reason"] == f"needs more memory than --memory {tight} MB"
    assert embed(3000, "ample").returncode == 0
    assert len(Output(tmp_path / "ample").table) == 3
