"""Rows of many requests to batches of one engine: token budgets, a bounded queue, and failures that stay alone.

Order. A row's tag is the tokens served so far plus those of its own request before it. The lowest tag goes next, so a
short request passes the tail of a long one, and none starves, because the served tokens only grow.

Shape letters: D width, C chunks in a text.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, PolyvecError
from polyvec.inference.batching import Batch, plan_batches
from polyvec.inference.engines import Engine
from polyvec.inference.late_chunking import chunk_means, window_states
from polyvec.serving.metrics import Metrics
from polyvec.text.chunking import Span
from polyvec.text.tokenizer import Encoding

_log = logging.getLogger(__name__)
_LOOK_AHEAD = 8  # budgets of rows among which those of like length are found: padding stays small in mixed traffic


class OverloadedError(PolyvecError):
    """The queue is full; ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DrainingError(PolyvecError):
    """The server finishes what it has and takes nothing new."""


class DeadlineError(PolyvecError):
    """A request waited longer than it may."""


class ComputeError(PolyvecError):
    """The model failed on this input and on no other."""


@dataclass(frozen=True)
class Row:
    """One text ready for the engine. The result is (D,), or with ``spans`` (C, D) chunk means; not normalised."""

    encoding: Encoding
    adapter_id: int
    spans: tuple[Span, ...] | None = None
    every_token: bool = False  # the result is then (n, D) token states

    @property
    def needs_states(self) -> bool:
        return self.every_token or self.spans is not None

    def __len__(self) -> int:
        return len(self.encoding)


@dataclass(order=True)
class _Waiting:
    tag: int
    number: int  # of equal tags the earlier one goes first
    row: Row = field(compare=False)
    result: asyncio.Future[NDArray[np.float32]] = field(compare=False)
    since: float = field(compare=False)


