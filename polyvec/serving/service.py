"""What every dialect asks for: texts or token ids in, finished vectors out, through one scheduler.

Shape letters: M kept width, C chunks in a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import check_output_type, quantize, unit
from polyvec.serving.caller import CALLER, CHECK
from polyvec.serving.compute import Row
from polyvec.serving.metrics import Metrics
from polyvec.serving.scheduler import Scheduler, deadline_error
from polyvec.serving.tracing import Tracing
from polyvec.serving.worker import WorkerEngine
from polyvec.tasks import Task, resolve_task
from polyvec.text.tokenizer import Encoding, Tokens

#: A text, or its token ids without ``<s>`` and ``</s>``.
Input: TypeAlias = str | list[int]
_Read = TypeVar("_Read")

MAX_INPUTS = 2048  # of one request, as OpenAI has it
MAX_SECONDS = 60.0  # within which a request is answered
MAX_NUMBERS = 10_000_000  # of token states in an answer: 100 MB of JSON, which the event loop writes in one go
MAX_DESCRIBED = 100_000  # tokens that one answer describes: 10 MB of JSON
_INLINE_CHARACTERS = 2000  # tokenised in half a millisecond or less, about what another thread costs to hand over to
_CHARACTERS_A_TOKEN = 16  # or fewer in any text worth reading: what is not read yet counts by it


@dataclass(frozen=True)
class Embedded:
    """Rows (B, M) float32 of one request and the tokens that were read for them."""

    vectors: NDArray[np.float32]
    num_tokens: int


class Service:
    """One model behind a scheduler. ``start`` and ``stop`` belong to the event loop that serves.

    ``workers`` compute; without them ``embedder`` does, in this process.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        queue_tokens: int,
        max_seconds: float = MAX_SECONDS,
        cache_rows: int = 0,
        workers: Sequence[WorkerEngine] = (),
    ) -> None:
        self.embedder = embedder
        self.metrics, self.tracing = Metrics(), Tracing()
        self._tokens_of = {name: self.metrics.tokens.labels(task=name or "none") for name in (None, *embedder.tasks)}
        self.max_seconds = max_seconds
        self._workers = workers
        self.scheduler = Scheduler(
            workers or [embedder.engine],
            max_tokens=embedder.max_tokens,
            queue_tokens=queue_tokens,
            metrics=self.metrics,
            tracing=self.tracing,
            cache_rows=cache_rows,
        )
        # Apart from the engine's thread, so that one request is tokenised while another is computed.
        self._tokenizers = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        self.leaving = False  # soon to stop: new requests are still taken, and balancers told to look elsewhere

    def start(self) -> None:
        self.scheduler.start()

    async def stop(self) -> None:
        await self.scheduler.stop()
        self._tokenizers.shutdown(wait=False, cancel_futures=True)
        await asyncio.gather(*(asyncio.to_thread(worker.close) for worker in self._workers))  # a pass may hang in each
        self.tracing.close()

    @property
    def ready(self) -> bool:
        """New requests are taken and something is there to compute them."""
        return (
            not self.leaving
            and not self.scheduler.draining
            and (not self._workers or any(worker.alive for worker in self._workers))
        )

    def check_model(self, name: str, *aliases: str) -> None:
        """Raise ``InputError`` unless ``name`` is the model that is served."""
        if name not in (self.embedder.model_name, *aliases):
            raise InputError(
                f"model must be {self.embedder.model_name!r}, which this server has, got another; see /v1/models"
            )

    async def embed(
        self,
        inputs: Sequence[Input],
        *,
        task: str | None,
        dimensions: int | None = None,
        truncate: bool = False,
        normalized: bool = True,
        late_chunking: bool = False,
    ) -> Embedded:
        """Return one row per input, in order.

        With ``late_chunking`` the inputs, texts alone, are read as one text and each is one of its chunks. Raises
        ``InputError`` and what ``Scheduler.reading`` and ``Scheduler.submit`` raise.
        """
        since = time.monotonic()
        width = self.check_width(dimensions)
        resolved = self._resolve(task)
        check_inputs(inputs)
        if late_chunking:
            rows = await self._read(inputs, lambda: self._joined(inputs, resolved), since=since)
        else:
            rows = await self._read_rows(inputs, resolved, truncate, since=since)
        results = await self._submit(rows, since=since)
        raw = results[0] if late_chunking else np.stack(results)
        num_tokens = sum(map(len, rows))
        self._tokens_of[resolved.name].inc(num_tokens)
        cut = np.ascontiguousarray(raw[:, :width])
        return Embedded(unit(cut) if normalized else cut, num_tokens)

    async def token_states(
        self, texts: Sequence[Input], *, task: str | None, truncate: bool
    ) -> list[NDArray[np.float32]]:
        """Return (n, D) states of each input's tokens, those of the task's prompt included. Raises as ``embed``."""
        since = time.monotonic()
        resolved = self._resolve(task)
        check_inputs(texts)
        rows = await self._read_rows(texts, resolved, truncate, since=since)
        num_tokens, most = sum(map(len, rows)), MAX_NUMBERS // self.embedder.config.hidden_size
        if num_tokens > most:
            raise InputError(f"a request for token states must hold at most {most} tokens, got {num_tokens}; split it")
        states = await self._submit([Row(row.tokens, row.adapter_id, every_token=True) for row in rows], since=since)
        self._tokens_of[resolved.name].inc(num_tokens)
        return states

    async def describe(self, texts: Sequence[str], description: Callable[[list[Encoding]], _Read]) -> _Read:
        """Return what ``description`` makes of each text's tokens, without a prompt. Raises as ``embed``."""
        since = time.monotonic()
        check_inputs(texts)

        def read() -> _Read:
            encodings = self.embedder.tokenizer.encode_batch(texts, [""] * len(texts))
            num_tokens = sum(map(len, encodings))
            if num_tokens > MAX_DESCRIBED:
                raise InputError(
                    f"a request to tokenize must hold at most {MAX_DESCRIBED} tokens, got {num_tokens}; split it"
                )
            return description(encodings)

        return await self._read(texts, read, since=since)

    def quantize(self, vectors: NDArray[np.float32], dtype: str) -> NDArray[Any]:
        """Return the rows as ``dtype``; raises ``InputError`` where this model or width has no such thing."""
        check_output_type(dtype, vectors.shape[1], self.embedder.int8_ranges)
        return quantize(vectors, dtype, self.embedder.int8_ranges)

    def check_width(self, dimensions: int | None) -> int:
        largest = self.embedder.config.hidden_size
        if dimensions is not None and not 1 <= dimensions <= largest:
            raise InputError(f"dimensions must be between 1 and {largest}, got another number; leave it out for all")
        return dimensions or largest

    def _resolve(self, task: str | None) -> Task:
        if task is not None and task not in self.embedder.tasks:  # told here, for elsewhere the name would come back
            raise InputError(
                f"task must be one of {', '.join(self.embedder.tasks)}, got another; leave it out for none"
            )
        return resolve_task(task, self.embedder.config.prompts)

    async def check(self) -> None:
        """Run one short text through tokeniser and model, whatever waits and whatever a cache holds.

        Raises whatever is wrong.
        """
        self.scheduler.check_open()
        rows = self._rows(["health"], self._resolve(None), truncate=False)
        await self.scheduler.submit(rows, timeout=self._timeout(), caller=CHECK)

    async def _submit(self, rows: Sequence[Row], *, since: float) -> list[NDArray[np.float32]]:
        with self.tracing.span("vectors", rows=len(rows), tokens=sum(map(len, rows))):
            return await self.scheduler.submit(rows, timeout=self._timeout(), since=since, caller=CALLER.get())

    def _timeout(self) -> float:
        timeout = CALLER.get().timeout
        return self.max_seconds if timeout is None else min(timeout, self.max_seconds)

    async def _read_rows(self, inputs: Sequence[Input], task: Task, truncate: bool, *, since: float) -> list[Row]:
        read = partial(self._rows, inputs, task, truncate)
        return await self._read(inputs, read, since=since, limit=self.embedder.max_tokens)

    async def _read(
        self, inputs: Sequence[Input], read: Callable[[], _Read], *, since: float, limit: float = math.inf
    ) -> _Read:
        """Return what ``read`` gives, which tokenises ``inputs``, each up to ``limit`` tokens, unless it is late."""
        with self.tracing.span("tokenise", inputs=len(inputs)), self.metrics.tokenise_seconds.time():
            reading = self.scheduler.reading(_fewest_tokens(inputs, limit))
            if sum(map(len, inputs)) <= _INLINE_CHARACTERS:
                with reading:
                    return read()
            loop = asyncio.get_running_loop()
            taken = contextlib.ExitStack()
            taken.enter_context(reading)
            work = self._tokenizers.submit(read)
            try:
                return await asyncio.wait_for(asyncio.wrap_future(work), since + self._timeout() - time.monotonic())
            except asyncio.TimeoutError:
                raise deadline_error(self._timeout()) from None
            finally:
                if work.done():  # given back here and not a moment before, when a server that stops would see no work
                    taken.close()
                else:  # a thread that is late goes on all the same: its room is taken until it is done
                    work.add_done_callback(lambda _: _call_soon(loop, taken.close))

    def _rows(self, inputs: Sequence[Input], task: Task, truncate: bool) -> list[Row]:
        tokenizer, limit = self.embedder.tokenizer, self.embedder.max_tokens
        texts = [value for value in inputs if isinstance(value, str)]
        tokens_of_texts = iter(tokenizer.tokens_batch(texts, [task.prompt] * len(texts), limit))
        rows = []
        for i, value in enumerate(inputs):
            tokens = next(tokens_of_texts) if isinstance(value, str) else self._of_ids(i, value, task)
            if tokens.truncated and not truncate:
                raise InputError(
                    f"input[{i}] must be at most {limit} tokens with its prompt, got more; "
                    "shorten it or set truncate to true"
                )
            rows.append(Row(tokens, task.adapter_id))
        return rows

    def _joined(self, inputs: Sequence[Input], task: Task) -> list[Row]:
        texts = [value for value in inputs if isinstance(value, str)]
        if len(texts) < len(inputs) or not all(text.strip() for text in texts):
            raise InputError("input must be texts that are not empty for late_chunking, got others; leave them out")
        edges = np.cumsum([0, *map(len, texts)]).tolist()
        encoding = self.embedder.tokenizer.encode("".join(texts), prompt=task.prompt)
        return [Row(encoding, task.adapter_id, tuple(zip(edges[:-1], edges[1:], strict=True)))]

    def _of_ids(self, i: int, ids: list[int], task: Task) -> Tokens:
        """Wrap ids in ``<s>``, the prompt's tokens and ``</s>``."""
        config, limit = self.embedder.config, self.embedder.max_tokens
        special = {config.bos_token_id, config.eos_token_id, config.pad_token_id}
        if not all(0 <= token < config.vocab_size and token not in special for token in ids):
            raise InputError(
                f"input[{i}] must hold token ids from 0 to {config.vocab_size - 1} without <s>, </s> and <pad>, "
                "got another id; send the text"
            )
        head = self.embedder.tokenizer.encode("", prompt=task.prompt).input_ids
        whole = np.concatenate((head[:-1], np.asarray(ids, np.int32), head[-1:]))
        if len(whole) > limit:
            raise InputError(f"input[{i}] must be at most {limit} tokens with its prompt, got {len(whole)}; shorten it")
        return Tokens(whole.astype(np.int32), 0)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped without this thread
        loop.call_soon_threadsafe(function)


def check_inputs(inputs: Sequence[Input]) -> None:
    """Raise ``InputError`` for no input, too many, or an empty one."""
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InputError(f"input must hold between 1 and {MAX_INPUTS} texts, got {len(inputs)}; send several requests")
    for i, value in enumerate(inputs):
        if not value:
            raise InputError(f"input[{i}] must not be empty, got nothing; leave it out")


def _fewest_tokens(inputs: Sequence[Input], limit: float) -> int:
    """Return how many tokens the inputs have at least, of each of which at most ``limit`` are read."""
    tokens = (len(value) / _CHARACTERS_A_TOKEN if isinstance(value, str) else len(value) for value in inputs)
    return 1 + int(sum(min(number, limit) for number in tokens))
