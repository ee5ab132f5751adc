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
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import PolyvecError
from polyvec.inference.batching import Batch
from polyvec.inference.engines import Engine
from polyvec.inference.engines.opening import open_engine
from polyvec.inference.threads import physical_cores
from polyvec.model.config import ModelConfig
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import read_config

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


@dataclass(eq=False)
class _Facts:
    """The attributes of an ``Engine``, which the child tells and its stand-ins here have too."""

    config: ModelConfig
    name: str
    batch_tokens: int
    lanes: int
    lane_tokens: int
    own_pass_tokens: int | None
    pads: bool
    leaves_host: bool

    @classmethod
    def of(cls, engine: Engine) -> _Facts:
        return cls(**{field.name: getattr(engine, field.name) for field in fields(cls)})


class _Child:
    """One process, with a pipe for each caller that it may have at one time. ``open`` waits for its model."""

    is_up = False
    facts: _Facts

    def __init__(self, settings: WorkerSettings) -> None:
        ours, theirs = zip(*(_PROCESSES.Pipe() for _ in range(_most_callers(settings))), strict=True)
        self._connections: tuple[Connection[Any, Any], ...] = ours
        self._idle: SimpleQueue[Connection[Any, Any]] = SimpleQueue()
        self.process = _PROCESSES.Process(target=_work, args=(theirs, settings), daemon=True)
        self.process.start()
        for connection in theirs:
            connection.close()

    def open(self) -> None:
        """Wait until the process is up, or end it. Raises what opening the model raises, or ``WorkerLostError``."""
        said: Any = None
        first = self._connections[0]
        try:
            if first.poll(_START_SECONDS):
                said = first.recv()
        except (EOFError, OSError):  # it died, or was ended meanwhile
            pass
        finally:
            if not isinstance(said, _Facts):  # for an interrupt too: without its parent's word it never ends
                self.process.kill()
                self._close()
        if not isinstance(said, _Facts):
            raise said if isinstance(said, PolyvecError) else WorkerLostError("the worker process did not come up")
        self.facts, self.is_up = said, True
        for connection in self._connections:
            self._idle.put(connection)

    def call(self, method: str, on_lane: bool, batch: Batch) -> NDArray[np.float32]:
        """Return what the child answers, on the caller's own thread: handing over to another costs more than a pass of
        few tokens (2026-11-26).
        """
        connection = self._idle.get()
        try:
            connection.send_bytes(pickle.dumps((method, on_lane, batch), pickle.HIGHEST_PROTOCOL))
            if not connection.poll(_PASS_SECONDS):
                raise TimeoutError
            answer = pickle.loads(connection.recv_bytes())
        except Exception:  # it is dead, or hangs, or half an answer is in the pipe, for which there is no memory here
            self.is_up = False  # before the batch is tried again
            self.process.kill()
            raise _lost() from None
        finally:
            self._idle.put(connection)
        if isinstance(answer, PolyvecError):
            raise answer
        result: NDArray[np.float32] = answer
        return result

    def end(self) -> None:
        """End the process: an idle one goes by itself, any other is killed, after a second if it is computing."""
        if self.is_up:
            self.is_up = False
            self._close()
            self.process.join(1)
        self.process.kill()
        self._close()
        self.process.join(1)

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()


def _most_callers(settings: WorkerSettings) -> int:
    """Return one for each lane that the engine may have, and one whose batch waits at its door."""
    return (settings.threads or physical_cores()) + 1


def _lost() -> WorkerLostError:
    return WorkerLostError("the worker process must finish a batch, got its end; the batch is retried")


class _WorkerLane(_Facts):
    """The lane of the engine in the child."""

    def __init__(self, worker: WorkerEngine, facts: _Facts) -> None:
        super().__init__(**vars(replace(facts, batch_tokens=facts.lane_tokens, lanes=1)))
        self.worker = worker

    @property
    def lane(self) -> _WorkerLane:
        return self

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        return self.worker.call("pool", True, batch)

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        return self.worker.call("token_states", True, batch)


