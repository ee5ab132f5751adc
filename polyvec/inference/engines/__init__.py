"""What an engine is: packed token rows with a task id each go in, pooled vectors or token states come out.

Everything around it (tokenise, sort, batch, window, pool spans, truncate, normalise, quantise) is shared and numpy.
Shape letters: B texts, N packed tokens, D width.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from polyvec.inference.batching import Batch
from polyvec.model.config import ModelConfig


class Engine(Protocol):
    """Runs one model.

    ``name`` tells users what computes their vectors, such as ``onnx-int8`` or ``torch-float32``; ``batch_tokens`` is
    the number of tokens in a pass at which the engine is fastest. Both passes raise ``MemoryError`` for a batch that
    does not fit; the engine goes on working with smaller ones.

    Where ``lanes`` is above 1, ``lane`` is the same model on one core, which that many threads may call at a time:
    passes side by side never wait for one another, so many texts take less time, and few texts more. It is opened when
    first asked for; ``lane_tokens`` is its ``batch_tokens``, known before.

    ``own_pass_tokens`` is the number of tokens of one adapter from which on a pass of its own is cheaper than a share
    of a mixed one, or None where mixed passes cost no more. ``pads`` says that a pass computes every text to the length
    of the longest, ``leaves_host`` that a device computes, beside which the host has time for other work.
    """

    config: ModelConfig
    name: str
    batch_tokens: int
    lanes: int
    lane_tokens: int
    own_pass_tokens: int | None
    pads: bool
    leaves_host: bool

    @property
    def lane(self) -> Engine: ...

    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors, neither truncated nor normalised."""
        ...

    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens."""
        ...
