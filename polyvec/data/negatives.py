"""Hard negatives: passages that look like the answer to a query and are not.

Candidates come from two sides, since each misses what the other finds: the nearest passages of an encoder, and BM25
over the pieces of the model's own tokenizer, which needs no word list in any script. What is nearly as near as the
answer is likely an answer too, so it is left out (positive-aware mining, arXiv 2407.15831, section 3).

Shape letters: Q queries, P passages, M width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError

_BLOCK = 256  # queries whose scores to all passages are in memory at one time


def mine_hard_negatives(
    queries: NDArray[np.float32],
    passages: NDArray[np.float32],
    answers: Sequence[int],
    *,
    count: int,
    depth: int = 50,
    margin: float = 0.95,
    lexical: NDArray[np.int64] | None = None,
) -> list[list[int]]:
    """Return for each query up to ``count`` passage numbers, nearest first.

    ``queries`` (Q, M) and ``passages`` (P, M) are unit rows, ``answers`` the Q numbers of the right passages.
    Candidates are the ``depth`` nearest passages and those of ``lexical`` (Q, any), see ``bm25_candidates``; kept are
    those whose cosine is at most ``margin`` times the answer's. A query may get fewer than ``count``, or none.
    Raises ``InputError`` when the numbers of rows disagree or an answer is no passage.
    """
    if len(answers) != len(queries) or (lexical is not None and len(lexical) != len(queries)):
        raise InputError(
            f"answers and lexical must hold one row per query, {len(queries)}, got {len(answers)} and "
            f"{'none' if lexical is None else len(lexical)}"
        )
    if len(answers) and not 0 <= min(answers) <= max(answers) < len(passages):
        raise InputError(f"answers must be passage numbers below {len(passages)}, got {min(answers)} to {max(answers)}")
    depth = min(depth, len(passages))
    mined: list[list[int]] = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK] @ passages.T
        nearest = np.argpartition(-scores, depth - 1, axis=1)[:, :depth]
        for i, row in enumerate(scores):
            answer = answers[start + i]
            candidates = nearest[i] if lexical is None else np.union1d(nearest[i], lexical[start + i])
            kept = candidates[(row[candidates] <= margin * row[answer]) & (candidates != answer)]
            mined.append([int(p) for p in kept[np.argsort(-row[kept], kind="stable")][:count]])
    return mined


def bm25_candidates(
    queries: Sequence[Sequence[int]], passages: Sequence[Sequence[int]], *, depth: int
) -> NDArray[np.int64]:
    """Return (Q, depth) passage numbers, best first, of BM25 over token ids; fewer columns for fewer passages."""
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError.of("BM25", "train") from error
    index = bm25s.BM25()
    index.index([[str(i) for i in ids] for ids in passages], show_progress=False)
    found, _ = index.retrieve(
        [[str(i) for i in ids] for ids in queries], k=min(depth, len(passages)), show_progress=False
    )
    return np.asarray(found, dtype=np.int64)