class WorkerEngine(_Facts):
    """An ``Engine`` whose passes run in a child process, to be called by one thread more at a time than it has lanes.

    ``close`` ends the child. Raises what opening the model raises.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._closing = False
        self._last = _Child(settings)
        self._last.open()
        self._child: _Child | None = self._last
        super().__init__(**vars(self._last.facts))
        self._lane = _WorkerLane(self, self._last.facts)
        self._keeper = threading.Thread(target=self._keep_alive, name="worker-keeper", daemon=True)
        self._keeper.start()

    @property
    def alive(self) -> bool:
        """A process is up and has its model."""
        return self._child is not None and self._child.is_up

    @property
    def pid(self) -> int | None:
        return self._last.process.pid

    @property
    def lane(self) -> _WorkerLane:
        return self._lane

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors. Raises ``WorkerLostError``, or ``EngineError`` when the engine raised."""
        return self.call("pool", False, batch)

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens. Raises as ``pool``."""
        return self.call("token_states", False, batch)

    def call(self, method: str, on_lane: bool, batch: Batch) -> NDArray[np.float32]:
        """Return what a method of the child's engine, or of its lane, gives. Raises as ``pool``."""
        with self._changed:
            self._changed.wait_for(lambda: self.alive or self._closing, _START_SECONDS)
            child = self._child
        if child is None or not child.is_up:
            raise WorkerLostError("the worker process must be up to compute, got none in time; see the log")
        return child.call(method, on_lane, batch)

    def close(self) -> None:
        """End the child and do not start another."""
        with self._changed:
            self._closing = True
            self._child = None
            self._changed.notify_all()
            last = self._last
        last.end()
        self._keeper.join(1)

    def _keep_alive(self) -> None:
        while True:
            self._last.process.join()
            with self._changed:
                self._child = None
                if self._closing:
                    return
            _log.error("worker %s ended with code %s and is restarted", self.pid, self._last.process.exitcode)
            for pause in _pauses():
                with self._changed:
                    if self._changed.wait_for(lambda: self._closing, pause):
                        return
                try:
                    self._start()
                except Exception as error:  # of the system too, which may be short of memory, processes or files
                    _log.error("a worker did not start: %s", type(error).__name__)
                else:
                    break

    def _start(self) -> None:
        """Start a process and wait until it is up, or the server stops."""
        child = _Child(self._settings)
        with self._changed:
            self._last = child  # which close ends from now on
            if self._closing:
                child.end()
                return
        child.open()
        with self._changed:
            if not self._closing:
                self._child = child
                self._changed.notify_all()


def _pauses() -> Iterator[float]:
    yield from _RETRY_SECONDS
    while True:
        yield _RETRY_SECONDS[-1]


def _work(connections: Sequence[Connection[Any, Any]], settings: WorkerSettings) -> None:
    """The child: open the model, without its tokenizer, then answer batches until the parent closes the pipes or is
    gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # told to parent and child alike; the parent decides
        signal.signal(number, signal.SIG_IGN)
    if settings.cpus is not None:
        os.sched_setaffinity(0, settings.cpus)
    try:
        folder = resolve_model_folder(settings.model)
        engine = open_engine(
            folder, read_config(folder), settings.engine, device=settings.device, threads=settings.threads
        )
    except PolyvecError as error:
        connections[0].send(error)
        return
    lane = engine.lane  # opened before anyone waits for it
    connections[0].send(_Facts.of(engine))
    turns = threading.Semaphore(engine.lanes)  # the batch of one caller more is here already when a lane is free

    def answer(connection: Connection[Any, Any]) -> None:
        while True:
            try:
                method, on_lane, batch = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):  # the parent closed the pipe, or is gone
                return
            try:
                with turns:
                    result = getattr(lane if on_lane else engine, method)(batch)
                message = pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
            except PolyvecError as error:
                message = pickle.dumps(error)
            except Exception as error:  # whatever a runtime raises is the batch's fault until the scheduler finds whose
                message = pickle.dumps(EngineError(type(error).__name__))
            with suppress(OSError):  # a parent that is gone waits for nothing
                connection.send_bytes(message)

    callers = [threading.Thread(target=answer, args=(connection,)) for connection in connections]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


@contextmanager
def open_workers(settings: Sequence[WorkerSettings]) -> Iterator[list[WorkerEngine]]:
    """One worker each, the first started alone: what it measures of the machine, the others read.

    However it ends, they are closed: a child that ignores signals would keep the process that waits for it.
    """
    with ExitStack() as opened:

        def start(one: WorkerSettings) -> WorkerEngine:
            return opened.enter_context(closing(WorkerEngine(one)))

        workers = [start(settings[0])]
        with ThreadPoolExecutor() as pool:
            workers += pool.map(start, settings[1:])
        yield workers


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
