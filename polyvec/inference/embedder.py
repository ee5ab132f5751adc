"""Texts to embeddings: the object that most users need.

Shape letters: B texts, N packed tokens, D hidden width, M kept width, C chunks in a text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError, TruncationWarning, UntrainedDimensionWarning
from polyvec.inference.batching import Batch, plan_batches
from polyvec.inference.engines import Engine
from polyvec.inference.engines.onnx import GRAPH_FILES, OnnxEngine
from polyvec.inference.quantize import calibrate, check_output_type, quantize
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import read_config, read_json
from polyvec.tasks import Task, resolve_task
from polyvec.text.chunking import Span, check_spans, fixed_spans, sentence_spans, token_ranges, windows
from polyvec.text.tokenizer import Encoding, Tokenizer

#: ``sentence``, tokens a chunk, character spans, or a function from a text to its spans.
LateChunking: TypeAlias = Literal["sentence"] | int | Sequence[Span] | Callable[[str], Sequence[Span]]

ENGINES = ("auto", "onnx", "onnx-int8", "torch")
_RANGES_FILE = "int8_ranges.json"
_BLOCK_TEXTS = 1024  # sorted by length together; more gains under 2 % (padding), fewer costs streams nothing
_BLOCK_CHARACTERS = 2_000_000  # a block of giant texts ends early, so that a stream's memory stays bounded
_BATCH_TOKENS = 4096  # beyond this a CPU gains nothing and activations leave its cache
_WINDOW_OVERLAP = 512  # tokens of context that a later window re-reads (arXiv 2409.04701, section 3.4)


@dataclass(frozen=True)
class Embedding:
    """One text's result. ``vector`` (M,), or None when chunked; ``chunks`` (C, ...) when chunked.

    ``num_tokens`` counts what the model read, ``<s>``, prompt and ``</s>`` included; ``cut_characters`` the rest.
    """

    vector: NDArray[Any] | None
    task: str | None
    num_tokens: int
    cut_characters: int
    chunks: Chunks | None = None


@dataclass(frozen=True)
class Chunks:
    """A late-chunked text: ``spans`` C pairs of characters, ``vectors`` (C, M)."""

    spans: list[Span]
    vectors: NDArray[Any]

    def __len__(self) -> int:
        return len(self.spans)


@dataclass(frozen=True)
class _Row:
    """One text on its way through sort, batch and restore."""

    text: str
    task: Task
    encoding: Encoding
    chunking: LateChunking | None


class Embedder:
    """A model ready to embed.

    ``model`` is None for polyvec-mini, which is inside the package, a folder, or a hub name. ``engine`` is ``onnx``,
    ``onnx-int8``, ``torch``, or ``auto``: ONNX where the folder holds a graph and no other ``device`` is asked for.
    ``threads`` bounds the CPU threads of ONNX Runtime.
    Raises ``WeightsError`` for a model that does not load whole.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        engine: str = "auto",
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.folder = resolve_model_folder(model)
        self.model_name = str(model or "polyvec-mini")
        self.config = read_config(self.folder)
        self.tokenizer = Tokenizer.from_file(
            self.folder / "tokenizer.json",
            vocab_size=self.config.vocab_size,
            bos_token_id=self.config.bos_token_id,
            eos_token_id=self.config.eos_token_id,
        )
        self._ranges = self._read_ranges()
        self.engine = self._open_engine(engine, device, threads)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names that ``task=`` takes."""
        return self.config.tasks

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Trained Matryoshka widths; any width up to the largest can be asked for."""
        return self.config.matryoshka_dims

    @property
    def max_tokens(self) -> int:
        """Longest text that is read in one pass, prompt, ``<s>`` and ``</s>`` included."""
        return self.config.max_tokens

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        task: str | None | Sequence[str | None] = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        batch_tokens: int = _BATCH_TOKENS,
        late_chunking: LateChunking | None = None,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
    ) -> Any:
        """Return unit vectors: (M,) for one text, (B, M) for many, in the order of ``texts``.

        ``task`` selects adapter and prompt together, for all texts or one by one; None is the base model without a
        prompt. ``prompt`` replaces the task's own prompt. ``dimensions`` keeps the first components, then rescales.
        ``dtype`` is float32, float16, int8, binary or ubinary. With ``late_chunking`` the result is ``Chunks``, or a
        list of them: ``"sentence"``, a number of tokens, a function from a text to its spans, or, for a single text,
        the (start, end) characters themselves. A text beyond ``max_tokens`` is cut with a ``TruncationWarning``, or is
        an ``InputError`` when ``truncate`` is False; late chunking reads all of it in overlapping windows.
        No vector depends on the other texts.
        """
        is_single = isinstance(texts, str)
        if not is_single and isinstance(late_chunking, Sequence) and not isinstance(late_chunking, str):
            raise InputError("late_chunking spans belong to one text, got several texts; pass a function of the text")
        items = [texts] if isinstance(texts, str) else list(_iterate(texts))
        results = list(
            self.encode_stream(
                items,
                task=task,
                dimensions=dimensions,
                dtype=dtype,
                batch_tokens=batch_tokens,
                late_chunking=late_chunking,
                truncate=truncate,
                prompt=prompt,
                progress=progress,
            )
        )
        if late_chunking is not None:
            chunks = [result.chunks for result in results]
            return chunks[0] if is_single else chunks
        vectors = [result.vector for result in results]
        if is_single:
            return vectors[0]
        if not vectors:
            width = dimensions or self.config.hidden_size
            return quantize(np.empty((0, width), np.float32), dtype, self._ranges)
        return np.stack(vectors)  # type: ignore[arg-type]

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        task: str | None | Iterable[str | None] = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        batch_tokens: int = _BATCH_TOKENS,
        late_chunking: LateChunking | None = None,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
    ) -> Iterator[Embedding]:
        """Yield one ``Embedding`` per text, in order, in memory that does not grow with their number.

        The options are those of ``encode``. Every option is checked before the first text is read.
        """
        width = self._check_width(dimensions)
        check_output_type(dtype, width, self._ranges)
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
        _check_chunking(late_chunking)
        source = _iterate(texts)
        if task is None or isinstance(task, str):
            rows: Iterator[tuple[str, Task]] = zip(
                source, itertools.repeat(resolve_task(task, self.config.prompts, prompt=prompt)), strict=False
            )
        else:
            rows = _pair(source, (resolve_task(name, self.config.prompts, prompt=prompt) for name in task))
        total = len(texts) if isinstance(texts, Sequence) else None
        return self._stream(rows, width, dtype, batch_tokens, late_chunking, truncate, _Progress(progress, total))

    def fingerprint(
        self,
        *,
        task: str | None = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        prompt: str | None = None,
    ) -> str:
        """Return 16 hex digits of what makes a vector: weights, tokenizer, task, prompt, pooling, width, dtype."""
        resolved = resolve_task(task, self.config.prompts, prompt=prompt)
        width = self._check_width(dimensions)
        parts = [self.weights_hash, resolved.name, resolved.prompt, "mean", width, dtype]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits of everything in the folder that decides a vector."""
        digest = hashlib.sha256()
        for path in sorted([*self.folder.rglob("*.safetensors"), self.folder / "tokenizer.json"]):
            digest.update(str(path.relative_to(self.folder)).encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def calibrate(self, texts: Iterable[str]) -> dict[int, float]:
        """Measure the int8 ranges of every trained width on ``texts``, keep them, and write them beside the weights.

        Vectors of earlier ranges do not compare with later ones: calibrate once, before storing any int8 vector.
        """
        vectors = np.stack([e.vector for e in self.encode_stream(texts) if e.vector is not None])
        self._ranges = calibrate(vectors, self.dimensions)
        partial = self.folder / f".{_RANGES_FILE}.partial"
        partial.write_text(json.dumps({str(d): r for d, r in self._ranges.items()}, indent=2) + "\n")
        os.replace(partial, self.folder / _RANGES_FILE)
        return dict(self._ranges)

    def _stream(
        self,
        texts: Iterator[tuple[str, Task]],
        width: int,
        dtype: str,
        batch_tokens: int,
        chunking: LateChunking | None,
        truncate: bool,
        progress: _Progress,
    ) -> Iterator[Embedding]:
        numbered = 0
        num_cut = 0
        with progress:
            for block in _blocks(texts):
                rows = self._tokenise(block, numbered, chunking, truncate)
                numbered += len(block)
                num_cut += sum(row.encoding.truncated for row in rows)
                yield from self._embed_block(rows, width, dtype, batch_tokens, progress)
        if num_cut:
            warnings.warn(
                f"{num_cut} of {numbered} texts were longer than {self.max_tokens} tokens and lost their tails; "
                "use late_chunking to read all of them, or truncate=False to make this an error",
                TruncationWarning,
                stacklevel=2,
            )

    def _tokenise(
        self, block: list[tuple[str, Task]], first: int, chunking: LateChunking | None, truncate: bool
    ) -> list[_Row]:
        for i, (text, _) in enumerate(block, start=first):
            if not isinstance(text, str):
                raise InputError(f"texts[{i}] must be a str, got {type(text).__name__}; convert or drop it first")
        limit = self.max_tokens if chunking is None else None
        encodings = self.tokenizer.encode_batch([t for t, _ in block], [task.prompt for _, task in block], limit)
        for i, ((text, task), encoding) in enumerate(zip(block, encodings, strict=True), start=first):
            if encoding.truncated and not truncate:
                total = self.tokenizer.count_tokens(text, task.prompt)
                raise InputError(
                    f"texts[{i}] must be at most {self.max_tokens} tokens with its prompt, got {total}; "
                    "shorten it, use late_chunking, or allow truncate=True"
                )
        return [_Row(text, task, e, chunking) for (text, task), e in zip(block, encodings, strict=True)]

    def _embed_block(
        self, rows: list[_Row], width: int, dtype: str, batch_tokens: int, progress: _Progress
    ) -> Iterator[Embedding]:
        lengths = [len(row.encoding) for row in rows]
        results: list[Embedding | None] = [None] * len(rows)
        short = [i for i, length in enumerate(lengths) if length <= self.max_tokens]
        heads = self.config.num_attention_heads
        for plan in plan_batches([lengths[i] for i in short], batch_tokens=batch_tokens, num_heads=heads):
            indices = [short[i] for i in plan]
            batch = Batch.of([rows[i].encoding.input_ids for i in indices], [rows[i].task.adapter_id for i in indices])
            chunked = rows[indices[0]].chunking is not None
            if chunked:
                states = self.engine.token_states(batch)
                for i, own in zip(indices, np.split(states, batch.cu_seqlens[1:-1]), strict=True):
                    results[i] = self._chunk(rows[i], [(own, 0)], width, dtype)
            else:
                vectors = quantize(_unit(self.engine.pool(batch)[:, :width]), dtype, self._ranges)
                for i, vector in zip(indices, vectors, strict=True):
                    e = rows[i].encoding
                    results[i] = Embedding(vector, rows[i].task.name, len(e), e.cut_characters)
            progress.advance(len(indices))
        for i, length in enumerate(lengths):
            if length > self.max_tokens:  # only late chunking lets a text be this long
                results[i] = self._chunk(rows[i], self._window_states(rows[i]), width, dtype)
                progress.advance(1)
        for result in results:
            assert result is not None
            yield result

    def _window_states(self, row: _Row) -> Iterator[tuple[NDArray[np.float32], int]]:
        """Yield token states of a text beyond the context, window by window, with the index of the first token.

        Each window opens with ``<s>`` and the prompt and closes with ``</s>``, as the model was trained to read.
        """
        ids, prefix = row.encoding.input_ids, row.encoding.num_prefix_tokens
        head, body, tail = ids[:prefix], ids[prefix:-1], ids[-1:]
        size = self.max_tokens - prefix - 1
        plan = windows(len(body), size, min(_WINDOW_OVERLAP, size // 2))
        for number, (first, stop, kept) in enumerate(plan):
            batch = Batch.of([np.concatenate((head, body[first:stop], tail))], [row.task.adapter_id])
            states = self.engine.token_states(batch)
            begin = 0 if number == 0 else prefix + kept - first
            end = len(states) if number == len(plan) - 1 else len(states) - 1
            yield states[begin:end], 0 if number == 0 else prefix + kept

    def _chunk(self, row: _Row, parts: Iterable[tuple[NDArray[np.float32], int]], width: int, dtype: str) -> Embedding:
        """Average each chunk's token states. ``parts`` are runs of states with the index of their first token.

        The first chunk takes ``<s>`` and the prompt too, the last one ``</s>``: one chunk over the whole text is then
        the text's own vector (arXiv 2409.04701, algorithm 1).
        """
        encoding = row.encoding
        prefix = encoding.num_prefix_tokens
        offsets = encoding.offsets[prefix:-1]
        spans = self._spans(row, offsets)
        ranges = token_ranges(offsets, spans) + prefix
        for i, (start, stop) in enumerate(ranges):
            if start == stop:
                raise InputError(f"late_chunking[{i}] must hold text, got whitespace alone at characters {spans[i]}")
        if len(spans):
            ranges[ranges[:, 0] == ranges[:, 0].min(), 0] = 0
            ranges[ranges[:, 1] == ranges[:, 1].max(), 1] += 1
        sums = np.zeros((len(spans), self.config.hidden_size), dtype=np.float32)
        for states, first in parts:
            last = first + len(states)
            for chunk in np.flatnonzero((ranges[:, 0] < last) & (ranges[:, 1] > first)):
                start, stop = ranges[chunk]
                sums[chunk] += states[max(start - first, 0) : stop - first].sum(axis=0, dtype=np.float32)
        counts = (ranges[:, 1] - ranges[:, 0])[:, None]
        vectors = quantize(_unit((sums / np.maximum(counts, 1))[:, :width]), dtype, self._ranges)
        return Embedding(None, row.task.name, len(encoding), 0, Chunks(spans, vectors))

    def _spans(self, row: _Row, offsets: NDArray[np.int32]) -> list[Span]:
        chunking = row.chunking
        if chunking == "sentence":
            return sentence_spans(row.text)
        if isinstance(chunking, int):
            return fixed_spans(offsets, chunking)
        assert chunking is not None and not isinstance(chunking, str)
        return check_spans(chunking(row.text) if callable(chunking) else chunking, len(row.text))

    def _check_width(self, dimensions: int | None) -> int:
        largest = self.config.hidden_size
        if dimensions is None:
            return largest
        if isinstance(dimensions, bool) or not isinstance(dimensions, int) or not 1 <= dimensions <= largest:
            raise InputError(
                f"dimensions must be a whole number between 1 and {largest}, got {dimensions!r}; "
                f"trained widths are {', '.join(map(str, self.dimensions))}"
            )
        if dimensions not in self.dimensions:
            warnings.warn(
                f"dimensions {dimensions} is not a trained width; these are {', '.join(map(str, self.dimensions))}",
                UntrainedDimensionWarning,
                stacklevel=3,
            )
        return dimensions

    def _read_ranges(self) -> dict[int, float]:
        path = self.folder / _RANGES_FILE
        return {int(d): float(r) for d, r in read_json(path).items()} if path.exists() else {}

    def _open_engine(self, engine: str, device: str | None, threads: int | None) -> Engine:
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        if engine == "auto":
            wants_cpu = device in (None, "cpu")
            engine = "onnx" if wants_cpu and (self.folder / GRAPH_FILES["fp32"]).exists() else "torch"
        if engine.startswith("onnx"):
            if device not in (None, "cpu"):
                raise InputError(f"engine {engine!r} runs on the CPU, got device {device!r}; use engine='torch'")
            precision = "int8" if engine == "onnx-int8" else "fp32"
            path = self.folder / GRAPH_FILES[precision]
            if not path.exists():
                raise InputError(
                    f"engine {engine!r} needs {path.name} in the model folder, got none in {self.folder}; "
                    f"write it with: polyvec export {self.folder} --onnx {precision}"
                )
            return OnnxEngine(path, self.config, threads=threads)
        try:
            from polyvec.inference.engines.torch import TorchEngine
            from polyvec.model.weights import load_encoder
        except ImportError as error:
            raise MissingExtraError.of("engine 'torch'", "torch") from error
        return TorchEngine(load_encoder(self.folder), device=device)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rescale rows to unit length, after the cut: cutting alone leaves norms below 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def _iterate(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise InputError(f"texts must be a str or an iterable of str, got {type(texts).__name__}")
    return iter(texts)


def _pair(texts: Iterator[str], tasks: Iterator[Task]) -> Iterator[tuple[str, Task]]:
    end = object()
    for i, (text, task) in enumerate(itertools.zip_longest(texts, tasks, fillvalue=end)):
        if text is end or task is end:
            more, fewer = ("tasks", "texts") if text is end else ("texts", "tasks")
            raise InputError(f"task must be one name or one per text, got more {more} than {fewer}: {fewer} end at {i}")
        yield text, task  # type: ignore[misc]


def _blocks(rows: Iterator[tuple[str, Task]]) -> Iterator[list[tuple[str, Task]]]:
    block: list[tuple[str, Task]] = []
    characters = 0
    for row in rows:
        block.append(row)
        characters += len(row[0]) if isinstance(row[0], str) else 0
        if len(block) == _BLOCK_TEXTS or characters > _BLOCK_CHARACTERS:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _check_chunking(chunking: LateChunking | None) -> None:
    if chunking is None or chunking == "sentence" or callable(chunking):
        return
    if isinstance(chunking, int) and not isinstance(chunking, bool) and chunking >= 1:
        return
    if isinstance(chunking, Sequence) and not isinstance(chunking, str):
        return
    raise InputError(
        f"late_chunking must be 'sentence', a number of tokens from 1, spans, or a function, got {chunking!r}"
    )


class _Progress:
    """A bar on stderr, or nothing."""

    def __init__(self, shown: bool, total: int | None) -> None:
        self.shown, self.total = shown, total

    def __enter__(self) -> _Progress:
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("embedding", total=self.total)
        return self

    def advance(self, count: int) -> None:
        if self.shown:
            self._bar.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()
