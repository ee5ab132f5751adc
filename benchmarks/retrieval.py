"""Recall and nDCG of an index on a development set: vector, full text and hybrid at several weights.

    python benchmarks/retrieval.py retrieval_qa.parquet            questions in the language of the passages
    python benchmarks/retrieval.py tico19_bitext.parquet           sentences that ask for their English translation

The file has the columns query, passage, lang and source, or en, text and lang; the corpus of a source is its passages.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from polyvec import Embedder
from polyvec.search.store import Passage, Store

TOP = 10
WAYS = {
    "vector": {"mode": "vector"},
    "text": {"mode": "text"},
    **{f"hybrid {weight}": {"mode": "hybrid", "weight": weight} for weight in (0.3, 0.5, 0.7)},
}


def report(name: str, ranks: list[int | None]) -> None:
    """Print recall at 1 and 10 and nDCG at 10, with the half-width of a 95 % interval of the last."""
    gains = np.array([1 / np.log2(rank + 2) if rank is not None else 0 for rank in ranks])
    half = 1.96 * gains.std() / np.sqrt(len(gains))
    first = np.mean([rank == 0 for rank in ranks])
    found = np.mean([rank is not None for rank in ranks])
    print(f"| {name} | {len(ranks)} | {first:.3f} | {found:.3f} | {gains.mean():.3f} ± {half:.3f} |", flush=True)


def rank_of(passage: str, found: list[str]) -> int | None:
    return found.index(passage) if passage in found else None


def rows_of(path: str) -> list[dict[str, str]]:
    rows = pq.read_table(path).to_pylist()
    if "en" in rows[0]:
        rows = [
            {"query": r["text"], "passage": r["en"], "lang": f"{r['lang']} to en", "source": r["lang"]} for r in rows
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=0, help="First rows of each source, which are its corpus too.")
    parser.add_argument("--sources", nargs="*", help="These alone.")
    options = parser.parse_args()
    embedder = Embedder()
    rows = rows_of(options.data)
    print("| | questions | recall@1 | recall@10 | nDCG@10 |\n|---|---|---|---|---|")
    for source in options.sources or sorted({row["source"] for row in rows}):
        own = [row for row in rows if row["source"] == source][: options.limit or None]
        corpus = list(dict.fromkeys(row["passage"] for row in own))
        vectors = embedder.encode(corpus, task="retrieval.passage")
        queries = embedder.encode([row["query"] for row in own], task="retrieval.query")
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "db", {"dimensions": vectors.shape[1]})
            store.write([Passage(source, 0, len(text), text) for text in corpus], vectors, {source: ""})
            store.optimize()
            for name, way in WAYS.items():
                ranks = []
                for row, query in zip(own, queries, strict=True):
                    hits = store.search(query, row["query"], top=TOP, **way)
                    ranks.append(rank_of(row["passage"], [hit.passage.text for hit in hits]))
                report(f"{source}, {own[0]['lang']}, {name}", ranks)


if __name__ == "__main__":
    main()
