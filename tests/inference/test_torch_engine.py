"""The engine of PyTorch: what it hands to a device, and how often it compiles."""

from __future__ import annotations

from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from polyvec.inference.batching import Batch
from polyvec.inference.engines.torch import TorchEngine
from polyvec.model.config import tiny
from tests.conftest import random_encoder

#: Lengths of the texts of a batch: one text, texts of a token, as many tokens as the model is wide, equal and mixed.
SHAPES = ([4] * 8, [2], [1], [1, 1], [2, 2], [32], [33], [512], [3] * 11, [5, 7, 100], [64] * 32, [1, 5])


def batch_of(lengths: list[int], task: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch.of([rng.integers(4, 500, n, dtype=np.int32) for n in lengths], [task] * len(lengths))


@pytest.mark.parametrize("first", [0, 1, 9])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layers_are_compiled_once_for_every_shape_and_once_more_for_adapters(backend: str, first: int) -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    counter = CompileCounterWithBackend(backend)
    config = tiny(num_hidden_layers=3)
    compiled = TorchEngine(random_encoder(config), device="cpu", compiler=counter)
    plain = TorchEngine(random_encoder(config), device="cpu")
    compiled.pool(batch_of(SHAPES[first], -1)), compiled.pool(batch_of(SHAPES[first], 0))
    at_first = counter.frame_count
    assert at_first > 0
    for lengths in SHAPES:
        for task in (-1, 0, 3):
            batch = batch_of(lengths, task)
            np.testing.assert_allclose(compiled.pool(batch), plain.pool(batch), atol=1e-5)
    assert counter.frame_count == at_first


def test_equal_layers_share_what_was_compiled() -> None:
    counts = []
    for layers in (1, 4):
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        counter = CompileCounterWithBackend("eager")
        engine = TorchEngine(random_encoder(tiny(num_hidden_layers=layers)), device="cpu", compiler=counter)
        engine.pool(batch_of([5, 9], -1))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_callers_at_a_time_get_their_own_vectors() -> None:
    engine = TorchEngine(random_encoder(), device="cpu")
    batches = [batch_of([7 + i, 3], i - 1) for i in range(6)]
    want = [engine.pool(batch) for batch in batches]
    got: dict[int, np.ndarray] = {}
    barrier = Barrier(len(batches))

    def call(i: int) -> None:
        barrier.wait()
        got[i] = engine.pool(batches[i])

    threads = [Thread(target=call, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, vectors in enumerate(want):
        np.testing.assert_array_equal(got[i], vectors)
