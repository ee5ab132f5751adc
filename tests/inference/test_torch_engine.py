"""The engine of PyTorch: what it hands to a device, and how often it compiles."""

from __future__ import annotations

from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.inference.batching import Batch, split_by_adapter
from polyvec.inference.engines import torch as engine_module
from polyvec.inference.engines.torch import TorchEngine, bytes_of_copies
from polyvec.inference.passes import Passes, TokenRow
from polyvec.model.config import tiny
from tests.conftest import random_encoder

#: Lengths of the texts of a batch: one text, texts of a token, as many tokens as the model is wide, equal and mixed.
SHAPES = ([4] * 8, [2], [1], [1, 1], [2, 2], [32], [33], [512], [3] * 11, [5, 7, 100], [64] * 32, [1, 5])


def batch_of(lengths: list[int], task: int) -> Batch:
    rng = np.random.default_rng(0)
    return Batch.of([rng.integers(4, 500, n, dtype=np.int32) for n in lengths], [task] * len(lengths))


@pytest.mark.parametrize(("backend", "first"), [("eager", 0), ("eager", 1), ("eager", 9), ("aot_eager", 0)])
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


def test_flash_attention_is_one_step_of_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, traced here; the numbers of its kernels stand in."""
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    monkeypatch.setattr("polyvec.model.encoder.runs_varlen", lambda *_: True)
    steps = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        steps.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        place = next(i for i, node in enumerate(graph.graph.find_nodes(op="placeholder")) if node.name == "l_x_")
        return lambda *inputs: (torch.zeros_like(inputs[place]),)

    engine = TorchEngine(random_encoder(tiny(num_hidden_layers=3)), device="cpu", compiler=backend)
    for lengths in SHAPES:
        if lengths != [1]:
            engine.pool(batch_of(lengths, -1)), engine.pool(batch_of(lengths, 2))
    assert len(steps) == 2  # without adapters and with
    assert all(sum("_varlen_attn" in step for step in found) == 1 for found in steps)
    assert all(sum("polyvec" in step and "gelu" in step for step in found) == 1 for found in steps), steps


MIXED = ([9, 30, 4, 4, 12, 7, 2], [0, -1, 0, 3, 3, 4, -1])


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("least", [1, 14, 1000])
def test_a_copy_of_the_layers_for_each_task_gives_the_same_vectors(
    monkeypatch: pytest.MonkeyPatch, least: int, compiler: str | None
) -> None:
    monkeypatch.setattr(engine_module, "_MERGED_TOKENS", least)
    engine = TorchEngine(random_encoder(), device="cpu", merged_task="each", compiler=compiler)
    plain = TorchEngine(random_encoder(), device="cpu")
    lengths, tasks = MIXED
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, 500, n, dtype=np.int32) for n in lengths]
    batch = Batch.of(rows, tasks)
    np.testing.assert_allclose(engine.pool(batch), plain.pool(batch), atol=1e-5)
    np.testing.assert_allclose(engine.token_states(batch), plain.token_states(batch), atol=1e-4)
    one = Batch.of(rows, [3] * len(rows))
    np.testing.assert_allclose(engine.pool(one), plain.pool(one), atol=1e-5)
    assert not any("merged" in name for name in engine._encoder.state_dict())


def test_a_job_of_five_tasks_is_computed_without_adapters_but_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_MERGED_TOKENS", 64)
    engine = TorchEngine(random_encoder(), device="cpu", merged_task="each")
    gated: list[int] = []  # tokens of the passes that go through all adapters
    layer = engine._encoder.layers[0]
    layer.register_forward_hook(lambda _, inputs, __: gated.append(len(inputs[0])) if inputs[1] is not None else None)
    rng = np.random.default_rng(0)
    rows = [TokenRow(rng.integers(4, 500, 3 + i % 40, dtype=np.int32), i % 6 - 1) for i in range(300)]
    found: dict[int, np.ndarray] = {}
    for plan, outputs in Passes().run(engine, rows, batch_tokens=256, states=False):
        found.update(zip(plan, outputs, strict=True))
    want = TorchEngine(random_encoder(), device="cpu").pool(
        Batch.of([row.input_ids for row in rows], [row.adapter_id for row in rows])
    )
    np.testing.assert_allclose(np.stack([found[i] for i in range(len(rows))]), want, atol=1e-5)
    assert 0 < sum(gated) < 6 * 64


def test_copies_of_the_layers_are_weighed_before_they_are_made() -> None:
    config = tiny(num_hidden_layers=3)
    encoder = random_encoder(config)
    layers = sum(p.numel() for p in encoder.layers.parameters())
    assert bytes_of_copies(encoder) == 5 * 4 * layers
    encoder.merge_beside()
    copied = sum(p.numel() for layers in encoder.all_layers[1:] for p in layers.parameters())
    assert bytes_of_copies(encoder) == 4 * copied
    assert TorchEngine(random_encoder(), device="cpu").own_pass_tokens is None  # a CPU keeps none unasked


def test_frozen_adapters_are_compiled_once_too() -> None:
    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    counter = CompileCounterWithBackend("eager")
    encoder = random_encoder(tiny(num_hidden_layers=3))
    encoder.freeze_adapters()
    compiled = TorchEngine(encoder, device="cpu", compiler=counter)
    plain = TorchEngine(random_encoder(tiny(num_hidden_layers=3)), device="cpu")
    compiled.pool(batch_of([5, 9], -1)), compiled.pool(batch_of([5, 9], 0))
    at_first = counter.frame_count
    for lengths in SHAPES:
        batch = batch_of(lengths, 2)
        np.testing.assert_allclose(compiled.pool(batch), plain.pool(batch), atol=1e-5)
    assert counter.frame_count == at_first > 0


def test_a_batch_is_split_into_the_adapters_that_have_enough_tokens() -> None:
    lengths, tasks = MIXED
    rows = [np.full(n, 10 + i, np.int32) for i, n in enumerate(lengths)]
    parts = split_by_adapter(Batch.of(rows, tasks), least_tokens=16)
    assert [places.tolist() for places, _ in parts] == [[1, 6], [3, 4], [0, 2, 5]]
    for places, part in parts:
        assert part.lengths.tolist() == [lengths[i] for i in places]
        assert part.task_ids.tolist() == [tasks[i] for i in places]
        assert part.input_ids.tolist() == [10 + i for i in places for _ in range(lengths[i])]


def test_one_merged_task_is_computed_and_others_are_refused() -> None:
    encoder = random_encoder()
    engine = TorchEngine(encoder, device="cpu", merged_task="classification", compiler="eager")
    task = engine.config.tasks.index("classification")
    batch = batch_of([5, 9], task)
    np.testing.assert_allclose(engine.pool(batch), TorchEngine(random_encoder(), device="cpu").pool(batch), atol=1e-5)
    with pytest.raises(InputError, match="must all be"):
        engine.pool(batch_of([5], -1))
    with pytest.raises(InputError, match="needs the base weight, which an engine merged for good"):
        encoder.unmerge()
    with pytest.raises(InputError, match="merged_task must be 'auto', 'each', None or one of .*, got 'sorting'"):
        TorchEngine(random_encoder(), device="cpu", merged_task="sorting")


def test_threads_bound_those_of_torch(model_folder: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Embedder(model_folder, engine="torch", device="cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
