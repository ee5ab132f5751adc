"""The engine in a child process: its ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from polyvec import Embedder
from polyvec.inference.batching import Batch
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
