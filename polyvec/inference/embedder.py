"""Texts to embeddings: the object that most users need.

Shape letters: B texts, N packed tokens, D hidden width, M kept width, C chunks in a text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from polyvec.atomic import write_json
from polyvec.errors import (
    InputError,
    NotFiniteError,
    TextTooLargeError,
    TruncationWarning,
    UntrainedDimensionWarning,
)
from polyvec.inference.blocks import ahead, blocks
from polyvec.inference.engines import Engine
from polyvec.inference.engines.opening import ENGINES, open_engine
from polyvec.inference.late_chunking import (
    LateChunking,
    TokenStates,
    check_chunking,
    chunk_means,
    chunk_spans,
    is_whole,
    window_states,
)
from polyvec.inference.passes import Outputs, Passes, RowTooLargeError, TokenRow
from polyvec.inference.quantize import calibrate, check_output_type, quantize, unit
from polyvec.model.config import ModelConfig
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import read_config, read_json, weight_files
from polyvec.tasks import Task, resolve_task
from polyvec.text.chunking import Span
from polyvec.text.tokenizer import Tokenizer, Tokens, placed

_RANGES_FILE = "int8_ranges.json"
#: Of the configuration, what changes vectors and no shape of a tensor.
_NUMBERS = ("num_attention_heads", "layer_norm_eps", "rope_theta", "lora_alpha", "max_position_embeddings")
#: Of the configuration, what an engine that was opened elsewhere must share; evaluation changes rope_theta on purpose.
_SHARED = ("vocab_size", "hidden_size", "tasks", "max_position_embeddings")


@dataclass(frozen=True, eq=False)
class Embedding:
    """One text's result. ``vector`` (M,), or None when chunked; ``chunks`` (C, ...) when chunked.

    ``num_tokens`` counts what the model read, ``<s>``, prompt and ``</s>`` included; ``cut_characters`` the rest.
    """

    vector: NDArray[Any] | None
    task: str | None
    num_tokens: int
    cut_characters: int
    chunks: Chunks | None = None


@dataclass(frozen=True, eq=False)
class Chunks:
    """A late-chunked text: ``spans`` C pairs of characters, ``vectors`` (C, M)."""

    spans: list[Span]
    vectors: NDArray[Any]

    def __len__(self) -> int:
        return len(self.spans)


@dataclass(frozen=True)
class _Row:
    """One text on its way through sort, batch and restore; ``number`` is its place among the caller's texts."""

    number: int
    text: str
    task: Task
    tokens: Tokens


@dataclass(frozen=True)
class _Options:
    """What a call of ``encode_stream`` asks for, checked."""

    width: int
    dtype: str
    batch_tokens: int | None
    chunking: LateChunking | None
    truncate: bool
    tokens: Sequence[Tokens] | None


