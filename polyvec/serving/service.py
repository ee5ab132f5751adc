"""What every dialect asks for: texts or token ids in, finished vectors out, through one scheduler.

Shape letters: M kept width, C chunks in a text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import check_output_type, quantize, unit
from polyvec.serving.caller import CALLER
from polyvec.serving.compute import Row
from polyvec.serving.metrics import Metrics
from polyvec.serving.scheduler import Scheduler
from polyvec.serving.tracing import Tracing
from polyvec.serving.worker import WorkerEngine
from polyvec.tasks import Task, resolve_task
from polyvec.text.tokenizer import Encoding, Tokens

#: A text, or its token ids without ``<s>`` and ``</s>``.
Input: TypeAlias = str | list[int]

MAX_INPUTS = 2048  # of one request, as OpenAI has it
MAX_SECONDS = 60.0  # within which a request is answered
_INLINE_CHARACTERS = 2000  # tokenised in half a millisecond or less, about what another thread costs to hand over to


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

    def start(self) -> None:
        self.scheduler.start()

    async def stop(self) -> None:
        await self.scheduler.stop()
        self._tokenizers.shutdown()
        for worker in self._workers:
            worker.close()
        self.tracing.close()

    @property
    def ready(self) -> bool:
        """New requests are taken and something is there to compute them."""
        return not self.scheduler.draining and (not self._workers or any(worker.alive for worker in self._workers))

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
        ``InputError`` and what ``Scheduler.submit`` raises.
        """
        self.scheduler.check_open()  # a refusal costs no tokenising
        width = self.check_width(dimensions)
        resolved = self._resolve(task)
        check_inputs(inputs)
        if late_chunking:
            rows = await self._tokenise(inputs, self._joined, inputs, resolved)
        else:
            rows = await self._tokenise(inputs, self._rows, inputs, resolved, truncate)
        results = await self._submit(rows)
        raw = results[0] if late_chunking else np.stack(results)
        num_tokens = sum(map(len, rows))
        self._tokens_of[resolved.name].inc(num_tokens)
        cut = np.ascontiguousarray(raw[:, :width])
        return Embedded(unit(cut) if normalized else cut, num_tokens)

    async def token_states(
        self, texts: Sequence[Input], *, task: str | None, truncate: bool
    ) -> list[NDArray[np.float32]]:
        """Return (n, D) states of each input's tokens, those of the task's prompt included."""
        self.scheduler.check_open()
        resolved = self._resolve(task)
        check_inputs(texts)
        rows = await self._tokenise(texts, self._rows, texts, resolved, truncate)
        rows = [Row(row.tokens, row.adapter_id, every_token=True) for row in rows]
        states = await self._submit(rows)
        self._tokens_of[resolved.name].inc(sum(map(len, rows)))
        return states

    async def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the tokens of each text, without a prompt."""
        check_inputs(texts)
        encode = self.embedder.tokenizer.encode_batch
        encodings: list[Encoding] = await self._tokenise(texts, encode, list(texts), [""] * len(texts), None)
        return encodings

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
        """Run one short text through tokeniser and model, whatever a cache holds; raises whatever is wrong."""
        self.scheduler.check_open()
        rows = self._rows(["health"], self._resolve(None), truncate=False)
        await self._submit(rows, from_cache=False)

    async def _submit(self, rows: Sequence[Row], *, from_cache: bool = True) -> list[NDArray[np.float32]]:
        caller = CALLER.get()
        if caller.key is not None:
            caller.key.spend("tokens_per_minute", sum(map(len, rows)))
        timeout = self.max_seconds if caller.timeout is None else min(caller.timeout, self.max_seconds)
        with self.tracing.span("vectors", rows=len(rows), tokens=sum(map(len, rows))):
            return await self.scheduler.submit(rows, timeout=timeout, caller=caller, from_cache=from_cache)

    async def _tokenise(self, inputs: Sequence[Input], function: Any, *arguments: Any) -> Any:
        with self.tracing.span("tokenise", inputs=len(inputs)), self.metrics.tokenise_seconds.time():
            if sum(map(len, inputs)) <= _INLINE_CHARACTERS:
                return function(*arguments)
            return await asyncio.get_running_loop().run_in_executor(self._tokenizers, function, *arguments)

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


def check_inputs(inputs: Sequence[Input]) -> None:
    """Raise ``InputError`` for no input, too many, or an empty one."""
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InputError(f"input must hold between 1 and {MAX_INPUTS} texts, got {len(inputs)}; send several requests")
    for i, value in enumerate(inputs):
        if not value:
            raise InputError(f"input[{i}] must not be empty, got nothing; leave it out")
