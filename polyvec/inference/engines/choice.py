"""Which graph of a folder is faster on this machine: measured once, then remembered.

Whether 8-bit products pay depends on the instruction set, the threads and ONNX Runtime's kernels; a short run of both
graphs says more than any table of processors.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import GRAPH_FILES, OnnxEngine
from polyvec.inference.threads import usable_cores
from polyvec.machine import remembered
from polyvec.model.config import ModelConfig
from polyvec.tasks import NO_ADAPTER

_GAIN = 1.1  # int8 must be this much faster: float32 is exact
_REPEATS = 5
_SECONDS = 1.0
_TOKENS = 1024  # of the run


def faster_precision(folder: Path, config: ModelConfig, *, threads: int | None = None) -> str:
    """Return ``fp32`` or ``int8``, whichever graph in ``folder`` is faster here; the only one where one stands alone.

    The first call on a machine runs both, polyvec-mini for a fraction of a second, and the answer is ``remembered``.
    """
    graphs = {precision: folder / name for precision, name in GRAPH_FILES.items()}
    present = [precision for precision, path in graphs.items() if path.exists()]
    if len(present) == 1:
        return present[0]
    try:
        return remembered("engines", _facts(graphs, threads), graphs, lambda: _measure(graphs, config, threads))
    except MemoryError:
        return "int8"  # the smaller, and not remembered: another day both may fit


def _measure(graphs: dict[str, Path], config: ModelConfig, threads: int | None) -> str:
    rng = np.random.default_rng(0)
    length = min(64, config.max_tokens)
    rows = [rng.integers(0, config.vocab_size, length, dtype=np.int32) for _ in range(_TOKENS // length)]
    batch = Batch.of(rows, [NO_ADAPTER] * len(rows))
    seconds = dict.fromkeys(graphs, math.inf)
    for precision in [*graphs, *graphs]:  # twice, for what else starts to run meanwhile slows one of them alone
        seconds[precision] = min(seconds[precision], _seconds(graphs[precision], config, batch, threads))
    return "int8" if seconds["int8"] * _GAIN < seconds["fp32"] else "fp32"


def _seconds(path: Path, config: ModelConfig, batch: Batch, threads: int | None) -> float:
    """Return the least of a few runs; a large model is given fewer, because its first one already says enough."""
    engine = OnnxEngine(path, config, threads=threads)  # gone with its thread pool before the next one is opened
    engine.pool(batch)  # the first run allocates
    runs: list[float] = []
    while len(runs) < _REPEATS and sum(runs) < _SECONDS:
        runs.append(_timed(engine, batch))
    return min(runs)


def _timed(engine: OnnxEngine, batch: Batch) -> float:
    started = time.perf_counter()
    engine.pool(batch)
    return time.perf_counter() - started


def _facts(graphs: dict[str, Path], threads: int | None) -> list[Any]:
    """Return what the answer depends on beside the processor: cores, runtime and the graphs themselves."""
    files = {
        precision: [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for precision, path in graphs.items()
    }
    return [usable_cores(), threads, ort.__version__, files]
