"""Near-duplicates among many rows: comparisons, time and what is found, beside all comparisons for a sample.

    polyvec embed texts.parquet -o vectors.parquet --task text-matching
    python benchmarks/matching.py vectors.parquet --rows 1000000 --threshold 0.9

Where the file holds fewer vectors than ``--rows``, the rest are its own, each moved a third of the way to another one
drawn at random. A thousandth of all rows then get a twin that is ``--threshold`` or a little nearer. ``found`` is over
2,000 rows that the blocking did not learn from, each compared with every row.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from common import where
from numpy.typing import NDArray

from polyvec.apps.cells import block_pairs, blocked_pairs
from polyvec.apps.match import near_pairs
from polyvec.files import read_vectors
from polyvec.inference.quantize import unit

CHECKED = 2000


def many(real: NDArray[np.float32], count: int, threshold: float) -> NDArray[np.float32]:
    """Return ``count`` unit rows, the last thousandth of them twins of earlier ones."""
    rng = np.random.default_rng(0)
    twins = count // 1000
    rows = real[: count - twins]
    while len(rows) < count - twins:
        own = real[: count - twins - len(rows)]
        rows = np.concatenate((rows, unit(2 * own + real[rng.integers(0, len(real), len(own))])))
    of = rows[rng.choice(len(rows), twins, replace=False)]
    noise = rng.normal(size=of.shape).astype(np.float32)
    noise = unit(noise - (noise * of).sum(axis=1, keepdims=True) * of)
    cosine = rng.uniform(threshold, (1 + threshold) / 2, size=(twins, 1)).astype(np.float32)
    return np.concatenate((rows, cosine * of + np.sqrt(1 - cosine**2) * noise))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--recall", type=float, default=0.995)
    options = parser.parse_args()
    real = read_vectors(options.vectors)[0].astype(np.float32)
    print(where("numpy"))
    print(f"{len(real)} vectors of texts, threshold {options.threshold}\n")
    print("| rows | cells visited | comparisons of all | found, sample | found, other rows | pairs | time of exact |")
    print("|---|---|---|---|---|---|---|")
    for count in options.rows:
        rows = many(real, count, options.threshold)
        started = time.perf_counter()
        blocking = block_pairs(rows, None, threshold=options.threshold, recall=options.recall)
        found = {(i, j) for _, i, j in blocked_pairs(rows, None, blocking, threshold=options.threshold)}
        blocked = time.perf_counter() - started
        checked = np.random.default_rng(1).choice(count, CHECKED, replace=False)
        started = time.perf_counter()
        known = [(int(checked[i]), j) for _, i, j in near_pairs(rows[checked], rows, threshold=options.threshold)]
        exact = (time.perf_counter() - started) * count / CHECKED / 2  # a pair is met once where all rows meet all
        pairs = [(min(pair), max(pair)) for pair in known if pair[0] != pair[1]]
        share = np.mean([pair in found for pair in pairs]) if pairs else float("nan")
        print(
            f"| {count:,} | {blocking.visits.shape[1]} | {blocking.comparisons / count**2:.2%} | {blocking.recall:.1%} "
            f"| {share:.1%} of {len(pairs)} | {len(found):,} | {blocked / exact:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