class Scheduler:
    """Batches rows for ``engine`` on one thread of its own. Start it inside a running event loop with ``start``.

    ``max_tokens`` is the model's context, ``queue_tokens`` what may wait or run at one time.
    """

    def __init__(self, engine: Engine, *, max_tokens: int, queue_tokens: int, metrics: Metrics) -> None:
        self.engine, self.max_tokens, self.queue_tokens = engine, max_tokens, queue_tokens
        self.draining = False
        self._metrics = metrics
        self._heap: list[_Waiting] = []
        self._numbers = itertools.count()
        self._pending_tokens = 0
        self._served_tokens = 0
        self._tokens_per_second = 1000.0  # a guess until the first batch; tells clients when to come back
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._wake = asyncio.Event()

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Refuse new work, finish what is in flight, then end."""
        self.draining = True
        while self._pending_tokens:
            await asyncio.sleep(0.01)
        self._loop.cancel()
        self._thread.shutdown()

    async def submit(self, rows: Sequence[Row], *, timeout: float) -> list[NDArray[np.float32]]:
        """Return one result per row, in order. ``timeout`` is in seconds.

        A caller that is cancelled takes its waiting rows out of the queue. Raises ``DrainingError``,
        ``OverloadedError``, ``DeadlineError``, ``ComputeError``, and ``InputError`` for more tokens than the queue
        can ever hold.
        """
        tokens = sum(map(len, rows))
        if self.draining:
            raise DrainingError("the server must be running to take requests, got one while it stops; retry elsewhere")
        if tokens > self.queue_tokens:
            raise InputError(f"a request must hold at most {self.queue_tokens} tokens, got {tokens}; send it in parts")
        if self._pending_tokens + tokens > self.queue_tokens:
            raise OverloadedError(
                f"the queue must hold at most {self.queue_tokens} tokens, got {self._pending_tokens} waiting and "
                f"{tokens} more; retry after the seconds in Retry-After",
                math.ceil(self._pending_tokens / self._tokens_per_second),
            )
        futures = [self._enqueue(row, tag) for row, tag in zip(rows, self._tags(rows), strict=True)]
        self._wake.set()
        try:
            done, waiting = await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            for error in [future.exception() for future in done]:  # all are read, or asyncio logs the others as lost
                if error is not None:
                    raise error
            if waiting:
                raise DeadlineError(f"a request must be answered within {timeout:g} s, got none; send less")
            return [future.result() for future in futures]
        finally:
            for future in futures:  # the siblings of one that failed are dropped with it
                future.cancel()

    def _tags(self, rows: Sequence[Row]) -> list[int]:
        lengths = [len(row) for row in rows]
        return [self._served_tokens + before for before in itertools.accumulate(lengths[:-1], initial=0)][: len(rows)]

    def _enqueue(self, row: Row, tag: int) -> asyncio.Future[NDArray[np.float32]]:
        result: asyncio.Future[NDArray[np.float32]] = asyncio.get_running_loop().create_future()
        self._count(len(row))
        result.add_done_callback(lambda _: self._count(-len(row)))
        heapq.heappush(self._heap, _Waiting(tag, next(self._numbers), row, result, time.monotonic()))
        return result

    def _count(self, tokens: int) -> None:
        self._pending_tokens += tokens
        self._metrics.queue_tokens.set(self._pending_tokens)

    async def _run(self) -> None:
        while True:
            batch = self._next_batch()
            if not batch:
                self._wake.clear()
                await self._wake.wait()
                continue
            started = time.monotonic()
            for waiting in batch:
                self._metrics.queue_seconds.observe(started - waiting.since)
            rows = [waiting.row for waiting in batch]
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, rows)
            self._account(rows, time.monotonic() - started)
            for waiting, outcome in zip(batch, outcomes, strict=True):
                if waiting.result.done():
                    continue
                if isinstance(outcome, PolyvecError):
                    waiting.result.set_exception(outcome)
                else:
                    waiting.result.set_result(outcome)

    def _next_batch(self) -> list[_Waiting]:
        """Return the first row in line with those behind it that fit it best; the others go on waiting."""
        seen: list[_Waiting] = []
        tokens = 0
        while self._heap and tokens < _LOOK_AHEAD * self.engine.batch_tokens:
            waiting = heapq.heappop(self._heap)
            if not waiting.result.done() and (not seen or waiting.row.needs_states == seen[0].row.needs_states):
                seen.append(waiting)
                tokens += len(waiting.row)
            elif not waiting.result.done():
                heapq.heappush(self._heap, waiting)  # the other kind of pass has its turn when it is first
                break
        plans = plan_batches([len(waiting.row) for waiting in seen], batch_tokens=self.engine.batch_tokens)
        chosen = next((plan for plan in plans if 0 in plan), [])
        for i in set(range(len(seen))) - set(chosen):
            heapq.heappush(self._heap, seen[i])
        return [seen[i] for i in chosen]

    def _account(self, rows: Sequence[Row], seconds: float) -> None:
        lengths = [len(row) for row in rows]
        self._served_tokens += sum(lengths)
        self._tokens_per_second += 0.1 * (sum(lengths) / max(seconds, 1e-6) - self._tokens_per_second)
        self._metrics.batch_rows.observe(len(rows))
        self._metrics.batch_tokens.observe(sum(lengths))
        self._metrics.padding_tokens.inc(max(lengths) * len(lengths) - sum(lengths))
        self._metrics.engine_seconds.observe(seconds)

    def _compute(self, rows: Sequence[Row]) -> list[NDArray[np.float32] | PolyvecError]:
        """Return a result or an error for each row. A batch that fails is halved until the culprit is alone."""
        try:
            outcomes = self._forward(rows)
        except InputError as error:
            if len(rows) == 1:
                return [error]
        except Exception as error:  # whatever a runtime raises, out-of-memory included, must not end this thread
            if len(rows) == 1:
                _log.error("the model failed on a row of %d tokens: %s", len(rows[0]), type(error).__name__)
                return [ComputeError("the model must finish every input, got a failure on this one; send it alone")]
        else:
            finite = [bool(np.isfinite(outcome).all()) for outcome in outcomes]
            return [
                outcome if good else ComputeError("the model must give finite numbers, got others; report this input")
                for outcome, good in zip(outcomes, finite, strict=True)
            ]
        half = len(rows) // 2
        return self._compute(rows[:half]) + self._compute(rows[half:])

    def _forward(self, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
        if len(rows) == 1 and len(rows[0]) > self.max_tokens:  # only chunks are read in windows
            row = rows[0]
            parts = window_states(self.engine, row.encoding, row.adapter_id, max_tokens=self.max_tokens)
            return [self._reduce(row, list(parts))]
        batch = Batch.of([row.encoding.input_ids for row in rows], [row.adapter_id for row in rows])
        if not rows[0].needs_states:
            return list(self.engine.pool(batch))
        states = np.split(self.engine.token_states(batch), batch.cu_seqlens[1:-1])
        return [self._reduce(row, [(own, 0)]) for row, own in zip(rows, states, strict=True)]

    def _reduce(self, row: Row, parts: list[tuple[NDArray[np.float32], int]]) -> NDArray[np.float32]:
        if row.spans is None:
            return np.concatenate([states for states, _ in parts])
        return chunk_means(parts, row.encoding, row.spans, width=self.engine.config.hidden_size)