class Embedder:
    """A model ready to embed.

    ``model`` is None for polyvec-mini, which is inside the package, a folder, or a hub name. ``engine`` is ``onnx``,
    ``onnx-int8``, ``torch``, ``torch-float8`` (on GPUs that multiply 8-bit floats, refused where it moves the vectors),
    or ``auto``: ONNX where the folder holds a graph and no other ``device`` is asked for, and of its two graphs the one
    that a short run finds faster on this machine; or an open ``Engine`` of this model.
    ``threads`` bounds the CPU threads of the engine; torch has one number for the whole process, which stays.
    Many threads may call it at a time. Pickled, it says what it was opened with, and another process opens it anew.
    Raises ``WeightsError`` for a model that does not load whole.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        engine: str | Engine = "auto",
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self._open_again = partial(type(self), model, engine=engine, device=device, threads=threads)
        self.folder = resolve_model_folder(model)
        self.model_name = str(model or "polyvec-mini")
        self.config = read_config(self.folder)
        self.tokenizer = Tokenizer.from_file(self.folder / "tokenizer.json", **self.config.tokenizer_ids)
        self._ranges = self._read_ranges()
        self._passes = Passes()
        if isinstance(engine, str):
            engine = open_engine(self.folder, self.config, engine, device=device, threads=threads)
        elif not isinstance(getattr(engine, "config", None), ModelConfig):
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, or an open engine, got {engine!r}")
        else:
            _check_same_model(self.folder, self.config, engine.config)
        self.engine = engine

    def __repr__(self) -> str:
        return f"<Embedder of {self.model_name}: {self.config.hidden_size} dimensions, engine {self.engine.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled is what it was opened with: another process opens the model anew."""
        return self._open_again, ()

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

    @property
    def int8_ranges(self) -> Mapping[int, float]:
        """Width to the magnitude that int8 maps to 127; empty before ``calibrate``."""
        return self._ranges

    @overload
    def encode(
        self,
        texts: str | Iterable[str],
        *,
        task: str | None | Iterable[str | None] = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        batch_tokens: int | None = None,
        late_chunking: None = None,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
    ) -> NDArray[Any]: ...

    @overload
    def encode(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        task: str | None | Iterable[str | None] = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        batch_tokens: int | None = None,
        late_chunking: LateChunking,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
    ) -> Chunks: ...

    @overload
    def encode(
        self,
        texts: Iterable[str],
        *,
        task: str | None | Iterable[str | None] = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        batch_tokens: int | None = None,
        late_chunking: LateChunking,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
    ) -> list[Chunks]: ...

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        task: str | None | Iterable[str | None] = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        batch_tokens: int | None = None,
        late_chunking: LateChunking | None = None,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
    ) -> Any:
        """Return unit vectors: (M,) for one text, (B, M) for many, in the order of ``texts``.

        ``task`` selects adapter and prompt together, for all texts or one by one; None is the base model without a
        prompt. ``prompt`` replaces the task's own prompt. ``dimensions`` keeps the first components, then rescales.
        ``dtype`` is float32, float16, int8, binary or ubinary. ``batch_tokens`` bounds the tokens of one pass; None is
        what the engine runs fastest. With ``late_chunking`` the result is ``Chunks``, or a
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
        batch_tokens: int | None = None,
        late_chunking: LateChunking | None = None,
        truncate: bool = True,
        prompt: str | None = None,
        progress: bool = False,
        tokens: Sequence[Tokens] | None = None,
    ) -> Iterator[Embedding]:
        """Yield one ``Embedding`` per text, in order, in memory that does not grow with their number.

        The options are those of ``encode``. Every option is checked before the first text is read. ``tokens`` are what
        this model's tokenizer made of the texts elsewhere, each with its prompt and cut as here; ``late_chunking``
        needs ``Encoding``, which knows the places in the text.
        """
        width = self._check_width(dimensions)
        check_output_type(dtype, width, self._ranges)
        if batch_tokens is not None and not (is_whole(batch_tokens) and batch_tokens >= 1):
            raise InputError(f"batch_tokens must be a whole number from 1, got {batch_tokens!r}")
        check_chunking(late_chunking)
        source = _iterate(texts)
        if isinstance(task, str) or not isinstance(task, Iterable):
            rows: Iterator[tuple[str, Task]] = zip(
                source, itertools.repeat(resolve_task(task, self.config.prompts, prompt=prompt)), strict=False
            )
        else:
            rows = _pair(source, (resolve_task(name, self.config.prompts, prompt=prompt) for name in task))
        total = len(texts) if isinstance(texts, Sequence) else None
        options = _Options(width, dtype, batch_tokens, late_chunking, truncate, tokens)
        return self._stream(rows, options, _Progress(progress, total))

    def convert(
        self, vectors: NDArray[np.float32], *, dimensions: int | None = None, dtype: str = "float32"
    ) -> NDArray[Any]:
        """Return full-width float32 vectors (B, D) of this model as ``encode`` gives them at a width and dtype.

        Raises ``InputError`` for vectors of another shape or of whole numbers.
        """
        width = self._check_width(dimensions)
        size = self.config.hidden_size
        if not np.issubdtype(vectors.dtype, np.floating) or vectors.ndim != 2 or vectors.shape[1] != size:
            raise InputError(
                f"vectors must be rows of {size} floats, got {vectors.dtype} {vectors.shape}; "
                "pass what encode gives for a list of texts without dimensions and dtype"
            )
        check_output_type(dtype, width, self._ranges)
        return quantize(unit(vectors[:, :width]), dtype, self._ranges)

    def fingerprint(
        self,
        *,
        task: str | None = None,
        dimensions: int | None = None,
        dtype: str = "float32",
        prompt: str | None = None,
    ) -> str:
        """Return 16 hex digits of what makes a vector: weights, tokenizer, task, prompt, pooling, width, dtype, and of
        int8 its range. Raises ``InputError`` for what ``encode`` would not take."""
        resolved = resolve_task(task, self.config.prompts, prompt=prompt)
        width = self._check_width(dimensions)
        check_output_type(dtype, width, self._ranges)
        parts: list[Any] = [self.weights_hash, resolved.name, resolved.prompt, "mean", width, dtype]
        if dtype == "int8":
            parts.append(self._ranges[width])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @cached_property
    def weights_hash(self) -> str:
        """16 hex digits of everything in the folder that decides a vector, whatever its task: the weights, what the
        configuration says beside their shapes, and the tokenizer."""
        digest = hashlib.sha256(json.dumps([float(getattr(self.config, name)) for name in _NUMBERS]).encode())
        for path in [*weight_files(self.folder), self.folder / "tokenizer.json"]:
            digest.update(str(path.relative_to(self.folder)).encode())
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]

    def calibrate(self, texts: Iterable[str]) -> dict[int, float]:
        """Measure the int8 ranges of every trained width on ``texts``, keep them, and write them beside the weights.

        Raises ``InputError`` for no texts, and for a model that has ranges: vectors of other ranges do not compare.
        """
        if self._ranges:
            raise InputError(
                f"int8 ranges must be measured once, got a model with {self.folder / _RANGES_FILE}; to measure anew "
                "remove it from a copy of the folder, for int8 vectors of other ranges do not compare"
            )
        vectors = [e.vector for e in self.encode_stream(texts) if e.vector is not None]
        if not vectors:
            raise InputError("texts must be at least one to calibrate on, got none; pass some like yours")
        ranges = calibrate(np.stack(vectors), self.dimensions)
        write_json({str(d): r for d, r in ranges.items()}, self.folder / _RANGES_FILE)
        self._ranges = ranges
        return dict(ranges)

    def _stream(self, texts: Iterator[tuple[str, Task]], options: _Options, progress: _Progress) -> Iterator[Embedding]:
        numbered = 0
        num_cut = 0

        def tell() -> None:
            if num_cut:
                _warn(
                    f"{num_cut} of {numbered} texts were longer than {self.max_tokens} tokens and lost their tails; "
                    "use late_chunking to read all of them, or truncate=False to make this an error",
                    TruncationWarning,
                )

        try:
            with progress:
                for rows in self._tokenised(texts, options):
                    numbered += len(rows)
                    num_cut += sum(row.tokens.truncated for row in rows)
                    yield from self._embed_block(rows, options, progress)
        except GeneratorExit:  # nobody asks on: zip stops at the end of its first side
            tell()
            raise
        tell()

    def _tokenised(self, texts: Iterator[tuple[str, Task]], options: _Options) -> Iterator[list[_Row]]:
        """Yield the rows of block after block. Beside a device the next block's are made while it computes this one's;
        on the same cores that would gain nothing."""
        beside = self.engine.leaves_host
        found = blocks(texts, device_tokens=self.engine.batch_tokens if beside else 0)
        calls = (partial(self._tokenise, block, first, options) for first, block in found)
        yield from ahead(calls) if beside else (call() for call in calls)

    def _tokenise(self, block: list[tuple[str, Task]], first: int, options: _Options) -> list[_Row]:
        for i, (text, _) in enumerate(block, start=first):
            if not isinstance(text, str):
                raise InputError(f"texts[{i}] must be a str, got {type(text).__name__}; convert or drop it first")
        tokens = None if options.tokens is None else options.tokens[first : first + len(block)]
        if tokens is not None and len(tokens) < len(block):
            raise InputError(f"tokens must be those of every text, got {first + len(tokens)}, and more texts")
        if tokens is None:
            inputs = [text for text, _ in block], [task.prompt for _, task in block]
            if options.chunking is None:
                tokens = self.tokenizer.tokens_batch(*inputs, self.max_tokens)
            else:
                tokens = self.tokenizer.encode_batch(*inputs)
        elif options.chunking is not None:
            tokens = [placed(own) for own in tokens]
        for i, ((text, task), own) in enumerate(zip(block, tokens, strict=True), start=first):
            if own.truncated and not options.truncate:
                total = self.tokenizer.count_tokens(text, task.prompt)
                raise InputError(
                    f"texts[{i}] must be at most {self.max_tokens} tokens with its prompt, got {total}; "
                    "shorten it, use late_chunking, or allow truncate=True"
                )
        numbers = itertools.count(first)
        return [_Row(next(numbers), text, task, own) for (text, task), own in zip(block, tokens, strict=True)]

    def _embed_block(self, rows: list[_Row], options: _Options, progress: _Progress) -> Iterator[Embedding]:
        lengths = [len(row.tokens) for row in rows]
        results: list[Embedding | None] = [None] * len(rows)
        short = [i for i, length in enumerate(lengths) if length <= self.max_tokens]
        for plan, outputs in self._run([rows[i] for i in short], options):
            indices = [short[i] for i in plan]
            if options.chunking is not None:
                for i, own in zip(indices, outputs, strict=True):
                    results[i] = self._chunk(rows[i], [(own, 0)], options)
            else:
                vectors = np.stack(outputs)
                _check_finite(vectors, [rows[i].number for i in indices])
                for i, vector in zip(indices, self._finish(vectors, options), strict=True):
                    e = rows[i].tokens
                    results[i] = Embedding(vector, rows[i].task.name, len(e), e.cut_characters)
            progress.advance(len(indices))
        for i, length in enumerate(lengths):
            if length > self.max_tokens:  # only late chunking lets a text be this long
                states_of_windows = window_states(
                    self.engine, placed(rows[i].tokens), rows[i].task.adapter_id, max_tokens=self.max_tokens
                )
                try:
                    results[i] = self._chunk(rows[i], states_of_windows, options)
                except MemoryError as error:
                    raise _too_large(rows[i]) from error
                progress.advance(1)
        for result in results:
            assert result is not None
            yield result

    def _run(self, rows: Sequence[_Row], options: _Options) -> Iterator[tuple[list[int], Outputs]]:
        """Yield indices into ``rows`` with each one's mean (D,), or its token states (n, D), pass by pass."""
        inputs = [TokenRow(row.tokens.input_ids, row.task.adapter_id) for row in rows]
        try:
            yield from self._passes.run(
                self.engine, inputs, batch_tokens=options.batch_tokens, states=options.chunking is not None
            )
        except RowTooLargeError as error:
            raise _too_large(rows[error.index]) from error

    def _chunk(self, row: _Row, parts: Iterable[TokenStates], options: _Options) -> Embedding:
        assert options.chunking is not None
        encoding = placed(row.tokens)
        try:
            spans = chunk_spans(options.chunking, row.text, encoding)
            means = chunk_means(parts, encoding, spans, width=self.config.hidden_size)
        except InputError as error:
            raise InputError(f"texts[{row.number}] must be one that can be chunked, got: {error}") from error
        _check_finite(means, [row.number] * len(means))
        return Embedding(None, row.task.name, len(row.tokens), 0, Chunks(spans, self._finish(means, options)))

    def _finish(self, vectors: NDArray[np.float32], options: _Options) -> NDArray[Any]:
        return quantize(unit(vectors[:, : options.width]), options.dtype, self._ranges)

    def _check_width(self, dimensions: int | None) -> int:
        largest = self.config.hidden_size
        if dimensions is None:
            return largest
        if not is_whole(dimensions) or not 1 <= dimensions <= largest:
            raise InputError(
                f"dimensions must be a whole number between 1 and {largest}, got {dimensions!r}; "
                f"trained widths are {', '.join(map(str, self.dimensions))}"
            )
        if dimensions not in self.dimensions:
            _warn(
                f"dimensions {dimensions} is not a trained width; these are {', '.join(map(str, self.dimensions))}",
                UntrainedDimensionWarning,
            )
        return int(dimensions)

    def _read_ranges(self) -> dict[int, float]:
        path = self.folder / _RANGES_FILE
        return {int(d): float(r) for d, r in read_json(path).items()} if path.exists() else {}


