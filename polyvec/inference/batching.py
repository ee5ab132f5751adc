"""Token-budget batches: rows of like length together, so that padding stays small and memory bounded.

Shape letters: B texts in a batch, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Packed rows: ``input_ids`` (N,) int64, ``cu_seqlens`` (B+1,) int32 text offsets, ``task_ids`` (B,) int64.

    A task id of -1 takes the base weights. Both engines read this and nothing else.
    """

    input_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    task_ids: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.int32]], task_ids: Sequence[int]) -> Batch:
        """Pack token rows, one task id each."""
        cu_seqlens = np.concatenate(([0], np.cumsum([len(row) for row in rows]))).astype(np.int32)
        return cls(np.concatenate(rows).astype(np.int64), cu_seqlens, np.asarray(task_ids, dtype=np.int64))

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self.cu_seqlens)

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max())

    @cached_property
    def adapters(self) -> list[int]:
        """Every task id once."""
        found: list[int] = np.unique(self.task_ids).tolist()
        return found


def split_by_adapter(batch: Batch, *, least_tokens: int) -> list[tuple[NDArray[np.intp], Batch]]:
    """Return parts of a batch with the places of their texts in it: one for each adapter that has ``least_tokens``
    or more, the base included, and one for all others."""
    tokens = np.zeros(batch.task_ids.max() + 2, dtype=np.int64)
    np.add.at(tokens, batch.task_ids + 1, batch.lengths)
    group = np.where(tokens >= least_tokens, np.arange(len(tokens)), len(tokens))[batch.task_ids + 1]
    rows = np.split(batch.input_ids, batch.cu_seqlens[1:-1])
    parts = []
    for number in np.unique(group):
        places = np.flatnonzero(group == number)
        offsets = np.concatenate(([0], np.cumsum(batch.lengths[places]))).astype(np.int32)
        part = Batch(np.concatenate([rows[place] for place in places]), offsets, batch.task_ids[places])
        parts.append((places, part))
    return parts


def plan_batches(lengths: Sequence[int], *, batch_tokens: int, padded: bool = True) -> list[list[int]]:
    """Return batches as lists of indices into ``lengths`` (tokens), longest texts first.

    A batch holds at most ``batch_tokens`` tokens, padding to its longest row included where it is ``padded``; a text
    beyond that runs alone. Longest first, so that a batch too large for the machine fails at once and not at the end.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # sorted() is stable: equal lengths keep their order
    batches: list[list[int]] = []
    longest = tokens = 0
    for i in order:
        size = (len(batches[-1]) + 1) * longest if batches and padded else tokens + lengths[i]
        if batches and size <= batch_tokens:
            batches[-1].append(i)
            tokens += lengths[i]
        else:
            batches.append([i])
            longest = tokens = lengths[i]
    return batches


def plan_by_adapter(
    lengths: Sequence[int], adapters: Sequence[int], *, batch_tokens: int, least_tokens: int, padded: bool = True
) -> list[list[int]]:
    """Return batches as ``plan_batches`` does, each of one adapter; what is left of each of them, batches of fewer than
    ``least_tokens``, shares batches of any. ``adapters`` are ids by text, the base's included."""

    def plan(members: Sequence[int]) -> list[list[int]]:
        batches = plan_batches([lengths[i] for i in members], batch_tokens=batch_tokens, padded=padded)
        return [[members[i] for i in batch] for batch in batches]

    own: list[list[int]] = []
    rest: list[int] = []
    for adapter in sorted(set(adapters)):
        for batch in plan([i for i, other in enumerate(adapters) if other == adapter]):
            if sum(lengths[i] for i in batch) >= least_tokens:
                own.append(batch)
            else:
                rest += batch
    return sorted(own + plan(sorted(rest)), key=lambda batch: -lengths[batch[0]])
