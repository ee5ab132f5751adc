"""Batches of many requests: the same vectors as alone, and failures that stay alone."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.inference.batching import Batch
from polyvec.inference.quantize import unit
from polyvec.serving.caller import NOBODY, Caller
from polyvec.serving.compute import ComputeError, Row, compute
from polyvec.serving.keys import ApiKey
from polyvec.serving.metrics import Metrics
from polyvec.serving.queue import FairQueue, best_batch
from polyvec.serving.scheduler import DeadlineError, DrainingError, OverloadedError, Scheduler
from polyvec.serving.tracing import Tracing
from polyvec.serving.worker import WorkerLostError
from polyvec.tasks import resolve_task
from polyvec.text.tokenizer import Tokens

POISON = 77


class Poisoned:
    """The tiny engine, which fails on one token and can be slow."""

    def __init__(self, embedder: Embedder) -> None:
        self.inner, self.config, self.name, self.batch_tokens = embedder.engine, embedder.config, "poisoned", 256
        self.lanes, self.lane, self.lane_tokens = 1, self, 256
        self.own_pass_tokens, self.pads, self.leaves_host = None, True, False
        self.batches: list[int] = []
        self.lengths: list[int] = []  # of the rows whose states were asked for
        self.nan = False
        self.gate = threading.Event()
        self.gate.set()

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        assert self.gate.wait(10)
        self.batches.append(len(batch.lengths))
        bad = np.array([POISON in row for row in np.split(batch.input_ids, batch.cu_seqlens[1:-1])])
        if bad.any() and not self.nan:
            raise RuntimeError("poison")
        vectors = self.inner.pool(batch)
        vectors[bad] = np.nan
        return vectors

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        self.lengths += list(batch.lengths)
        return self.inner.token_states(batch)


def rows_of(embedder: Embedder, texts: list[str], tasks: list[str]) -> list[Row]:
    resolved = [resolve_task(task, embedder.config.prompts) for task in tasks]
    encodings = embedder.tokenizer.encode_batch(texts, [task.prompt for task in resolved], embedder.max_tokens)
    return [Row(e, task.adapter_id) for e, task in zip(encodings, resolved, strict=True)]


def poison(embedder: Embedder) -> Row:
    row = rows_of(embedder, ["a text"], ["classification"])[0]
    row.tokens.input_ids[1] = POISON
    return row


def run(engine: Poisoned, work: Any, *, queue_tokens: int = 100_000, cache_rows: int = 0) -> Any:
    async def inside() -> Any:
        scheduler = Scheduler(
            [engine],
            max_tokens=512,
            queue_tokens=queue_tokens,
            metrics=Metrics(),
            tracing=Tracing(),
            cache_rows=cache_rows,
        )
        scheduler.start()
        try:
            return await work(scheduler)
        finally:
            await scheduler.stop()

    return asyncio.run(inside())


def gather(*work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.gather(*work, return_exceptions=True)


def test_mixed_requests_give_what_encode_gives(embedder: Embedder) -> None:
    names = list(embedder.tasks)
    texts = [f"text {i} " * (1 + i % 17) for i in range(40)]
    tasks = [names[i % 5] for i in range(40)]
    rows = rows_of(embedder, texts, tasks)
    engine = Poisoned(embedder)

    async def work(scheduler: Scheduler) -> Any:
        return await asyncio.gather(*(scheduler.submit(rows[i : i + 4], timeout=30) for i in range(0, 40, 4)))

    vectors = unit(np.stack([vector for part in run(engine, work) for vector in part]))
    np.testing.assert_allclose(vectors, embedder.encode(texts, task=tasks), atol=1e-6)
    assert max(engine.batches) > 4  # requests shared batches


@pytest.mark.parametrize("nan", [False, True])
def test_only_the_culprit_fails(embedder: Embedder, nan: bool) -> None:
    good = rows_of(embedder, [f"text {i}" for i in range(7)], ["separation"] * 7)
    engine = Poisoned(embedder)
    engine.nan = nan

    async def work(scheduler: Scheduler) -> Any:
        results = await gather(
            *(scheduler.submit([row], timeout=30) for row in [*good[:3], poison(embedder), *good[3:]])
        )
        return results, await scheduler.submit([good[0]], timeout=30)

    results, after = run(engine, work)
    assert [isinstance(result, ComputeError) for result in results] == [False] * 3 + [True] + [False] * 4
    np.testing.assert_allclose(after[0], results[0][0], atol=1e-6)


class TwoLanes(Poisoned):
    """Two passes at a time, and one death for both."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__(embedder)
        self.lanes, self.lane = 2, Poisoned(embedder)
        self.lane.pool = self.beside  # type: ignore[method-assign]
        self.deaths = 0
        self.inside = 0
        self._together = threading.Barrier(2)

    def beside(self, batch: Batch) -> NDArray[np.float32]:
        self.inside += 1
        is_poisoned, deaths = POISON in batch.input_ids, self.deaths
        if self.inside <= 2:
            self._together.wait(10)  # breaks unless both are inside
        else:
            self.gate.wait(0.02)  # long enough for another that should not be here
        if is_poisoned:
            self.deaths += 1
        if is_poisoned or self.deaths > deaths:
            raise WorkerLostError("the worker died")
        return self.inner.pool(batch)


