"""Recorded passes: padded batches give the vectors of the batch alone, and what cannot be recorded runs as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from polyvec.errors import InputError, MachineWarning
from polyvec.inference.batching import Batch
from polyvec.inference.engines import graphs
from polyvec.inference.engines.graphs import Bucket, Graphs, bucket_of, fill
from polyvec.inference.engines.torch import TorchEngine
from tests.conftest import random_encoder


def batch_of(lengths: list[int], tasks: list[int]) -> Batch:
    rng = np.random.default_rng(sum(lengths))
    return Batch.of([rng.integers(4, 500, n, dtype=np.int32) for n in lengths], tasks)


class Repeater:
    """Stands in for a device: repeats the recorded call on what then lies in its inputs."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        return call


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> TorchEngine:
    monkeypatch.setattr(graphs, "_FIRST_USES", 0)
    engine = TorchEngine(random_encoder(), device="cpu")
    engine._graphs = Graphs(engine._recordable, engine.device, Repeater())
    return engine


def test_a_batch_goes_to_the_smallest_bucket_that_holds_it() -> None:
    assert bucket_of(batch_of([16], [0]), (0,)) == Bucket(16, 1, (0,))
    assert bucket_of(batch_of([16, 1], [0, 0]), (-1,)) == Bucket(32, 4, (-1,))
    assert bucket_of(batch_of([513], [0]), (0,)) is None
    assert bucket_of(batch_of([2] * 17, [0] * 17), (0,)) is None


def test_what_is_left_of_a_bucket_is_empty_texts_and_one_that_nobody_reads() -> None:
    filled = fill(batch_of([5, 3], [2, -1]), Bucket(16, 4, (0, -1)))
    ids, tasks, offsets = np.split(filled, (16, 21))
    assert (ids[8:] == 0).all() and tasks.tolist() == [2, -1, -1, -1, -1]
    assert offsets.tolist() == [0, 5, 8, 8, 8, 16]


@pytest.mark.parametrize("tasks", [[-1, -1, -1], [0, -1, 3]])
def test_recorded_passes_give_the_same_vectors(engine: TorchEngine, tasks: list[int]) -> None:
    plain = TorchEngine(random_encoder(), device="cpu")
    for lengths in ([4], [16], [5, 9], [100, 3, 7], [512], [170, 171, 171]):
        batch = batch_of(lengths, tasks[: len(lengths)])
        for _ in range(2):
            np.testing.assert_allclose(engine.pool(batch), plain.pool(batch), atol=2e-6)
    assert isinstance(engine._graphs, Graphs) and len(engine._graphs._recorded) == 5


def test_with_a_copy_of_the_layers_a_task_has_recordings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_FIRST_USES", 0)
    engine = TorchEngine(random_encoder(), device="cpu", merged_task="each")
    engine._graphs = Graphs(engine._recordable, engine.device, Repeater())
    plain = TorchEngine(random_encoder(), device="cpu")
    for tasks in ([2, 2], [4, 4], [-1, -1], [2, 4], [-1, 3], [2, 2]):
        batch = batch_of([5, 9], tasks)
        np.testing.assert_allclose(engine.pool(batch), plain.pool(batch), atol=1e-5)
    assert [bucket.adapters for bucket in engine._graphs._recorded] == [(4,), (-1,), (0, -1), (2,)]


def test_a_merged_adapter_is_in_what_was_recorded_before(engine: TorchEngine) -> None:
    batch = batch_of([5, 9], [2, 2])
    engine.pool(batch_of([5, 9], [-1, -1]))
    want = engine.pool(batch)
    engine._encoder.merge(2)
    np.testing.assert_allclose(engine.pool(batch), want, atol=1e-5)
    with pytest.raises(InputError, match="unmerge"):
        engine.pool(batch_of([5, 9], [2, 1]))


def test_sizes_are_recorded_when_they_come_again_and_the_oldest_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    engine = TorchEngine(random_encoder(), device="cpu")
    recorder = Repeater()
    engine._graphs = Graphs(engine._recordable, engine.device, recorder)
    seen = []
    for length in (10, 10, 10, 10, 20, 20, 20, 40, 40, 40, 10, 40):
        engine.pool(batch_of([length], [0]))
        seen.append(recorder.recorded)
    assert seen == [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4, 4]


def test_a_device_that_cannot_record_is_named_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_FIRST_USES", 0)
    engine = TorchEngine(random_encoder(), device="cpu")

    def fail(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine._graphs = Graphs(engine._recordable, engine.device, fail)
    plain = TorchEngine(random_encoder(), device="cpu")
    with pytest.warns(MachineWarning, match="could not be recorded as a CUDA graph .operation not permitted"):
        first = engine.pool(batch_of([7], [1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = engine.pool(batch_of([7], [1]))
    for vectors in (first, again):
        np.testing.assert_array_equal(vectors, plain.pool(batch_of([7], [1])))


def test_graphs_are_of_a_gpu() -> None:
    with pytest.raises(InputError, match="graphs=True needs a CUDA device, got cpu"):
        TorchEngine(random_encoder(), device="cpu", graphs=True)
    assert torch.cuda.is_available() or TorchEngine(random_encoder())._graphs is None
