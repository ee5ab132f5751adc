"""Time and recall of an index of many passages: python benchmarks/large_index.py --passages 1000000

The vectors are synthetic: 64 directions of falling weight and noise in 384 dimensions. Truth is the exact ten nearest.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyvec.inference.quantize import unit
from polyvec.search.store import Passage, Store

WIDTH, DIRECTIONS, TOP, BATCH = 384, 64, 10, 20_000
WORDS = np.array("red blue train cat router house tree river bread water stone cloud paper music light".split())
BASIS = np.random.default_rng(0).normal(size=(DIRECTIONS, WIDTH)).astype(np.float32)


def draw(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    weights = rng.normal(size=(count, DIRECTIONS)) * np.geomspace(1, 0.1, DIRECTIONS)
    return unit(weights.astype(np.float32) @ BASIS + 0.3 * rng.normal(size=(count, WIDTH)).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    queries = draw(np.random.default_rng(2), options.queries)
    exact = np.full((options.queries, TOP), -1, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "db", {"dimensions": WIDTH})
        written = 0.0
        for first in range(0, options.passages, BATCH):
            vectors = draw(rng, BATCH)
            exact = np.sort(np.concatenate((exact, queries @ vectors.T), axis=1), axis=1)[:, -TOP:]
            passages = [Passage(str(first), 0, 1, " ".join(words)) for words in WORDS[rng.integers(0, 15, (BATCH, 12))]]
            started = time.perf_counter()
            store.write(passages, vectors, {str(first): ""})
            written += time.perf_counter() - started
        started = time.perf_counter()
        store.optimize()
        print(f"{len(store)} passages: written in {written:.0f} s, indexed in {time.perf_counter() - started:.0f} s")
        for mode in ("vector", "hybrid"):
            seconds, found = [], []
            for query, nearest in zip(queries, exact, strict=True):
                started = time.perf_counter()
                hits = store.search(query, "train router", mode=mode, top=TOP)
                seconds.append(time.perf_counter() - started)
                if mode == "vector":
                    found.append(np.mean([hit.score >= nearest[0] - 1e-5 for hit in hits]))
            p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000
            recall = f", recall@{TOP} {np.mean(found):.3f}" if found else ""
            print(f"{mode}: p50 {p50:.1f} ms, p99 {p99:.1f} ms{recall}")


if __name__ == "__main__":
    main()