def test_many_tokens_go_side_by_side_and_few_through_all_cores(embedder: Embedder) -> None:
    rows = rows_of(embedder, [f"text {i} " * 20 for i in range(40)], ["separation"] * 40)
    engine = TwoLanes(embedder)

    async def work(scheduler: Scheduler) -> Any:
        few = await scheduler.submit(rows[:1], timeout=30)
        assert engine.batches == [1] and not engine.inside
        return few, await asyncio.gather(*(scheduler.submit([row], timeout=30) for row in rows))

    few, many = run(engine, work)
    want = engine.inner.pool(Batch.of([row.tokens.input_ids for row in rows], [2] * 40))
    np.testing.assert_allclose(few[0], want[0], atol=1e-6)
    np.testing.assert_allclose(np.concatenate(many), want, atol=1e-6)
    assert engine.inside > 2


def test_a_death_is_not_blamed_on_the_batch_beside(embedder: Embedder) -> None:
    """Rows so long that each is a pass alone: the one beside the culprit dies with it, and is computed again."""
    texts = [f"text {i} " * 200 for i in range(6)]
    rows = rows_of(embedder, texts, ["separation"] * 6)
    rows[1].tokens.input_ids[1] = POISON
    engine = TwoLanes(embedder)

    async def work(scheduler: Scheduler) -> Any:
        return await gather(*(scheduler.submit([row], timeout=30) for row in rows))

    results = run(engine, work)
    assert [isinstance(result, ComputeError) for result in results] == [i == 1 for i in range(6)]
    assert engine.deaths == 2  # with the one beside, then alone


def test_a_full_queue_says_when_to_come_back(embedder: Embedder) -> None:
    rows = rows_of(embedder, ["some text here"] * 4, ["separation"] * 4)
    size = sum(map(len, rows))

    async def work(scheduler: Scheduler) -> Any:
        return await gather(scheduler.submit(rows, timeout=30), scheduler.submit(rows, timeout=30))

    first, second = run(Poisoned(embedder), work, queue_tokens=size)
    assert len(first) == 4 and isinstance(second, OverloadedError) and second.retry_after >= 1
    with pytest.raises(InputError, match=f"at most {size - 1} tokens"):
        run(Poisoned(embedder), lambda scheduler: scheduler.submit(rows, timeout=30), queue_tokens=size - 1)


def test_a_cancelled_request_is_never_computed(embedder: Embedder) -> None:
    rows = rows_of(embedder, ["one", "two"], ["separation"] * 2)
    engine = Poisoned(embedder)
    engine.gate.clear()

    async def work(scheduler: Scheduler) -> None:
        first = asyncio.create_task(scheduler.submit(rows[:1], timeout=30))
        await asyncio.sleep(0.05)  # the engine has the first row and waits at its gate
        task = asyncio.create_task(scheduler.submit(rows, timeout=30))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])
        engine.gate.set()
        await first

    run(engine, work)
    assert engine.batches == [1]


