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
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyvec.serving.caller import Caller, FlowName
from polyvec.serving.compute import Row

_LOOK_AHEAD = 16  # budgets of rows among which those of like length are found: padding stays small in mixed traffic
_LOOK_AHEAD_ROWS = 256  # and no more rows than the event loop sorts in a moment
# What a pass costs whatever is in it: 10 tokens in the engine, some more on the way there. Rows that a batch leaves out
# meet nearer ones later, so this is best for true costs from 10 to 24 (simulated, 64 clients of 21 tokens, 2026-11-26).
_PASS_TOKENS = 12
_BULK_CHARGE = 10


@dataclass(eq=False)
class Job:
    """A row to compute. ``waiters`` counts the callers of its ``result``; without one it is cancelled.

    ``address`` is that of equal rows, None without one; ``link`` is to the span of the request that brought it, None
    without one.
    """

    row: Row
    tokens: int
    address: bytes | None
    flow: Flow
    result: asyncio.Future[NDArray[np.float32]]
    since: float
    link: Any
    waiters: int = 1


#: A job behind its tag and a number: of equal tags the earlier one goes first. A tuple, because a heap compares often.
_Place: TypeAlias = tuple[int, int, Job]


@dataclass(eq=False)
class Flow:
    """What one caller waits for, and the tokens of the engine that it was charged."""

    charge: int
    charged: int = 0
    heap: list[_Place] = field(default_factory=list)


class FairQueue:
    """Jobs in the order above. ``tokens`` is what waits, cancelled rows that were not met yet included."""

    def __init__(self) -> None:
        self.tokens = 0
        self._flows: dict[FlowName, Flow] = {}
        self._numbers = itertools.count()

    def push(
        self,
        row: Row,
        address: bytes | None,
        before: int,
        caller: Caller,
        result: asyncio.Future[NDArray[np.float32]],
        since: float,
        link: Any = None,
    ) -> Job:
        """Add a row that comes after ``before`` tokens of its own request."""
        flow = self._flow(caller)
        job = Job(row, len(row), address, flow, result, since, link)
        heapq.heappush(flow.heap, (flow.charged // flow.charge + before, next(self._numbers), job))
        self.tokens += job.tokens
        return job

    def take(self, batch_tokens: int) -> list[Job]:
        """Return the job in line with those behind it that fit it best; the others go on waiting.

        In line are its own caller's, and of another caller those until which it is charged a batch; of bulk work those
        behind bulk work alone. What is not goes along where it takes nobody's place.
        """
        seen: list[_Place] = []
        line: list[int] = []
        later: list[int] = []
        first: Flow | None = None
        tokens = enough = 0
        most = _LOOK_AHEAD * batch_tokens
        while tokens < most and len(seen) < _LOOK_AHEAD_ROWS and (flow := self._next_flow()) is not None:
            # The other kind of pass has its turn when it is first in line.
            if seen and flow.heap[0][2].row.needs_states != seen[0][2].row.needs_states:
                break
            if first is None:
                first, enough = flow, flow.charged + batch_tokens
            is_in_line = flow is first or (flow.charge <= first.charge and flow.charged < enough)
            (line if is_in_line else later).append(len(seen))
            place = heapq.heappop(flow.heap)
            length = place[2].tokens
            flow.charged += length * flow.charge
            tokens += length
            seen.append(place)
        chosen = _chosen([job.tokens for _, _, job in seen], line, later, batch_tokens)
        for i, place in enumerate(seen):
            job = place[2]
            if i in chosen:
                self.tokens -= job.tokens
            else:
                job.flow.charged -= job.tokens * job.flow.charge
                heapq.heappush(job.flow.heap, place)
        self._flows = {key: flow for key, flow in self._flows.items() if flow.heap}
        return [seen[i][2] for i in sorted(chosen)]

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
            flow = min(waiting, key=lambda flow: (flow.charged, flow.charge))  # bulk work that has had as much yields
            if not flow.heap[0][2].result.done():
                return flow
            self.tokens -= heapq.heappop(flow.heap)[2].tokens
        return None


def _chosen(lengths: Sequence[int], line: Sequence[int], later: Sequence[int], batch_tokens: int) -> set[int]:
    """Return the best batch of those in ``line``, and where that is all of them the best ``later`` ones for the room.

    All are indices into ``lengths`` (tokens). None of the later ones is longer, which would cost the others padding.
    """
    chosen = [line[i] for i in best_batch([lengths[i] for i in line], batch_tokens=batch_tokens)]
    if not later or len(chosen) < len(line):
        return set(chosen)
    longest = max(lengths[i] for i in chosen)
    shorter = [i for i in later if lengths[i] <= longest]
    room = batch_tokens - (len(chosen) - 1) * longest
    beside = best_batch([longest, *(lengths[i] for i in shorter)], batch_tokens=room)
    return {*chosen, *(shorter[i - 1] for i in beside if i)}


def best_batch(lengths: Sequence[int], *, batch_tokens: int) -> list[int]:
    """Return the first row and those that it shares a pass with, as indices into ``lengths`` (tokens).

    Of all runs of rows next to each other in length that hold the first one and fit ``batch_tokens``, padding
    included, it is the one that reads the most tokens for what it costs: full, but not at the price of padding. Where
    all of them fit, none is left out to whom a pass of its own would cost more than that padding.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    first = order.index(0)
    sums = [0, *itertools.accumulate(lengths[i] for i in order)]
    best, best_start, best_end = 0.0, first, first + 1
    for end in range(first + 1, len(order) + 1):
        longest = lengths[order[end - 1]]
        rows = max(1, batch_tokens // longest)
        if end - first > rows:  # longer rows leave room for fewer
            break
        for start in range(max(0, end - rows), first + 1):
            worth = (sums[end] - sums[start]) / (_PASS_TOKENS + (end - start) * longest)
            if worth > best:
                best, best_start, best_end = worth, start, end
    longest = lengths[order[-1]]
    if len(order) * longest <= batch_tokens:
        left = [*order[:best_start], *order[best_end:]]
        shared = (best_end - best_start) * lengths[order[best_end - 1]]
        apart = _PASS_TOKENS + shared + len(left) * max((lengths[i] for i in left), default=0)
        if len(order) * longest <= apart:
            return order
    return order[best_start:best_end]


def offsets(rows: Sequence[Row]) -> list[int]:
    """Return the tokens of a request before each of its rows."""
    return list(itertools.accumulate((len(row) for row in rows), initial=0))[:-1]
