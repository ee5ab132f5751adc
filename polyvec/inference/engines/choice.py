"""Which graph of a folder is faster on this machine: measured once, then remembered.

Whether 8-bit products pay depends on the instruction set, the threads and ONNX Runtime's kernels; a short run of both
graphs says more than any table of processors.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime as ort

from polyvec.atomic import write_json
from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import GRAPH_FILES, OnnxEngine
from polyvec.inference.threads import usable_cores
from polyvec.model.config import ModelConfig
from polyvec.tasks import NO_ADAPTER

_GAIN = 1.1  # int8 must be this much faster: float32 is exact
_REPEATS = 5
_SECONDS = 1.0
_TOKENS = 1024  # of the run


def faster_precision(folder: Path, config: ModelConfig, *, threads: int | None = None) -> str:
    """Return ``fp32`` or ``int8``, whichever graph in ``folder`` is faster here; the only one where one stands alone.

    The first call on a machine runs both, polyvec-mini for a fraction of a second, and remembers the answer in the
    user's cache folder (``$XDG_CACHE_HOME/polyvec`` or ``~/.cache/polyvec``). Where that cannot be written, every call
    measures.
    """
    graphs = {precision: folder / name for precision, name in GRAPH_FILES.items()}
    present = [precision for precision, path in graphs.items() if path.exists()]
    if len(present) == 1:
        return present[0]
    key = _key(graphs, threads)
    path = _cache_folder() / "engines.json"
    known = _read(path)
    if known.get(key) not in graphs:
        known[key] = _measure(graphs, config, threads)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, path)
    return known[key]


def _measure(graphs: dict[str, Path], config: ModelConfig, threads: int | None) -> str:
    rng = np.random.default_rng(0)
    length = min(64, config.max_tokens)
    rows = [rng.integers(0, config.vocab_size, length, dtype=np.int32) for _ in range(_TOKENS // length)]
    batch = Batch.of(rows, [NO_ADAPTER] * len(rows))
    seconds = {}
    for precision, path in graphs.items():
        engine = OnnxEngine(path, config, threads=threads)  # one at a time: two thread pools would fight
        engine.pool(batch)  # the first run allocates
        seconds[precision] = _median_seconds(engine, batch)
        del engine
    return "int8" if seconds["int8"] * _GAIN < seconds["fp32"] else "fp32"


def _median_seconds(engine: OnnxEngine, batch: Batch) -> float:
    """Return the median of a few runs; a large model is given fewer, because its first one already says enough."""
    runs: list[float] = []
    while len(runs) < _REPEATS and sum(runs) < _SECONDS:
        runs.append(_timed(engine, batch))
    return statistics.median(runs)


def _timed(engine: OnnxEngine, batch: Batch) -> float:
    started = time.perf_counter()
    engine.pool(batch)
    return time.perf_counter() - started


def _key(graphs: dict[str, Path], threads: int | None) -> str:
    """Return what the answer depends on: processor, cores, runtime and the graphs themselves."""
    files = {
        precision: [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for precision, path in graphs.items()
    }
    facts = [_processor(), usable_cores(), threads, ort.__version__, files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the processor with its instruction sets, as far as the system tells."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyvec"


def _read(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):  # a cache that cannot be read is measured anew
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}
