"""When the machine gives out: memory, kernels, numbers."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from polyvec import Embedder, MachineWarning, NotFiniteError, TextTooLargeError
from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import OnnxEngine
from polyvec.inference.engines.torch import TorchEngine
from polyvec.model.attention import has_varlen_kernel

TEXTS = [" ".join(["router night train"] * (i % 7 + 1)) for i in range(60)]


@pytest.fixture
def short_of_memory(model_folder: Path) -> Iterator[Embedder]:
    """An embedder whose encoder raises what CUDA raises for more than 100 tokens."""
    embedder = Embedder(model_folder, engine="torch", device="cpu")
    assert isinstance(embedder.engine, TorchEngine)

    def refuse(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = embedder.engine._encoder.register_forward_pre_hook(refuse)
    yield embedder
    handle.remove()


def test_a_batch_beyond_the_memory_is_halved_and_said_once(embedder: Embedder, short_of_memory: Embedder) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vectors = short_of_memory.encode(TEXTS)
        again = short_of_memory.encode(TEXTS)
    assert [w.category for w in caught] == [MachineWarning]
    assert "did not fit into memory and was halved" in str(caught[0].message)
    np.testing.assert_allclose(vectors, embedder.encode(TEXTS), atol=5e-6)
    np.testing.assert_allclose(vectors, again, atol=1e-6)


def test_chunks_survive_a_lack_of_memory_too(embedder: Embedder, short_of_memory: Embedder) -> None:
    with pytest.warns(MachineWarning):
        chunks = short_of_memory.encode(TEXTS, late_chunking=4)
    for ours, theirs in zip(chunks, embedder.encode(TEXTS, late_chunking=4), strict=True):
        np.testing.assert_allclose(ours.vectors, theirs.vectors, atol=5e-6)


def test_a_text_that_does_not_fit_alone_is_named(short_of_memory: Embedder) -> None:
    with pytest.raises(TextTooLargeError, match=r"texts\[2\] must fit into memory, got \d+ tokens"):
        short_of_memory.encode(["router", "train", "night train " * 200], batch_tokens=1)


def test_a_window_of_a_long_text_that_does_not_fit_names_the_text(short_of_memory: Embedder) -> None:
    with pytest.raises(TextTooLargeError, match=r"texts\[1\] must fit into memory, got \d+ tokens"):
        short_of_memory.encode(["router", "night train " * 800], late_chunking="sentence")


def test_onnx_runtime_out_of_memory_is_a_memory_error(model_folder: Path) -> None:
    """A real one, in a process that may take little: the graph's own session answers again afterwards."""
    code = f"""
import resource
import numpy as np
from polyvec import Embedder
from polyvec.inference.batching import Batch
model = Embedder({str(model_folder)!r}, engine="onnx", threads=1)
want = model.encode("router")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, -1))
row = np.full(500, 5, np.int32)
try:
    model.engine.pool(Batch.of([row] * 3000, [0] * 3000))
except MemoryError:
    np.testing.assert_allclose(model.encode("router"), want, atol=1e-6)
    print("out of memory, and on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "out of memory, and on", done.stderr


@pytest.mark.parametrize("late_chunking", [None, 4])
def test_numbers_that_are_none_name_their_text(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, late_chunking: int | None
) -> None:
    real = {"pool": OnnxEngine.pool, "token_states": OnnxEngine.token_states}

    def spoilt(name: str):  # type: ignore[no-untyped-def]
        def run(engine: OnnxEngine, batch: Batch) -> np.ndarray:
            found = real[name](engine, batch)
            found[-1, 3] = np.nan  # the shortest text: batches are sorted by length
            return found

        return run

    for name in real:
        monkeypatch.setattr(OnnxEngine, name, spoilt(name))
    with pytest.raises(NotFiniteError, match=r"texts\[1\] must have finite numbers"):
        embedder.encode(["the night train", "a", "the router is on"], late_chunking=late_chunking)


def test_a_device_without_the_kernel_is_named_once() -> None:
    has_varlen_kernel.cache_clear()
    with pytest.warns(MachineWarning, match="cpu lacks the kernel varlen_attn for torch.bfloat16"):
        assert not has_varlen_kernel(torch.device("cpu"), torch.bfloat16, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_varlen_kernel(torch.device("cpu"), torch.bfloat16, 64)
