"""The engine in a process of its own, restarted when it dies.

Why a child under the engine's own contract, and not several servers under a supervisor: one scheduler sees all
requests, so that batches stay full, limits and fairness hold for the server as a whole, and whoever waits is not lost
with the process that computes; what died with a batch is computed again. The child holds weights and kernels, where
crashes and out-of-memory kills come from; the parent holds sockets and texts. With several devices or CPU sockets
there is one child for each.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import PolyvecError
from polyvec.inference.batching import Batch
from polyvec.inference.embedder import Embedder
from polyvec.model.config import ModelConfig

_log = logging.getLogger(__name__)
_PROCESSES = multiprocessing.get_context("spawn")  # a fork would copy threads and locks in any state
_START_SECONDS = 120.0  # for a large model from a slow disk
_PASS_SECONDS = 120.0  # a pass that takes longer hangs: no batch needs that long
_RETRY_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)  # before each new start; a machine out of memory needs a pause


class WorkerLostError(PolyvecError):
    """The process died while it computed, or did not come up."""


class EngineError(PolyvecError):
    """The engine raised; the message is the name of its exception alone, for exceptions may quote a text."""


@dataclass(frozen=True)
class WorkerSettings:
    """What the child opens. ``cpus`` are the cores it may run on, None for all; ``threads`` as ``Embedder`` has it."""

    model: str | Path | None
    engine: str = "auto"
    device: str | None = None
    threads: int | None = None
    cpus: frozenset[int] | None = None


@dataclass(frozen=True)
class _Facts:
    config: ModelConfig
    name: str
    batch_tokens: int


class WorkerEngine:
    """An ``Engine`` whose passes run in a child process. Call it from one thread at a time; ``close`` ends the child.

    Raises what opening the model raises.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._connection: Connection[Any, Any] | None = None
        self._closing = False
        facts = self._open()
        self.config, self.name, self.batch_tokens = facts.config, facts.name, facts.batch_tokens
        self._keeper = threading.Thread(target=self._keep_alive, name="worker-keeper", daemon=True)
        self._keeper.start()

    @property
    def alive(self) -> bool:
        """A process is up and has its model."""
        return self._connection is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors. Raises ``WorkerLostError``, or ``EngineError`` when the engine raised."""
        return self._call("pool", batch)

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens. Raises as ``pool``."""
        return self._call("token_states", batch)

    def close(self) -> None:
        """End the child, which is idle; one that is not within a second is killed."""
        with self._changed:
            self._closing = True
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        if connection is not None:
            connection.close()  # the child reads the end of it and goes
        self._process.join(1)
        self._process.kill()
        self._keeper.join()

    def _call(self, method: str, batch: Batch) -> NDArray[np.float32]:
        with self._changed:
            up = self._changed.wait_for(lambda: self._connection is not None or self._closing, _START_SECONDS)
            connection = self._connection
        if not up or connection is None:
            raise WorkerLostError("the worker process must be up to compute, got none in time; see the log")
        try:
            connection.send((method, batch))
            if not connection.poll(_PASS_SECONDS):
                self._process.kill()
                raise EOFError
            answer = connection.recv()
        except (EOFError, OSError) as error:
            self._drop(connection)
            raise WorkerLostError(
                "the worker process must finish a batch, got its end; the batch is retried"
            ) from error
        if isinstance(answer, PolyvecError):
            raise answer
        states: NDArray[np.float32] = answer
        return states

    def _open(self) -> _Facts:
        ours, theirs = _PROCESSES.Pipe()
        process = _PROCESSES.Process(target=_work, args=(theirs, self._settings), daemon=True)
        process.start()
        theirs.close()
        try:
            said = ours.recv() if ours.poll(_START_SECONDS) else None
        except EOFError:
            said = None
        if not isinstance(said, _Facts):
            ours.close()
            process.kill()
            raise said if isinstance(said, PolyvecError) else WorkerLostError("the worker process did not come up")
        with self._changed:
            self._process, self._connection = process, ours
            self._changed.notify_all()
        return said

    def _drop(self, connection: Connection[Any, Any]) -> None:
        with self._changed:
            if self._connection is connection:  # and not that of the process after it
                self._connection = None

    def _keep_alive(self) -> None:
        while True:
            self._process.join()
            with self._changed:
                self._connection = None
                if self._closing:
                    return
            _log.error("worker %s ended with code %s and is restarted", self.pid, self._process.exitcode)
            for pause in _pauses():
                time.sleep(pause)
                if self._closing:
                    return
                try:
                    self._open()
                    break
                except PolyvecError as error:
                    _log.error("a worker did not start: %s", type(error).__name__)


def _pauses() -> Iterator[float]:
    yield from _RETRY_SECONDS
    while True:
        yield _RETRY_SECONDS[-1]


def _work(connection: Connection[Any, Any], settings: WorkerSettings) -> None:
    """The child: open the model, then answer batches until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to parent and child; the parent decides
    if settings.cpus is not None:
        os.sched_setaffinity(0, settings.cpus)
    try:
        engine = Embedder(
            settings.model, engine=settings.engine, device=settings.device, threads=settings.threads
        ).engine
    except PolyvecError as error:
        connection.send(error)
        return
    connection.send(_Facts(engine.config, engine.name, engine.batch_tokens))
    while True:
        try:
            method, batch = connection.recv()
        except (EOFError, OSError):
            return
        answer: Any
        try:
            answer = getattr(engine, method)(batch)
        except PolyvecError as error:
            answer = error
        except Exception as error:  # whatever a runtime raises is the batch's fault until the scheduler finds whose
            answer = EngineError(type(error).__name__)
        connection.send(answer)


def open_workers(settings: Sequence[WorkerSettings]) -> list[WorkerEngine]:
    """Start one worker each, the first alone: what it measures of the machine, the others read."""
    first = WorkerEngine(settings[0])
    with ThreadPoolExecutor() as pool:
        return [first, *pool.map(WorkerEngine, settings[1:])]


def cpu_shares(workers: int | None) -> list[frozenset[int] | None]:
    """Return the cores of each worker: one worker for each CPU socket if ``workers`` is None, else that many.

    Memory of another socket is slow, so no worker spans two when there are at least as many workers as sockets.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [None] * (workers or 1)
    allowed = sorted(os.sched_getaffinity(0))
    sockets: dict[str, list[int]] = {}
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id")
        sockets.setdefault(path.read_text().strip() if path.exists() else "0", []).append(cpu)
    number = workers or len(sockets)
    if number == 1:
        return [None]
    ordered = [cpu for cpus in sockets.values() for cpu in cpus]
    return [frozenset(part.tolist()) for part in np.array_split(ordered, number) if len(part)]