def _too_large(row: _Row) -> TextTooLargeError:
    return TextTooLargeError(
        f"texts[{row.number}] must fit into memory, got {len(row.tokens)} tokens that do not; "
        "free memory, cut the text, or use a smaller model"
    )


def _warn(message: str, category: type[Warning]) -> None:
    """Warn of the line of the program that called polyvec. Python shows a warning once a line: at a line of ours, the
    second text that is cut would be lost in silence."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "polyvec":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _check_same_model(folder: Path, config: ModelConfig, found: ModelConfig) -> None:
    for name in _SHARED:
        if getattr(config, name) != getattr(found, name):
            raise InputError(
                f"engine must be of the model in {folder}, of {name} {getattr(config, name)}, "
                f"got {getattr(found, name)}; pass the engine's own folder as model"
            )


def _check_finite(vectors: NDArray[np.float32], numbers: Sequence[int]) -> None:
    """Raise ``NotFiniteError`` for the first of vectors (B, D) that is not finite; ``numbers`` are those of texts."""
    for number, good in zip(numbers, np.atleast_1d(np.isfinite(vectors).all(axis=1)), strict=True):
        if not good:
            raise NotFiniteError(
                f"texts[{number}] must have finite numbers, got NaN or infinity from the model; "
                "check its weights, or use engine='onnx' or float32"
            )


def _iterate(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise InputError(f"texts must be a str or an iterable of str, got {type(texts).__name__}")
    # What would be read without complaint: a mapping's keys, a data frame's names of columns, a set in any order.
    if isinstance(texts, (Mapping, set, frozenset)) or getattr(texts, "ndim", 1) != 1:
        raise InputError(
            f"texts must be in one order and one dimension, got {type(texts).__name__}; pass a list, or one column"
        )
    return iter(texts)


def _pair(texts: Iterator[str], tasks: Iterator[Task]) -> Iterator[tuple[str, Task]]:
    end = object()
    for i, (text, task) in enumerate(itertools.zip_longest(texts, tasks, fillvalue=end)):
        if text is end or task is end:
            more, fewer = ("tasks", "texts") if text is end else ("texts", "tasks")
            raise InputError(f"task must be one name or one per text, got more {more} than {fewer}: {fewer} end at {i}")
        yield text, task  # type: ignore[misc]


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
