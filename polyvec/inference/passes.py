"""Token rows through an engine: which rows share a pass, which passes run side by side, and what does not fit.

Shape letters: B rows, D width, n tokens of a row.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import MachineWarning
from polyvec.inference.batching import Batch, plan_batches, plan_by_adapter
from polyvec.inference.engines import Engine

#: Passes for each lane from which on lanes are used: the last ones of a block leave some of the cores idle.
_PASSES_A_LANE = 2

#: Each row's mean (D,), or its token states (n, D).
Outputs: TypeAlias = list[NDArray[np.float32]]


class RowTooLargeError(MemoryError):
    """The row ``index`` does not fit into memory, though it runs alone."""

    def __init__(self, index: int) -> None:
        super().__init__(f"row {index}")
        self.index = index


@dataclass(frozen=True)
class TokenRow:
    """Token ids (n,) int32 and the adapter that reads them."""

    input_ids: NDArray[np.int32]
    adapter_id: int


class Passes:
    """Remembers how many tokens fit into memory once a pass was too large for it."""

    def __init__(self) -> None:
        self._fitting_tokens: int | None = None

    def run(
        self, engine: Engine, rows: Sequence[TokenRow], *, batch_tokens: int | None, states: bool
    ) -> Iterator[tuple[list[int], Outputs]]:
        """Yield indices into ``rows`` with their outputs, pass by pass; every row once.

        ``batch_tokens`` bounds the tokens of a pass; None is what the engine runs fastest. What shares a pass, and
        where it runs, depends on lengths and adapters alone, so the same rows give the same bits. Raises
        ``RowTooLargeError``.
        """
        aside, alone = self._plan(engine, rows, batch_tokens)
        for plan in alone:
            yield plan, self._halving(engine, rows, plan, states)
        if not aside:
            return
        failed = []
        lanes = ThreadPoolExecutor(engine.lanes, thread_name_prefix="lane")
        try:
            outputs = lanes.map(lambda plan: _try(engine.lane, [rows[i] for i in plan], states), aside)
            for plan, own in zip(aside, outputs, strict=True):
                if own is None:
                    failed.append(plan)
                else:
                    yield plan, own
        finally:
            lanes.shutdown(cancel_futures=True)  # whoever stops asking does not wait for the rest
        for plan in failed:  # with the memory for itself
            yield plan, self._halving(engine, rows, plan, states)

    def _plan(
        self, engine: Engine, rows: Sequence[TokenRow], batch_tokens: int | None
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the passes that run side by side, and those that have all cores to themselves."""
        lengths = [len(row.input_ids) for row in rows]

        def plans(fastest: int) -> list[list[int]]:
            bounds = (batch_tokens or fastest, self._fitting_tokens)
            most = min(bound for bound in bounds if bound is not None)
            if engine.own_pass_tokens is None:
                return plan_batches(lengths, batch_tokens=most, padded=engine.pads)
            return plan_by_adapter(
                lengths,
                [row.adapter_id for row in rows],
                batch_tokens=most,
                least_tokens=engine.own_pass_tokens,
                padded=engine.pads,
            )

        fewest = _PASSES_A_LANE * engine.lanes
        if engine.lanes > 1 and len(lengths) >= fewest:
            found = plans(engine.lane_tokens)
            # A long row is enough work for all cores, and takes memory that is not there for every lane.
            small = [_size(plan, lengths, engine) <= engine.batch_tokens for plan in found]
            if sum(small) >= fewest:
                aside = [plan for plan, is_small in zip(found, small, strict=True) if is_small]
                return aside, [plan for plan, is_small in zip(found, small, strict=True) if not is_small]
        return [], plans(engine.batch_tokens)

    def _halving(self, engine: Engine, rows: Sequence[TokenRow], plan: list[int], states: bool) -> Outputs:
        """Run a pass; one beyond the memory is halved, and so are those after it."""
        outputs = _try(engine, [rows[i] for i in plan], states)
        if outputs is not None:
            return outputs
        if len(plan) == 1:
            raise RowTooLargeError(plan[0])
        lengths = [len(rows[i].input_ids) for i in plan]
        if self._fitting_tokens is None:
            warnings.warn(
                f"a batch of {sum(lengths)} tokens did not fit into memory and was halved, as are those to "
                "come; pass a smaller batch_tokens to avoid the failed attempt",
                MachineWarning,
                stacklevel=2,
            )
        half = plan[: (len(plan) + 1) // 2]
        self._fitting_tokens = _size(half, [len(row.input_ids) for row in rows], engine)
        middle = len(plan) // 2
        halves = (plan[:middle], plan[middle:])
        return [output for half in halves for output in self._halving(engine, rows, half, states)]


def _size(plan: Sequence[int], lengths: Sequence[int], engine: Engine) -> int:
    """Return the tokens that an engine computes in a pass."""
    return len(plan) * lengths[plan[0]] if engine.pads else sum(lengths[i] for i in plan)


def run_pass(engine: Engine, rows: Sequence[TokenRow], *, states: bool) -> Outputs:
    """Return the outputs of one pass. Raises what the engine raises."""
    batch = Batch.of([row.input_ids for row in rows], [row.adapter_id for row in rows])
    if states:
        return np.split(engine.token_states(batch), batch.cu_seqlens[1:-1])
    return list(engine.pool(batch))


def _try(engine: Engine, rows: Sequence[TokenRow], states: bool) -> Outputs | None:
    """Return the outputs of one pass, or None where they did not fit into memory."""
    try:
        return run_pass(engine, rows, states=states)
    except MemoryError:
        return None
