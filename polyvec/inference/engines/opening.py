"""From a model folder and the name of an engine to the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from polyvec.errors import InputError, MissingExtraError
from polyvec.inference.engines import Engine
from polyvec.inference.engines.choice import faster_precision
from polyvec.inference.engines.onnx import GRAPH_FILES, OnnxEngine
from polyvec.inference.late_chunking import is_whole
from polyvec.model.config import ModelConfig

ENGINES = ("auto", "onnx", "onnx-int8", "torch", "torch-float8")


def open_engine(folder: Path, config: ModelConfig, engine: str, *, device: str | None, threads: int | None) -> Engine:
    """Open the model in ``folder`` as ``Embedder`` has it. Raises ``InputError``, and ``WeightsError`` for a model that
    does not load whole.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if threads is not None and (not is_whole(threads) or threads < 1):
        raise InputError(f"threads must be a whole number from 1, got {threads!r}; leave it out for all cores")
    if engine == "auto":
        wants_cpu = device in (None, "cpu")
        if wants_cpu and any((folder / name).exists() for name in GRAPH_FILES.values()):
            precision = faster_precision(folder, config, threads=threads)
            engine = "onnx-int8" if precision == "int8" else "onnx"
        else:
            engine = "torch"
    if engine.startswith("onnx"):
        if device not in (None, "cpu"):
            raise InputError(f"engine {engine!r} runs on the CPU, got device {device!r}; use engine='torch'")
        precision = "int8" if engine == "onnx-int8" else "fp32"
        path = folder / GRAPH_FILES[precision]
        if not path.exists():
            raise InputError(
                f"engine {engine!r} needs {path.name} in the model folder, got none in {folder}; "
                f"write it with: polyvec export {folder} --onnx {precision}"
            )
        return OnnxEngine(path, config, threads=threads)
    try:
        from polyvec.inference.engines.torch import TorchEngine
        from polyvec.model.weights import load_encoder
    except ImportError as error:
        raise MissingExtraError.of(f"engine {engine!r}", "torch") from error
    dtype: Literal["float8"] | None = "float8" if engine == "torch-float8" else None
    return TorchEngine(load_encoder(folder), device=device, dtype=dtype, threads=threads)
