"""Passes: every row once, side by side where there are many, alone where memory or length asks for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from polyvec import Embedder, MachineWarning
from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import OnnxEngine
from polyvec.inference.passes import Passes, RowTooLargeError, TokenRow
from polyvec.model.config import ModelConfig

WHOLE_TOKENS, LANE_TOKENS = 40, 10


class Summing:
    """Pools a row to the sum of its ids; ``before`` is called with each batch."""

    def __init__(self, config: ModelConfig, lanes: int, before: Callable[[Batch], object] = lambda _: None) -> None:
        self.config, self.name, self.lanes, self.batch_tokens, self.before = config, "sum", lanes, WHOLE_TOKENS, before
        self.lane, self.lane_tokens = self, LANE_TOKENS
        self.own_pass_tokens: int | None = None
        self.pads, self.leaves_host = True, False
        self.adapters: list[list[int]] = []  # of each batch
        self.batches: list[int] = []  # tokens of each

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        self.batches.append(len(batch.input_ids))
        self.adapters.append(batch.adapters)
        self.before(batch)
        return np.add.reduceat(batch.input_ids, batch.cu_seqlens[:-1])[:, None].astype(np.float32)

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        self.batches.append(len(batch.input_ids))
        return batch.input_ids[:, None].astype(np.float32)


def summing(
    embedder: Embedder, lanes: int, in_lane: Callable[[Batch], object] = lambda _: None
) -> tuple[Summing, Summing]:
    """Return an engine and its lane."""
    whole = Summing(embedder.config, lanes)
    whole.lane = Summing(embedder.config, 1, in_lane)
    whole.lane.batch_tokens = LANE_TOKENS
    return whole, whole.lane


def rows_of(*lengths: int) -> list[TokenRow]:
    return [TokenRow(np.full(length, i + 1, np.int32), 0) for i, length in enumerate(lengths)]


def check(rows: list[TokenRow], engine: Summing, batch_tokens: int | None = None, *, states: bool = False) -> None:
    found = {}
    for indices, outputs in Passes().run(engine, rows, batch_tokens=batch_tokens, states=states):
        for i, output in zip(indices, outputs, strict=True):
            assert i not in found
            found[i] = output
    assert sorted(found) == list(range(len(rows)))
    for i, output in found.items():
        want = rows[i].input_ids[:, None] if states else [rows[i].input_ids.sum()]
        np.testing.assert_array_equal(output, want)


@pytest.mark.parametrize("states", [False, True])
def test_many_passes_run_side_by_side(embedder: Embedder, states: bool) -> None:
    together = threading.Barrier(3)
    whole, lane = summing(embedder, 3, lambda _: together.wait(20))  # breaks unless three are inside at once
    check(rows_of(*[5] * 24), whole, states=states)
    assert whole.batches == [] and lane.batches == [10] * 12


def test_few_passes_and_long_rows_have_all_cores(embedder: Embedder) -> None:
    whole, lane = summing(embedder, 2)
    check(rows_of(5, 6, 7, 2), whole)
    assert whole.batches == [20] and lane.batches == []
    whole, lane = summing(embedder, 2)
    check(rows_of(*[5] * 8, 41, 40), whole)
    assert whole.batches == [41] and sorted(lane.batches) == [10] * 4 + [40]


def test_batch_tokens_bounds_the_lanes_too(embedder: Embedder) -> None:
    whole, lane = summing(embedder, 2)
    check(rows_of(*[5] * 8), whole, batch_tokens=5)
    assert lane.batches == [5] * 8


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_engine_that_wants_it_gets_passes_of_one_adapter_and_what_is_left_together(
    embedder: Embedder, lanes: int
) -> None:
    whole, lane = summing(embedder, lanes)
    whole.own_pass_tokens = 6
    lengths = [1 + i % 5 for i in range(200)]
    rows = [TokenRow(row.input_ids, i % 6 - 1) for i, row in enumerate(rows_of(*lengths))]
    check(rows, whole)
    batches = list(zip(whole.batches + lane.batches, whole.adapters + lane.adapters, strict=True))
    bound = WHOLE_TOKENS if lanes == 1 else LANE_TOKENS
    assert all(tokens <= bound for tokens, _ in batches)
    alone = [adapters for tokens, adapters in batches if len(adapters) == 1 and tokens >= 6]
    mixed = [tokens for tokens, adapters in batches if len(adapters) > 1]
    assert sorted({adapters[0] for adapters in alone}) == [-1, 0, 1, 2, 3, 4]
    assert mixed and sum(mixed) < 6 * 6  # of each adapter less than what is worth a pass
    assert sum(tokens for tokens, _ in batches) == sum(lengths)

    whole.own_pass_tokens, whole.adapters, lane.adapters = None, [], []
    check(rows, whole)
    assert all(len(adapters) > 1 for adapters in whole.adapters + lane.adapters)


def test_an_engine_that_pads_nothing_gets_as_many_tokens_as_it_asks_for(embedder: Embedder) -> None:
    whole, _ = summing(embedder, 1)
    rows = rows_of(20, *[1] * 60)
    check(rows, whole)
    assert whole.batches == [21, 40, 19]  # two rows of twenty tokens, padding included
    whole.pads, whole.batches = False, []
    check(rows, whole)
    assert whole.batches == [40, 40]


def test_what_fits_into_no_lane_has_the_memory_for_itself(embedder: Embedder) -> None:
    def refuse(batch: Batch) -> None:
        if 3 in batch.input_ids:
            raise MemoryError

    whole, lane = summing(embedder, 2, refuse)
    check(rows_of(*[5] * 8), whole)
    assert whole.batches == [10] and lane.batches == [10] * 4

    whole, lane = summing(embedder, 2, refuse)
    whole.before = refuse
    with pytest.warns(MachineWarning, match="did not fit"), pytest.raises(RowTooLargeError) as caught:
        check(rows_of(*[5] * 8), whole)
    assert caught.value.index == 2


def test_who_stops_asking_does_not_wait_for_the_rest(embedder: Embedder) -> None:
    whole, lane = summing(embedder, 2, lambda _: threading.Event().wait(0.01))
    run = Passes().run(whole, rows_of(*[5] * 400), batch_tokens=None, states=False)
    next(run)
    run.close()
    assert len(lane.batches) < 100


@pytest.mark.parametrize("precision", ["onnx", "onnx-int8"])
def test_lanes_change_no_vector(model_folder: Path, precision: str) -> None:
    texts = [f"router number {i} " * (1 + i % 9) for i in range(300)]
    one, two = (Embedder(model_folder, engine=precision, threads=threads) for threads in (1, 2))
    assert isinstance(two.engine, OnnxEngine) and two.engine.lanes == 2
    vectors = two.encode(texts, task="separation")
    np.testing.assert_allclose(vectors, one.encode(texts, task="separation"), atol=2e-6)
    np.testing.assert_array_equal(vectors, two.encode(texts, task="separation"))  # whatever ran beside what


@pytest.mark.parametrize("precision", ["onnx", "onnx-int8"])
@pytest.mark.parametrize("count", [30, 300])
def test_the_same_passes_give_the_same_bits_on_one_core_and_two(model_folder: Path, precision: str, count: int) -> None:
    texts = [f"router number {i} " * (1 + i % 9) for i in range(count)]
    found = []
    for threads in (1, 2):
        model = Embedder(model_folder, engine=precision, threads=threads)
        found.append(model.encode(texts, task="separation", batch_tokens=model.engine.lane.batch_tokens))
    np.testing.assert_array_equal(*found)


def test_a_lane_is_opened_when_there_is_work_for_it(model_folder: Path) -> None:
    model = Embedder(model_folder, engine="onnx", threads=2)
    for count, is_open in ((8, False), (300, True)):
        model.encode(["a short text of some words"] * count)
        assert isinstance(model.engine, OnnxEngine)
        assert (model.engine._lane is not None) == is_open


def test_callers_at_one_time_open_one_lane(model_folder: Path) -> None:
    engine = Embedder(model_folder, engine="onnx", threads=2).engine
    together = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        lanes = list(pool.map(lambda _: (together.wait(20), engine.lane)[1], range(8)))
    assert len(set(map(id, lanes))) == 1
