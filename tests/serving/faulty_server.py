"""``polyvec serve`` with faults in it, told by the input: run as a file, so that the worker process has them too."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import OnnxEngine
from polyvec.text.tokenizer import Tokenizer

VOCABULARY = 512  # of the tests' model; in a larger one the ids below are as far from its end
TOO_LARGE, RAISES, NOT_A_NUMBER, DIES = 507, 508, 509, 510  # token ids of rare pieces, sent as such
QUOTE = "the input was: secret"  # as a runtime may quote it in an exception
FITTING_ROWS = 2  # beside a token that needs much memory
BAD_TEXT = "this text breaks the tokenizer"
BAD_WIDTH = 13  # breaks what comes after the model
HEAD_SECONDS, BODY_SECONDS = 1.0, 1.5  # unless passes are slow on purpose: 64 threads of a client may take a second
PASS_SECONDS = float(os.environ.get("FAULTY_PASS_SECONDS", "0"))

_pool, _tokens_batch = OnnxEngine.pool, Tokenizer.tokens_batch


def pool(self: OnnxEngine, batch: Batch) -> NDArray[np.float32]:
    time.sleep(PASS_SECONDS)
    ids = batch.input_ids - (self.config.vocab_size - VOCABULARY)
    if DIES in ids:
        os._exit(1)
    if TOO_LARGE in ids and len(batch.lengths) > FITTING_ROWS:
        raise MemoryError(QUOTE)
    if RAISES in ids:
        raise RuntimeError(QUOTE)
    vectors = _pool(self, batch)
    rows = np.split(ids, batch.cu_seqlens[1:-1])
    vectors[[NOT_A_NUMBER in row for row in rows]] = np.nan
    return vectors


def tokens_batch(self: Tokenizer, texts: list[str], *arguments: Any) -> Any:
    if BAD_TEXT in texts:
        raise RuntimeError(QUOTE)
    return _tokens_batch(self, texts, *arguments)


if __name__ in ("__main__", "__mp_main__"):  # the server and its worker, not the tests that read the names above
    OnnxEngine.pool, Tokenizer.tokens_batch = pool, tokens_batch  # type: ignore[method-assign, assignment]

if __name__ == "__main__":
    from polyvec.cli import app
    from polyvec.serving import guard, protocol, service

    unit = service.unit

    def break_one_width(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        if vectors.shape[1] == BAD_WIDTH:
            raise RuntimeError(QUOTE)
        return unit(vectors)

    service.unit = break_one_width  # type: ignore[attr-defined]
    if not PASS_SECONDS:
        protocol.HEAD_SECONDS, guard._READ_SECONDS = HEAD_SECONDS, BODY_SECONDS
    app()