def test_a_late_request_and_one_while_stopping_are_refused(embedder: Embedder) -> None:
    rows = rows_of(embedder, ["one", "two"], ["separation"] * 2)
    with pytest.raises(DeadlineError, match="within 0 s"):
        run(Poisoned(embedder), lambda scheduler: scheduler.submit(rows, timeout=0))

    async def work(scheduler: Scheduler) -> Any:
        running = asyncio.create_task(scheduler.submit(rows[:1], timeout=30))
        with scheduler.reading(1):  # let in, and in the tokeniser when the server begins to stop
            await asyncio.sleep(0)
            scheduler.draining = True
            with pytest.raises(DrainingError), scheduler.reading(1):
                raise AssertionError("nobody is let in any more")
        return await gather(running, scheduler.submit(rows[1:], timeout=30))

    finished, read = run(Poisoned(embedder), work)
    assert len(finished) == len(read) == 1


def test_chunks_and_vectors_queue_together(embedder: Embedder) -> None:
    text = "The first one. Then another. " * 200  # several windows of the tiny model
    spans = ((0, 14), (15, 28))
    encoding = embedder.tokenizer.encode(text)
    short = rows_of(embedder, ["one"], ["separation"])[0]

    async def work(scheduler: Scheduler) -> Any:
        return await scheduler.submit([short, Row(encoding, -1, spans)], timeout=30)

    vector, means = run(Poisoned(embedder), work)
    assert len(encoding) > embedder.max_tokens and vector.shape == (32,)
    np.testing.assert_allclose(unit(means), embedder.encode(text, late_chunking=spans).vectors, atol=1e-6)


def test_equal_rows_are_computed_once_and_kept_by_a_cache(embedder: Embedder) -> None:
    row, other = rows_of(embedder, ["a text", "a text"], ["separation", "classification"])

    async def work(scheduler: Scheduler) -> Any:
        first = await asyncio.gather(*(scheduler.submit([row, row], timeout=30) for _ in range(5)))
        return first, await scheduler.submit([row, other], timeout=30)

    for cache_rows, passes in ((0, [1, 2]), (10, [1, 1])):
        engine = Poisoned(embedder)
        first, later = run(engine, work, cache_rows=cache_rows)
        assert engine.batches == passes
        for vector in [*(v for part in first for v in part), later[0]]:
            np.testing.assert_allclose(vector, first[0][0], atol=1e-6)
        assert np.abs(later[1] - later[0]).max() > 1e-3  # another task is another row


def test_a_shared_row_outlives_the_caller_that_leaves(embedder: Embedder) -> None:
    blocker, row = rows_of(embedder, ["blocker", "shared"], ["separation"] * 2)
    engine = Poisoned(embedder)
    engine.gate.clear()

    async def work(scheduler: Scheduler) -> Any:
        running = asyncio.create_task(scheduler.submit([blocker], timeout=30))
        await asyncio.sleep(0.05)
        leaver, stayer = (asyncio.create_task(scheduler.submit([row], timeout=30)) for _ in range(2))
        await asyncio.sleep(0.05)
        leaver.cancel()
        await asyncio.wait([leaver])
        engine.gate.set()
        await running
        return await stayer

    assert run(engine, work)[0].shape == (32,)
    assert engine.batches == [1, 1]


def order_of(embedder: Embedder, sent: list[Caller]) -> list[int]:
    """Return in which order requests of one row each are answered that came while the engine was busy."""
    texts = [f"number {i} of some length" for i in range(len(sent) + 1)]
    rows = rows_of(embedder, texts, ["separation"] * len(texts))
    engine = Poisoned(embedder)
    engine.batch_tokens = 1  # one row a pass
    engine.gate.clear()
    answered: list[int] = []

    async def work(scheduler: Scheduler) -> None:
        async def one(i: int, caller: Caller) -> None:
            await scheduler.submit([rows[i]], timeout=30, caller=caller)
            answered.append(i)

        busy = [asyncio.create_task(one(len(sent), NOBODY))]
        await asyncio.sleep(0.05)
        tasks = [asyncio.create_task(one(i, caller)) for i, caller in enumerate(sent)]
        await asyncio.sleep(0.05)
        engine.gate.set()
        await asyncio.gather(*busy, *tasks)

    run(engine, work)
    return [i for i in answered if i < len(sent)]


def test_a_caller_with_few_requests_does_not_wait_for_one_with_many(embedder: Embedder) -> None:
    many, few = Caller(ApiKey("many", b"", {})), Caller(ApiKey("few", b"", {}))
    order = order_of(embedder, [many] * 20 + [few] * 3)
    assert max(order.index(i) for i in (20, 21, 22)) <= 8  # turn by turn, and not behind the twenty


