"""What a job would take, from a sample of its own texts."""

from __future__ import annotations

import time
from typing import Any

from polyvec.batch.plan import read_run, runs_of
from polyvec.batch.run import Prepared, vector_bytes
from polyvec.inference.embedder import Embedder

_SAMPLED_PARTS = 4
_SAMPLED_TEXTS = 64  # of each part


def estimate(ready: Prepared, embedder: Embedder, workers: int) -> dict[str, Any]:
    """Return rows, parts, seconds on ``workers`` like this process, and bytes of the vectors.

    Rows are counted; the speed is that of texts taken evenly from parts that are not done.
    """
    job, pending = ready.job, ready.pending
    step = max(1, len(pending) // _SAMPLED_PARTS)
    texts: list[str] = []
    for run in runs_of(ready.plan, pending[::step], is_lending=False):
        for work in read_run(ready.fs, run, job):
            good = [row.text for row in work.piece.rows if row.fault is None]
            texts += good[:: max(1, len(good) // _SAMPLED_TEXTS)]
    started = time.perf_counter()
    tokens = sum(
        e.num_tokens
        for e in embedder.encode_stream(
            texts, task=job.task, dimensions=job.dimensions, dtype=job.dtype, late_chunking=job.late_chunking
        )
    )
    seconds = time.perf_counter() - started
    rows = sum(part.rows for part in pending)
    once = ready.plan.distinct / max(1, ready.plan.rows - ready.plan.faults)  # the share that is embedded
    expected = rows * once * seconds / len(texts) / workers if texts else 0.0
    return {
        "rows": ready.plan.rows,
        "rejected": ready.plan.faults,
        "distinct": ready.plan.distinct,
        "parts": len(ready.plan.parts),
        "parts_to_do": len(pending),
        "workers": workers,
        "sampled_texts": len(texts),
        "tokens": round(tokens / max(1, len(texts)) * rows * once),
        "seconds": round(expected, 1),
        "vector_bytes": vector_bytes(job, ready.plan.rows - ready.plan.faults),
    }
