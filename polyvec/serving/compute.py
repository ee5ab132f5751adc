"""Rows through an engine: one pass for many, and failures that stay alone.

Shape letters: D width, C chunks in a text, n tokens of a text.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, PolyvecError
from polyvec.inference.engines import Engine
from polyvec.inference.late_chunking import TokenStates, chunk_means, window_states
from polyvec.inference.passes import TokenRow, run_pass
from polyvec.serving.worker import WorkerLostError
from polyvec.text.chunking import Span
from polyvec.text.tokenizer import Tokens, placed

_log = logging.getLogger(__name__)


class ComputeError(PolyvecError):
    """The model failed on this input and on no other."""


@dataclass(frozen=True)
class Row:
    """One text ready for the engine. The result is (D,), or with ``spans`` (C, D) chunk means; not normalised."""

    tokens: Tokens
    adapter_id: int
    spans: tuple[Span, ...] | None = None
    every_token: bool = False  # the result is then (n, D) token states

    @property
    def needs_states(self) -> bool:
        return self.every_token or self.spans is not None

    def __len__(self) -> int:
        return len(self.tokens)


Outcome: TypeAlias = NDArray[np.float32] | PolyvecError


def compute(engine: Engine, rows: Sequence[Row], *, max_tokens: int, alone: bool = False) -> list[Outcome]:
    """Return a result or an error for each row. A batch that fails is halved until the culprit is alone.

    A row beyond ``max_tokens`` is read in windows, whatever it comes with. Raises ``WorkerLostError`` unless ``alone``
    says that the engine computes nothing else, for only then the death is this batch's.
    """
    try:
        results = _forward(engine, rows, max_tokens)
    except WorkerLostError:
        if not alone:
            raise
        if len(rows) == 1:
            _log.error("the worker died again on a row of %d tokens", len(rows[0]))
            return [_failure()]
    except InputError as error:
        if len(rows) == 1:
            return [error]
    except Exception as error:  # whatever a runtime raises, out-of-memory included, must not end this thread
        if len(rows) == 1:
            _log.error("the model failed on a row of %d tokens: %s %s", len(rows[0]), type(error).__name__, _why(error))
            return [_failure()]
    else:
        return [result if np.isfinite(result).all() else _not_finite() for result in results]
    half = len(rows) // 2
    parts = (rows[:half], rows[half:])
    return [outcome for part in parts for outcome in compute(engine, part, max_tokens=max_tokens, alone=alone)]


class Turns:
    """Callers of one engine: many together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._is_taken = False

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_taken)
            self._is_taken = True
            self._changed.wait_for(lambda: not self._together)
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()


def _failure() -> ComputeError:
    return ComputeError("the model must finish every input, got a failure on this one; send it alone")


def _not_finite() -> ComputeError:
    return ComputeError("the model must give finite numbers, got others; report this input")


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, PolyvecError) else ""  # a runtime's own message may quote a text


def _forward(engine: Engine, rows: Sequence[Row], max_tokens: int) -> list[NDArray[np.float32]]:
    together = iter(_pass(engine, [row for row in rows if len(row) <= max_tokens]))
    return [next(together) if len(row) <= max_tokens else _in_windows(engine, row, max_tokens) for row in rows]


def _pass(engine: Engine, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
    if not rows:
        return []
    needs_states = rows[0].needs_states
    inputs = [TokenRow(row.tokens.input_ids, row.adapter_id) for row in rows]
    outputs = run_pass(engine, inputs, states=needs_states)
    if not needs_states:
        return outputs
    width = engine.config.hidden_size
    return [_reduce(row, [(own, 0)], width) for row, own in zip(rows, outputs, strict=True)]


def _in_windows(engine: Engine, row: Row, max_tokens: int) -> NDArray[np.float32]:
    """Return the chunks of a row beyond the context; only they are so long."""
    states = window_states(engine, placed(row.tokens), row.adapter_id, max_tokens=max_tokens)
    return _reduce(row, list(states), engine.config.hidden_size)


def _reduce(row: Row, parts: list[TokenStates], width: int) -> NDArray[np.float32]:
    if row.spans is None:
        return np.concatenate([states for states, _ in parts])
    return chunk_means(parts, placed(row.tokens), row.spans, width=width)
