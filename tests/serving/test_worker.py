"""The engine in a child process: its ends."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polyvec import Embedder
from polyvec.inference.batching import Batch
from polyvec.serving import worker as worker_module
from polyvec.serving.worker import WorkerEngine, WorkerLostError, WorkerSettings, open_workers


def batch() -> Batch:
    return Batch.of([np.array([0, 7, 8, 2], np.int32), np.array([0, 9, 2], np.int32)], [-1, 2])


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)  # the signal is only sent when kill returns


def test_it_computes_what_the_engine_does_and_its_lane_too(model_folder: Path, embedder: Embedder) -> None:
    worker = WorkerEngine(WorkerSettings(model_folder, "onnx", threads=2))
    try:
        assert (worker.lanes, worker.lane.lanes, worker.lane.lane) == (2, 1, worker.lane)
        for engine in (worker, worker.lane):
            np.testing.assert_allclose(engine.pool(batch()), embedder.engine.pool(batch()), atol=1e-6)
            np.testing.assert_allclose(engine.token_states(batch()), embedder.engine.token_states(batch()), atol=1e-5)
    finally:
        worker.close()
    assert not multiprocessing.active_children()
    with pytest.raises(WorkerLostError):
        worker.pool(batch())


def test_closed_while_another_starts_it_leaves_none_behind(model_folder: Path) -> None:
    worker = WorkerEngine(WorkerSettings(model_folder, "onnx"))
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    while len(multiprocessing.active_children()) != 1 or worker.alive:  # the next one is there and not yet up
        time.sleep(0.001)
    started = time.monotonic()
    worker.close()
    assert not multiprocessing.active_children() and not worker.alive
    assert time.monotonic() - started < 20


def test_a_pass_that_hangs_ends_its_process_and_another_computes(
    model_folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = WorkerEngine(WorkerSettings(model_folder, "onnx"))
    try:
        first = worker.pid
        assert first is not None
        monkeypatch.setattr(worker_module, "_PASS_SECONDS", 0.5)
        stop_process(first)
        with pytest.raises(WorkerLostError):
            worker.pool(batch())
        monkeypatch.undo()
        np.testing.assert_allclose(worker.pool(batch()), embedder.engine.pool(batch()), atol=1e-6)
        assert worker.pid != first
    finally:
        worker.close()


def test_more_callers_than_lanes_get_their_own_answers(model_folder: Path, embedder: Embedder) -> None:
    rows = [np.array([0, *range(7, 8 + i), 2], np.int32) for i in range(24)]
    worker = WorkerEngine(WorkerSettings(model_folder, "onnx", threads=2))
    try:
        with ThreadPoolExecutor(worker.lanes + 1) as pool:
            answers = list(pool.map(lambda row: worker.lane.pool(Batch.of([row], [-1])), rows))
    finally:
        worker.close()
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(answer, embedder.engine.pool(Batch.of([row], [-1])), atol=1e-6)


def test_closing_ends_a_pass_that_hangs(model_folder: Path) -> None:
    worker = WorkerEngine(WorkerSettings(model_folder, "onnx"))
    assert worker.pid is not None
    stop_process(worker.pid)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(worker.pool, batch())
        time.sleep(0.05)  # until it waits for the child
        started = time.monotonic()
        worker.close()
        with pytest.raises(WorkerLostError):
            hanging.result(10)
    assert time.monotonic() - started < 10 and not multiprocessing.active_children()


class FakeChild:
    """A process that is up at once, until it died; the second of them does not start."""

    all: list[FakeChild] = []
    numbers = itertools.count(1)

    def __init__(self, settings: WorkerSettings) -> None:
        self.number, self.facts, self.is_up = next(self.numbers), settings.model, False
        if self.number == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        self.died = threading.Event()
        self.process = SimpleNamespace(join=self.died.wait, pid=self.number, exitcode=1)
        self.all.append(self)

    def open(self) -> None:
        self.is_up = True

    def end(self) -> None:
        self.is_up = False
        self.died.set()


@pytest.fixture
def fakes(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(FakeChild, "all", [])
    monkeypatch.setattr(FakeChild, "numbers", itertools.count(1))
    monkeypatch.setattr(worker_module, "_Child", FakeChild)
    return WorkerSettings(worker_module._Facts.of(embedder.engine))  # type: ignore[arg-type]


def test_a_machine_out_of_handles_is_asked_again(fakes: Any) -> None:
    worker = WorkerEngine(fakes)
    FakeChild.all[0].died.set()
    started = time.monotonic()
    while worker.pid != 3 or not worker.alive:
        time.sleep(0.001)
        assert time.monotonic() < started + 10
    worker.close()
    assert not worker.alive and FakeChild.all[-1].died.is_set()


def test_workers_are_closed_however_the_server_ends(fakes: Any) -> None:
    with pytest.raises(OSError, match="Too many"), open_workers([fakes] * 2):
        raise AssertionError("one of them is missing")
    assert [child.died.is_set() for child in FakeChild.all] == [True]
    with pytest.raises(KeyboardInterrupt), open_workers([fakes]) as workers:
        assert workers[0].alive
        raise KeyboardInterrupt
    assert FakeChild.all[-1].died.is_set()
