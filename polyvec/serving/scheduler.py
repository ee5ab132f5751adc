"""Rows of many requests to batches of a few engines: a bounded queue, deadlines, and no row computed twice.

Rows that are equal while one of them waits or runs are computed once, and with a cache also later on. ``queue`` says
who goes next, ``compute`` how a batch runs and fails.

Shape letter: D width.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, PolyvecError
from polyvec.inference.engines import Engine
from polyvec.serving.caller import NOBODY, Caller
from polyvec.serving.compute import Outcome, Row, Turns, compute
from polyvec.serving.metrics import Metrics
from polyvec.serving.queue import FairQueue, Job, offsets
from polyvec.serving.tracing import Tracing
from polyvec.serving.worker import WorkerEngine, WorkerLostError

_LANE_LEAST = 128  # tokens that make a pass on one core worth its call


class OverloadedError(PolyvecError):
    """The queue is full; ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(PolyvecError):
    """The server finishes what it has and takes nothing new."""


class DeadlineError(PolyvecError):
    """A request waited longer than it may."""


def deadline_error(seconds: float) -> DeadlineError:
    """Return the error of a request without an answer after ``seconds``."""
    return DeadlineError(f"a request must be answered within {seconds:g} s, got none; send less")


@dataclass(eq=False)
class _Host:
    """An engine and its threads. ``whole`` and ``beside`` count the batches that it has not finished: those on all its
    cores, and those in its lanes.
    """

    engine: Engine
    threads: ThreadPoolExecutor
    turns: Turns
    whole: int = 0
    beside: int = 0

    @classmethod
    def of(cls, engine: Engine) -> _Host:
        # A worker takes one batch more than it computes, so that none of its lanes waits for the way there.
        callers = engine.lanes + isinstance(engine, WorkerEngine)
        return cls(engine, ThreadPoolExecutor(callers, thread_name_prefix="engine"), Turns())

    def count(self, engine: Engine, number: int) -> None:
        """Add ``number`` to the unfinished batches of the engine, or of its lane."""
        if engine is self.engine:
            self.whole += number
        else:
            self.beside += number

    def next(self, waiting: int) -> tuple[Engine, int] | None:
        """Return what computes some of ``waiting`` tokens now, and of how many; None when nothing should.

        Few tokens go through all cores at once, many side by side. Behind what runs one more batch may wait at the
        engine's door, but only a full one: a smaller one grows while it waits in the queue.
        """
        engine = self.engine
        if engine.lanes > 1 and not self.whole:
            free = engine.lanes - self.beside
            fastest = engine.lane_tokens
            if free >= 0 and waiting >= (free * _LANE_LEAST or fastest):
                return engine.lane, min(fastest, max(_LANE_LEAST, waiting // max(free, 1)))
        at_most = 2 if engine.lanes == 1 else 1
        if self.beside or self.whole >= at_most:
            return None
        enough = engine.batch_tokens if self.whole else 1
        return (engine, engine.batch_tokens) if waiting >= enough else None


class Scheduler:
    """Batches rows for ``engines``, each on a thread of its own. ``start`` it inside a running event loop.

    ``max_tokens`` is the model's context, ``queue_tokens`` what may be read, wait or run at one time, ``cache_rows``
    the number of vectors that are kept.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        max_tokens: int,
        queue_tokens: int,
        metrics: Metrics,
        tracing: Tracing,
        cache_rows: int = 0,
    ) -> None:
        self.max_tokens, self.queue_tokens = max_tokens, queue_tokens
        self.draining = False
        self._metrics, self._tracing = metrics, tracing
        self._hosts = [_Host.of(engine) for engine in engines]
        self._queue = FairQueue()
        self._reading_tokens = 0
        self._pending_tokens = 0
        metrics.queue_tokens.set_function(lambda: self._reading_tokens + self._pending_tokens)
        self._tokens_per_second = 1000.0  # of one engine, for Retry-After; a guess until the first batch
        self._wake = asyncio.Event()
        self._in_flight: dict[bytes, Job] = {}
        self._cache: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
        self._cache_rows = cache_rows

    def start(self) -> None:
        self._batches: set[asyncio.Task[None]] = set()  # the event loop itself keeps no task alive
        self._dispatching = asyncio.create_task(self._dispatch())

    async def stop(self) -> None:
        """Refuse new work, finish what is in flight, then end. A pass that nobody waits for any more is left alone."""
        self.draining = True
        while self._reading_tokens or self._pending_tokens:
            await asyncio.sleep(0.01)
        self._dispatching.cancel()
        for host in self._hosts:
            host.threads.shutdown(wait=False, cancel_futures=True)

    def check_open(self) -> None:
        """Raise ``DrainingError`` while the server stops."""
        if self.draining:
            raise DrainingError("the server must be running to take requests, got one while it stops; retry elsewhere")

    @contextmanager
    def reading(self, tokens: int) -> Iterator[None]:
        """Let a request in that counts as ``tokens``, the fewest that it can have, until they are read.

        Raises ``DrainingError``, ``OverloadedError``, and ``InputError`` for more tokens than the queue can ever hold.
        """
        self.check_open()
        self._check_room(tokens, before=self._reading_tokens + self._pending_tokens)
        self._reading_tokens += tokens
        try:
            yield
        finally:
            self._reading_tokens -= tokens

    async def submit(
        self, rows: Sequence[Row], *, timeout: float, since: float | None = None, caller: Caller = NOBODY
    ) -> list[NDArray[np.float32]]:
        """Return one result per row, in order, within ``timeout`` seconds of ``since``, a monotonic time or now.

        A caller that is cancelled takes its waiting rows out of the queue. Who was let in before the server began to
        stop is served. Raises ``OverloadedError``, ``RateLimitError``, ``DeadlineError``, ``ComputeError``, and
        ``InputError`` for more tokens than the queue can ever hold.
        """
        tokens = sum(map(len, rows))
        if not caller.is_check:  # a full queue is no ill health
            self._check_room(tokens, before=self._pending_tokens)
        if caller.key is not None:  # after the checks: what is refused costs nothing
            caller.key.spend("tokens_per_minute", tokens)
        link = self._tracing.link()
        found = [
            self._cached(row, caller) or self._enqueue(row, before, caller, link)
            for row, before in zip(rows, offsets(rows), strict=True)
        ]
        jobs = [one for one in found if isinstance(one, Job)]
        self._wake.set()
        try:
            if jobs:
                passed = 0.0 if since is None else time.monotonic() - since
                await self._wait([job.result for job in jobs], timeout - passed, deadline_error(timeout))
            return [one.result.result() if isinstance(one, Job) else one[0] for one in found]
        finally:
            for job in jobs:  # the siblings of one that failed are dropped with it
                job.waiters -= 1
                if not job.waiters and job.result.cancel():
                    self._finished(job)

    def _check_room(self, tokens: int, *, before: int) -> None:
        """Raise unless ``tokens`` fit into the queue with those ``before`` them."""
        if tokens > self.queue_tokens:
            raise InputError(f"a request must hold at most {self.queue_tokens} tokens, got {tokens}; send it in parts")
        if before + tokens > self.queue_tokens:
            raise OverloadedError(
                f"the queue must hold at most {self.queue_tokens} tokens, got {before} waiting and {tokens} more; "
                "retry after the seconds in Retry-After",
                math.ceil(before / (self._tokens_per_second * len(self._hosts))),
            )

    async def _wait(
        self, results: Sequence[asyncio.Future[NDArray[np.float32]]], seconds: float, late: DeadlineError
    ) -> None:
        """Wait for all, or for the first that fails. Raises ``late`` after ``seconds``.

        ``asyncio.wait`` does that too, and for one result takes as long as the rest of this module (2026-11-26).
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[BaseException | None] = loop.create_future()
        missing = len(results)

        def end(error: BaseException | None) -> None:
            if not ended.done():
                ended.set_result(error)

        def count(result: asyncio.Future[NDArray[np.float32]]) -> None:
            nonlocal missing
            missing -= 1
            error = None if result.cancelled() else result.exception()  # read in any case, or asyncio logs it as lost
            if error is not None or not missing:
                end(error)

        for result in results:
            result.add_done_callback(count)
        timer = loop.call_later(seconds, end, late)
        try:
            error = await ended
        finally:
            timer.cancel()
        if error is not None:
            raise error

    def _cached(self, row: Row, caller: Caller) -> tuple[NDArray[np.float32]] | None:
        """Return the row's vector in a tuple, for an array alone is neither true nor false; of a check, None."""
        address = _address(row, caller) if self._cache_rows and not caller.is_check else None
        if address is None or address not in self._cache:
            return None
        self._cache.move_to_end(address)
        self._metrics.shared_rows.labels(how="cache").inc()
        return (self._cache[address],)

    def _enqueue(self, row: Row, before: int, caller: Caller, link: Any) -> Job:
        address = _address(row, caller)
        shared = None if address is None else self._in_flight.get(address)
        if shared is not None and not shared.result.done():
            shared.waiters += 1
            self._metrics.shared_rows.labels(how="in flight").inc()
            return shared
        result: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        job = self._queue.push(row, address, before, caller, result, time.monotonic(), link)
        self._pending_tokens += job.tokens
        if address is not None:
            self._in_flight[address] = job
        return job

    def _finished(self, job: Job) -> None:
        """Account for a job whose result is there, or that nobody waits for any more."""
        self._pending_tokens -= job.tokens
        address = job.address
        if address is None:
            return
        if self._in_flight.get(address) is job:
            del self._in_flight[address]
        result = job.result
        if self._cache_rows and not result.cancelled() and result.exception() is None:
            self._cache[address] = result.result()
            if len(self._cache) > self._cache_rows:
                self._cache.popitem(last=False)

    async def _dispatch(self) -> None:
        while True:
            self._wake.clear()
            while (found := self._next()) is not None:
                host, engine, tokens = found
                if batch := self._queue.take(tokens):
                    host.count(engine, 1)
                    run = asyncio.create_task(self._run(host, engine, batch))
                    self._batches.add(run)
                    run.add_done_callback(self._batches.discard)
            await self._wake.wait()

    def _next(self) -> tuple[_Host, Engine, int] | None:
        """Return the host with the least to do that takes more, with its ``next``."""
        if not self._queue.tokens:
            return None
        for host in sorted(self._hosts, key=lambda host: host.whole + host.beside):
            if (found := host.next(self._queue.tokens)) is not None:
                return host, *found
        return None

    async def _run(self, host: _Host, engine: Engine, batch: Sequence[Job]) -> None:
        started = time.monotonic()
        for job in batch:
            self._metrics.queue_seconds.observe(started - job.since)
        rows = [job.row for job in batch]
        links = [job.link for job in batch]
        lengths = [job.tokens for job in batch]
        with self._tracing.batch(links, rows=len(rows), tokens=sum(lengths), engine=engine.name):
            outcomes, seconds = await asyncio.get_running_loop().run_in_executor(
                host.threads, self._timed, host, engine, rows
            )
        self._account(lengths, seconds, side_by_side=min(max(host.beside, 1), host.engine.lanes))
        host.count(engine, -1)
        self._wake.set()
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.result.done():
                continue
            if isinstance(outcome, PolyvecError):
                job.result.set_exception(outcome)
            else:
                job.result.set_result(outcome)
            self._finished(job)

    def _timed(self, host: _Host, engine: Engine, rows: Sequence[Row]) -> tuple[list[Outcome], float]:
        started = time.monotonic()
        try:
            with host.turns.together():
                outcomes = compute(engine, rows, max_tokens=self.max_tokens)
        except WorkerLostError:  # killed for a reason of its own, by this batch, or by one beside it
            with host.turns.alone():
                outcomes = compute(engine, rows, max_tokens=self.max_tokens, alone=True)
        return outcomes, time.monotonic() - started

    def _account(self, lengths: Sequence[int], seconds: float, *, side_by_side: int) -> None:
        self._tokens_per_second += 0.1 * (side_by_side * sum(lengths) / max(seconds, 1e-6) - self._tokens_per_second)
        self._metrics.batch_rows.observe(len(lengths))
        self._metrics.batch_tokens.observe(sum(lengths))
        self._metrics.padding_tokens.inc(max(lengths) * len(lengths) - sum(lengths))
        self._metrics.engine_seconds.observe(seconds)


def _address(row: Row, caller: Caller) -> bytes | None:
    """Return what decides the row's vector, hashed, or None for a row whose result is no single vector.

    A row of a check has another: it would wait where the row of a request does.
    """
    if row.needs_states:
        return None
    key = b"%d" % row.adapter_id + (b" check" if caller.is_check else b"")
    return hashlib.blake2b(row.tokens.input_ids.tobytes(), digest_size=16, key=key).digest()
