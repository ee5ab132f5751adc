"""What only a GPU can show: its kernels, its queue, its memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from polyvec import MachineWarning
from polyvec.inference.batching import Batch
from polyvec.inference.engines import torch as engine_module
from polyvec.inference.engines.torch import TorchEngine
from polyvec.inference.passes import Passes, TokenRow
from polyvec.inference.quantize import smallest_cosine
from polyvec.model import float8
from polyvec.model.config import ModelConfig, tiny
from polyvec.model.encoder import Encoder
from tests.conftest import random_encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

#: Heads of 64, as FlashAttention likes them.
CONFIG = tiny(hidden_size=256, num_attention_heads=4, intermediate_size=512, num_hidden_layers=3)
SHAPES = ([4] * 8, [2], [1, 1], [256], [33], [512], [5, 7, 100], [64] * 32, [3] * 255)


def small_encoder() -> Encoder:
    """Adapters of the size of trained ones: ten times as large, rounding alone moves a vector by half a percent."""
    encoder = random_encoder(CONFIG)
    for name, parameter in encoder.named_parameters():
        if ".lora_" in name:
            parameter.data /= 10
    return encoder


def batch_of(lengths: list[int], tasks: list[int], config: ModelConfig = CONFIG) -> Batch:
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, config.vocab_size, n, dtype=np.int32) for n in lengths]
    return Batch.of(rows, [tasks[i % len(tasks)] for i in range(len(rows))])


@pytest.fixture(scope="module")
def exact() -> TorchEngine:
    """The same weights in float32 on the CPU."""
    return TorchEngine(small_encoder(), device="cpu")


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MachineWarning)
        yield


@pytest.mark.parametrize("tasks", [[-1], [2], [0, 1, 2, 3, 4, -1]])
@pytest.mark.parametrize("merged_task", [None, "each"])
def test_packed_bfloat16_keeps_the_vectors(
    exact: TorchEngine, no_warnings: None, tasks: list[int], merged_task: str | None
) -> None:
    engine = TorchEngine(small_encoder(), merged_task=merged_task)
    for lengths in SHAPES:
        batch = batch_of(lengths, tasks)
        assert smallest_cosine(engine.pool(batch), exact.pool(batch)) > 0.999


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_pass_never_waits_for_the_device() -> None:
    encoder = small_encoder().to("cuda", torch.bfloat16)
    batch = batch_of([5, 7, 100], [0, 1])
    tensors = [torch.from_numpy(a).cuda() for a in (batch.input_ids, batch.cu_seqlens, batch.task_ids)]
    with torch.inference_mode():
        encoder(*tensors, max_seqlen=100, adapters=(0, 1))  # asks once whether the kernel is there
        torch.cuda.set_sync_debug_mode("error")
        try:
            encoder(*tensors, max_seqlen=100, adapters=(0, 1))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_keeps_a_copy_of_the_layers_for_each_task_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TorchEngine(small_encoder()).own_pass_tokens is not None
    monkeypatch.setattr(engine_module, "_COPIES_SHARE", 1e-9)
    engine = TorchEngine(small_encoder())
    assert engine.own_pass_tokens is None and len(engine._encoder.all_layers) == 1


@pytest.mark.parametrize("merged_task", [None, "each"])
def test_compiled_layers_serve_every_shape_without_compiling_again(exact: TorchEngine, merged_task: str | None) -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    counter = CompileCounterWithBackend("inductor")
    engine = TorchEngine(small_encoder(), compiler=counter, merged_task=merged_task)
    engine.pool(batch_of([9, 4], [-1])), engine.pool(batch_of([9, 4], [0, 1]))
    at_first = counter.frame_count
    for lengths in SHAPES:
        for tasks in ([-1], [2], [0, 3, -1]):
            batch = batch_of(lengths, tasks)
            assert smallest_cosine(engine.pool(batch), exact.pool(batch)) > 0.999
    assert counter.frame_count == at_first


@pytest.mark.parametrize("compiler", [None, "inductor"])
def test_recorded_passes_give_the_vectors_of_those_that_are_not(
    exact: TorchEngine, no_warnings: None, compiler: str | None
) -> None:
    engine = TorchEngine(small_encoder(), compiler=compiler, graphs=True)
    plain = TorchEngine(small_encoder(), graphs=False)
    for lengths in ([4], [16], [5, 9], [100, 3, 7], [512], [30] * 16):
        for tasks in ([-1], [2], [0, 3, -1]):
            batch = batch_of(lengths, tasks)
            for _ in range(4):
                vectors = engine.pool(batch)
                assert smallest_cosine(vectors, plain.pool(batch)) > 0.9999
                assert smallest_cosine(vectors, exact.pool(batch)) > 0.999
    assert engine._graphs is not None and len(engine._graphs._recorded) >= 8


def test_threads_share_recorded_passes(exact: TorchEngine, no_warnings: None) -> None:
    engine = TorchEngine(small_encoder(), graphs=True)
    batches = [batch_of([4 + i % 12], [i % 5]) for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for got, batch in zip(pool.map(engine.pool, batches), batches, strict=True):
            assert smallest_cosine(got, exact.pool(batch)) > 0.999


def test_lanes_give_the_vectors_of_their_own_rows(exact: TorchEngine) -> None:
    engine = TorchEngine(small_encoder())
    rng = np.random.default_rng(0)
    rows = [TokenRow(rng.integers(4, 500, 3 + i % 60, dtype=np.int32), i % 5) for i in range(300)]
    found: dict[int, np.ndarray] = {}
    for plan, outputs in Passes().run(engine, rows, batch_tokens=512, states=False):
        found.update(zip(plan, outputs, strict=True))
    want = exact.pool(Batch.of([row.input_ids for row in rows], [row.adapter_id for row in rows]))
    assert smallest_cosine(np.stack([found[i] for i in range(300)]), want) > 0.999


def test_callers_at_a_time_share_the_device() -> None:
    engine = TorchEngine(small_encoder(), graphs=False)
    batches = [batch_of([7 + i, 3], [i % 5]) for i in range(32)]
    want = [engine.pool(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for got, vectors in zip(pool.map(engine.pool, batches), want, strict=True):
            assert smallest_cosine(got, vectors) > 0.99999


@pytest.mark.parametrize("compiler", [None, "inductor"])
def test_a_copy_of_the_layers_for_each_task_keeps_the_vectors(
    exact: TorchEngine, monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    monkeypatch.setattr(engine_module, "_MERGED_TOKENS", 64)
    engine = TorchEngine(small_encoder(), merged_task="each", compiler=compiler)
    batch = batch_of([40, 100, 7, 60, 60, 3, 30], [0, -1, 0, 3, 3, 4, -1])
    assert smallest_cosine(engine.pool(batch), exact.pool(batch)) > 0.999


def test_a_batch_beyond_the_memory_of_the_device_is_halved(exact: TorchEngine) -> None:
    engine = TorchEngine(small_encoder())
    row = np.random.default_rng(0).integers(4, 500, 512, dtype=np.int32)
    rows = [TokenRow(row, 0)] * 512
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 500e6) / total)
    try:
        with pytest.warns(MachineWarning, match="did not fit into memory and was halved"):
            outputs = dict(
                pair
                for plan, own in Passes().run(engine, rows, batch_tokens=512 * 512, states=False)
                for pair in zip(plan, own, strict=True)
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert smallest_cosine(np.stack([outputs[0], outputs[511]]), exact.pool(Batch.of([row, row], [0, 0]))) > 0.999


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs 8-bit tensor cores"
)
@pytest.mark.parametrize("compiler", [None, "inductor"])
def test_products_in_8_bits_keep_the_vectors(
    exact: TorchEngine, monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    monkeypatch.setattr(engine_module, "SMALLEST_COSINE", 0.99)  # of random weights
    engine = TorchEngine(small_encoder(), dtype="float8", compiler=compiler)
    for lengths in SHAPES:
        for tasks in ([-1], [0, 3, -1]):
            batch = batch_of(lengths, tasks)
            for _ in range(4):
                assert smallest_cosine(engine.pool(batch), exact.pool(batch)) > 0.98


def test_the_product_in_8_bits_is_that_of_the_emulation() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit tensor cores")
    torch.manual_seed(0)
    (rows, scales), (weight, weight_scales) = (
        float8.to_float8(torch.randn(37, 256)),
        float8.to_float8(torch.randn(96, 256)),
    )
    inputs = (rows, scales, weight, weight_scales.t().contiguous(), torch.randn(96).bfloat16())
    want = float8.scaled_product(*inputs)
    got = float8.scaled_product(*(tensor.cuda() for tensor in inputs)).cpu()
    torch.testing.assert_close(got.float(), want.float(), atol=0.25, rtol=0.02)
