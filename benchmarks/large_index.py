"""Time and recall of an index of many passages.

    polyvec embed passages.parquet -o vectors.parquet --task retrieval.passage
    polyvec embed questions.parquet --column query -o questions.parquet --task retrieval.query
    python benchmarks/large_index.py vectors.parquet ... --queries questions.parquet --passages 1000000

Where the files hold fewer vectors than ``--passages``, the rest are theirs, each moved a third of the way to another
one drawn at random. Truth is the exact ten nearest in float32.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from polyvec.files import read_vectors
from polyvec.inference.quantize import unit
from polyvec.search.store import Passage, Store

TOP, BATCH = 10, 20_000


def read(path: str, column: str) -> tuple[NDArray[np.float32], list[str]]:
    vectors, records, _ = read_vectors(Path(path))
    return vectors.astype(np.float32), [record[column] for record in records]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", nargs="+")
    parser.add_argument("--queries", required=True)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--asked", type=int, default=100)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    options = parser.parse_args()
    queries, questions = read(options.queries, "query")
    queries, questions = queries[: options.asked], questions[: options.asked]
    files = [read(path, "text") for path in options.vectors]
    real = np.concatenate([vectors for vectors, _ in files])
    texts = [text for _, own in files for text in own]
    print(f"{min(len(real), options.passages)} vectors of texts, {max(options.passages - len(real), 0)} made of them")
    for dtype in options.dtypes:
        rng = np.random.default_rng(0)
        exact = np.full((len(queries), TOP), -1, np.float32)  # cosines of the nearest so far, and
        truth = np.full((len(queries), TOP), -1)  # their numbers, which passages keep in ``start``
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "db", {"dimensions": real.shape[1], "dtype": dtype})
            written = 0.0
            for first in range(0, options.passages, BATCH):
                count = min(BATCH, options.passages - first)
                own = np.arange(first, first + count) % len(real)
                vectors = real[own]
                if first + count > len(real):
                    moved = unit(2 * vectors + real[rng.integers(0, len(real), count)])
                    vectors = np.where((np.arange(first, first + count) < len(real))[:, None], vectors, moved)
                numbers = np.arange(first, first + count)
                exact = np.concatenate((exact, queries @ vectors.T), axis=1)
                truth = np.concatenate((truth, np.broadcast_to(numbers, (len(queries), count))), axis=1)
                best = np.argpartition(-exact, TOP, axis=1)[:, :TOP]
                exact, truth = np.take_along_axis(exact, best, 1), np.take_along_axis(truth, best, 1)
                passages = [
                    Passage(str(first), int(n), int(n) + 1, texts[i]) for n, i in zip(numbers, own, strict=True)
                ]
                started = time.perf_counter()
                store.write(passages, vectors, {str(first): ""})
                written += time.perf_counter() - started
            started = time.perf_counter()
            store.optimize()
            built = time.perf_counter() - started
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6
            print(f"{dtype}: {len(store)} passages written in {written:.0f} s, indexed in {built:.0f} s, {size:.0f} MB")
            for mode in ("vector", "hybrid"):
                seconds, found = [], []
                for query, question, nearest in zip(queries, questions, truth, strict=True):
                    started = time.perf_counter()
                    hits = store.search(query, question, mode=mode, top=TOP)
                    seconds.append(time.perf_counter() - started)
                    found.append(len({hit.passage.start for hit in hits} & set(nearest.tolist())) / TOP)
                p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000
                recall = f", recall@{TOP} {np.mean(found):.3f}" if mode == "vector" else ""
                print(f"  {mode}: p50 {p50:.1f} ms, p99 {p99:.1f} ms{recall}", flush=True)


if __name__ == "__main__":
    main()
