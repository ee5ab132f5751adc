"""What waits, and what goes next: fair between callers, near in length within a batch.

Between callers, the one who has had the least of the engine goes first (weighted fair queueing): a caller alone gets
all of it, two get half each whatever the number of their requests. Bulk work is a caller of its own that is charged
tenfold: it fills what others leave, and a tenth beside them, so that it never starves.

Within a caller, a row's tag is the tokens that the caller had been given when it came plus those of its own request
before it. The lowest tag goes first, so a short request passes the tail of a long one, and none starves.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.inference.batching import plan_batches
from polyvec.serving.caller import Caller
from polyvec.serving.compute import Row

_LOOK_AHEAD = 8  # budgets of rows among which those of like length are found: padding stays small in mixed traffic
_BULK_CHARGE = 10


@dataclass(order=True)
class Job:
    """A row to compute. ``waiters`` counts the callers of its ``result``; without one it is cancelled."""

    tag: int
    number: int  # of equal tags the earlier one goes first
    row: Row = field(compare=False)
    flow: Flow = field(compare=False)
    result: asyncio.Future[NDArray[np.float32]] = field(compare=False)
    since: float = field(compare=False)
    waiters: int = field(default=1, compare=False)
    link: Any = field(default=None, compare=False)  # to the span of the request that brought it


@dataclass(eq=False)
class Flow:
    """What one caller waits for, and the tokens of the engine that it was charged."""

    charge: int
    charged: int = 0
    heap: list[Job] = field(default_factory=list)


class FairQueue:
    """Jobs in the order above. ``tokens`` is what waits, cancelled rows that were not met yet included."""

    def __init__(self) -> None:
        self.tokens = 0
        self._flows: dict[tuple[str, bool], Flow] = {}
        self._numbers = itertools.count()

    def push(
        self, row: Row, before: int, caller: Caller, result: asyncio.Future[NDArray[np.float32]], since: float
    ) -> Job:
        """Add a row that comes after ``before`` tokens of its own request."""
        flow = self._flow(caller)
        job = Job(flow.charged // flow.charge + before, next(self._numbers), row, flow, result, since)
        heapq.heappush(flow.heap, job)
        self.tokens += len(row)
        return job

    def take(self, batch_tokens: int) -> list[Job]:
        """Return the job in line with those behind it that fit it best; the others go on waiting."""
        seen: list[Job] = []
        tokens = 0
        while tokens < _LOOK_AHEAD * batch_tokens and (flow := self._next_flow()) is not None:
            # The other kind of pass has its turn when it is first in line.
            if seen and flow.heap[0].row.needs_states != seen[0].row.needs_states:
                break
            job = heapq.heappop(flow.heap)
            flow.charged += len(job.row) * flow.charge
            tokens += len(job.row)
            seen.append(job)
        plans = plan_batches([len(job.row) for job in seen], batch_tokens=batch_tokens)
        chosen = set(next((plan for plan in plans if 0 in plan), []))
        for i, job in enumerate(seen):
            if i in chosen:
                self.tokens -= len(job.row)
            else:
                job.flow.charged -= len(job.row) * job.flow.charge
                heapq.heappush(job.flow.heap, job)
        self._flows = {key: flow for key, flow in self._flows.items() if flow.heap}
        return [seen[i] for i in sorted(chosen)]

    def _flow(self, caller: Caller) -> Flow:
        key = caller.flow
        if key not in self._flows:
            # Not from zero: who was away has no claim on the past.
            least = min((flow.charged for flow in self._flows.values()), default=0)
            self._flows[key] = Flow(_BULK_CHARGE if caller.bulk else 1, least)
        return self._flows[key]

    def _next_flow(self) -> Flow | None:
        """Return the flow with a row to compute that has had the least, after dropping the rows of who left."""
        while waiting := [flow for flow in self._flows.values() if flow.heap]:
            flow = min(waiting, key=lambda flow: flow.charged)
            if not flow.heap[0].result.done():
                return flow
            self.tokens -= len(heapq.heappop(flow.heap).row)
        return None


def offsets(rows: Sequence[Row]) -> list[int]:
    """Return the tokens of a request before each of its rows."""
    return list(itertools.accumulate((len(row) for row in rows), initial=0))[:-1]
