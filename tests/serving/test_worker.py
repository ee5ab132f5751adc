"""The engine in a child process: its ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from polyvec import Embedder
from polyvec.inference.batching import Batch
from polyvec.serving import worker as worker_module
from polyvec.serving.worker import WorkerEngine, WorkerLostError, WorkerSettings


def batch() -> Batch:
    return Batch.of([np.array([0, 7, 8, 2], np.int32), np.array([0, 9, 2], np.int32)], [-1, 2])


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
        os.kill(first, signal.SIGSTOP)
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
