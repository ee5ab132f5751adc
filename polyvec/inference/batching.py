"""Token-budget batches: rows of like length together, so that neither padding nor attention outgrows its budget.

Shape letters: B texts in a batch, N packed tokens, H heads, T longest text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Bytes that one batch's attention scores may take, float32, all heads. Longer texts than fit run alone.
ATTENTION_BYTES = 32 * 2**20


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


def plan_batches(lengths: Sequence[int], *, batch_tokens: int, num_heads: int) -> list[list[int]]:
    """Return batches as lists of indices into ``lengths`` (tokens), longest texts first.

    A batch holds at most ``batch_tokens`` tokens, padding to its longest row included, and at most ``ATTENTION_BYTES``
    of B x H x T x T attention scores; a text beyond either runs alone. Longest first, so that a batch too large for the
    machine fails at once and not at the end.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # sorted() is stable: equal lengths keep their order
    batches: list[list[int]] = []
    longest = 0
    for i in order:
        if batches:
            rows = len(batches[-1]) + 1
            if rows * longest <= batch_tokens and 4 * rows * num_heads * longest**2 <= ATTENTION_BYTES:
                batches[-1].append(i)
                continue
        batches.append([i])
        longest = lengths[i]
    return batches