def test_bulk_work_yields_and_does_not_starve(embedder: Embedder) -> None:
    order = order_of(embedder, [Caller(bulk=True)] * 3 + [NOBODY] * 25)
    places = [order.index(i) for i in range(3)]
    assert places[1] >= 8  # after the first, ten interactive rows go before each
    assert places[1] <= 16


def test_a_batch_is_of_like_lengths_unless_the_rest_would_need_a_pass_for_little() -> None:
    waiting = [20, *[8] * 30, *[21] * 30]
    assert {waiting[i] for i in best_batch(waiting, batch_tokens=384)} == {20, 21}  # others go with the eights
    assert sorted(best_batch([9, 3], batch_tokens=384)) == [0, 1]
    assert best_batch([40, 2, 2, 2], batch_tokens=384) == [0]  # three times 38 of padding are dearer than a pass


def batches_of(
    sent: list[tuple[Caller, int]], *, ahead: dict[Caller, int] | None = None
) -> Iterator[list[tuple[Caller, int]]]:
    """Yield who is in each batch of at most 384 tokens, and with how many, when rows of these lengths wait.

    ``ahead`` is what callers were charged before.
    """
    queue, callers = FairQueue(), dict[int, Caller]()
    for caller, length in sent:
        row = Row(Tokens(np.zeros(length, np.int32), 0), -1)
        job = queue.push(row, None, 0, caller, Future(), 0.0)  # type: ignore[arg-type]
        callers[id(job)] = caller
    for caller, tokens in (ahead or {}).items():
        queue._flows[caller.flow].charged += tokens
    while queue.tokens:
        yield [(callers[id(job)], job.tokens) for job in queue.take(384)]


BULK = Caller(bulk=True)
MIXED = [20, 60, 300, 30, 100, 45, 150, 25, 80, 10] * 3


def test_bulk_work_is_in_no_batch_of_other_work_that_waits() -> None:
    """Bulk rows are as long as the first one, those of the same caller behind it are not."""
    bulk = waiting = 0
    for i, batch in enumerate(batches_of([*[(BULK, 20)] * 500, *((NOBODY, length) for length in MIXED)])):
        bulk += sum(length for caller, length in batch if caller is BULK)
        waiting += sum(length for caller, length in batch if caller is NOBODY)
        assert i > 0 or bulk == 0
        if waiting == sum(MIXED):
            break
    assert bulk <= sum(MIXED) / 10 + 384  # whose turn it is has a whole batch


def test_bulk_work_takes_the_room_that_is_left() -> None:
    batches = batches_of([*((BULK, length) for length in [21, 20, 3] * 100), (NOBODY, 20), (NOBODY, 19)])
    first, second = itertools.islice(batches, 2)
    assert [length for caller, length in first if caller is NOBODY] == [20, 19]
    assert sorted(length for caller, length in first if caller is BULK) == [20] * 17  # none that is longer, or padding
    assert all(caller is BULK for caller, _ in second)


def test_who_has_had_more_takes_no_place_of_who_waits() -> None:
    a, b = Caller(ApiKey("a", b"", {})), Caller(ApiKey("b", b"", {}))
    sent = [(a, 20), *[(a, 30)] * 10, *[(b, 20)] * 100]
    first = next(batches_of(sent, ahead={b: 3 * 384}))
    assert [caller for caller, _ in first] == [a] * 11


def test_rows_beyond_the_context_are_read_in_windows_whatever_they_come_with(embedder: Embedder) -> None:
    texts = ["The first one. Then another. " * 100, "One more, as long as that. " * 110, "A short one. Then another."]
    spans = ((0, 14), (15, 26))
    rows = [Row(embedder.tokenizer.encode(text), -1, spans) for text in texts]
    assert len(rows[1]) > embedder.max_tokens < len(rows[0])
    engine = Poisoned(embedder)
    for text, means in zip(texts, compute(engine, rows, max_tokens=embedder.max_tokens), strict=True):
        assert isinstance(means, np.ndarray)
        np.testing.assert_allclose(unit(means), embedder.encode(text, late_chunking=spans).vectors, atol=1e-6)
    assert max(engine.lengths) <= embedder.max_tokens  # an engine that reads more would give other vectors
