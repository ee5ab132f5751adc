"""Batches of many requests: the same vectors as alone, and failures that stay alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.inference.batching import Batch
from polyvec.inference.quantize import unit
from polyvec.serving.metrics import Metrics
from polyvec.serving.scheduler import ComputeError, DeadlineError, DrainingError, OverloadedError, Row, Scheduler
from polyvec.tasks import resolve_task

POISON = 77


class Poisoned:
    """The tiny engine, which fails on one token and can be slow."""

    def __init__(self, embedder: Embedder) -> None:
        self.inner, self.config, self.name, self.batch_tokens = embedder.engine, embedder.config, "poisoned", 256
        self.batches: list[int] = []
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
        return self.inner.token_states(batch)


def rows_of(embedder: Embedder, texts: list[str], tasks: list[str]) -> list[Row]:
    resolved = [resolve_task(task, embedder.config.prompts) for task in tasks]
    encodings = embedder.tokenizer.encode_batch(texts, [task.prompt for task in resolved], embedder.max_tokens)
    return [Row(e, task.adapter_id) for e, task in zip(encodings, resolved, strict=True)]


def poison(embedder: Embedder) -> Row:
    row = rows_of(embedder, ["a text"], ["classification"])[0]
    row.encoding.input_ids[1] = POISON
    return row


def run(engine: Poisoned, work: Any, *, queue_tokens: int = 100_000) -> Any:
    async def inside() -> Any:
        scheduler = Scheduler(engine, max_tokens=512, queue_tokens=queue_tokens, metrics=Metrics())
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
    rows = rows_of(embedder, ["one"], ["separation"])
    with pytest.raises(DeadlineError, match="within 0 s"):
        run(Poisoned(embedder), lambda scheduler: scheduler.submit(rows, timeout=0))

    async def work(scheduler: Scheduler) -> Any:
        running = asyncio.create_task(scheduler.submit(rows, timeout=30))
        await asyncio.sleep(0)
        scheduler.draining = True
        return await gather(running, scheduler.submit(rows, timeout=30))

    finished, refused = run(Poisoned(embedder), work)
    assert len(finished) == 1 and isinstance(refused, DrainingError)


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
