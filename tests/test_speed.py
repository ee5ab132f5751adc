"""A guard against losing speed unseen, by ratios in one run: to a reference kernel on the same thread, never seconds.

CPU time of one thread, the fewest of several alternating runs: other processes on the machine hardly enter it. Limits
are about a third above what the commit that set them measured, and more than a third is what any real loss cost so far.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from polyvec import Embedder
from polyvec.inference.batching import Batch

TEXTS, LENGTH = 8, 64


@pytest.fixture(scope="module")
def seconds(mini: Embedder) -> dict[str, float]:
    """CPU seconds of one batch through both graphs of polyvec-mini, and of its float32 products with weights alone."""
    config = mini.config
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, config.vocab_size, LENGTH, dtype=np.int32) for _ in range(TEXTS)]
    one, five = (Batch.of(rows, [i % n for i in range(TEXTS)]) for n in (1, 5))
    calls: dict[str, Callable[[], object]] = {}
    for engine in ("onnx", "onnx-int8"):
        opened = Embedder(mini.folder, engine=engine, threads=1).engine
        calls[engine] = lambda opened=opened: opened.pool(one)  # type: ignore[misc]
        calls[f"{engine} five tasks"] = lambda opened=opened: opened.pool(five)  # type: ignore[misc]
    session, x = products(config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    calls["products"] = lambda: session.run(None, {"x": x})
    fewest = dict.fromkeys(calls, float("inf"))
    for _ in range(8):
        for name, call in calls.items():
            started = time.process_time()
            call()
            fewest[name] = min(fewest[name], time.process_time() - started)
    return fewest


def products(width: int, inner: int, layers: int) -> tuple[ort.InferenceSession, np.ndarray]:
    """Return a session of the encoder's linear layers, one after the other, and its input."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(layers):
        for j, (rows, columns) in enumerate(((width, 3 * width), (3 * width, width), (width, inner), (inner, width))):
            name = f"{i}.{j}"
            shape = (width, width) if j == 1 else (rows, columns)  # the output projection reads a third of qkv
            weights.append(
                onnx.numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32) * 0.01, f"w{name}")
            )
            source = "x" if i == j == 0 else f"y{i}.{j - 1}" if j else f"y{i - 1}.3"
            if j == 1:
                nodes.append(helper.make_node("Split", [source], [f"q{i}", f"k{i}", f"v{i}"], axis=1, num_outputs=3))
                source = f"q{i}"
            nodes.append(helper.make_node("MatMul", [source, f"w{name}"], [f"y{name}"]))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])
    out = helper.make_tensor_value_info(f"y{layers - 1}.3", TensorProto.FLOAT, ["N", width])
    graph = helper.make_graph(nodes, "products", [value], [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, rng.standard_normal((TEXTS * LENGTH, width), dtype=np.float32)


def test_float32_costs_little_beside_its_products(seconds: dict[str, float]) -> None:
    assert seconds["onnx"] < 1.9 * seconds["products"]  # 1.4 on AVX-512, 2026-11-25


def test_int8_is_faster_than_float32_products_where_the_processor_multiplies_bytes(seconds: dict[str, float]) -> None:
    flags = set()
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            flags = set(file.read().split())
    if not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        pytest.skip("without 8-bit dot products int8 is chosen by its own measurement")
    assert seconds["onnx-int8"] < 0.9 * seconds["products"]  # 0.65 on AVX-512 VNNI, 2026-11-25


@pytest.mark.parametrize("engine", ["onnx", "onnx-int8"])
def test_mixed_tasks_cost_little_more_than_one(seconds: dict[str, float], engine: str) -> None:
    assert seconds[f"{engine} five tasks"] < 1.25 * seconds[engine]  # 1.05, 2026-11-25


HEAVY = {"torch", "transformers", "onnx", "pyarrow", "sklearn", "scipy", "matplotlib", "lancedb", "fastapi", "mteb",
         "sentence_transformers", "huggingface_hub", "bm25s", "tensorboard"}  # fmt: skip


_COMMAND = "import sys; sys.argv = ['polyvec', {!r}, '--help']; from polyvec.cli import app; app(standalone_mode=False)"


@pytest.mark.parametrize(
    "code",
    [
        "from polyvec import Embedder; Embedder().encode('text', task='separation')",
        _COMMAND.format("embed"),
        _COMMAND.format("search"),
    ],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    code += f"; import sys; found = {HEAVY!r} & sys.modules.keys(); assert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
