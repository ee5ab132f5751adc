"""Recall and nDCG of an index on a development set of questions: vector, full text and hybrid, late chunking or not.

    python benchmarks/retrieval.py retrieval_qa.parquet

The file has the columns query, passage, lang and source; the corpus of a source is all its passages. Chunked: each
passage is cut as ``polyvec index`` cuts it and is as good as its best chunk; naive chunks are embedded alone.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from polyvec import Embedder
from polyvec.search.store import Passage, Store
from polyvec.text.chunking import passage_spans

TOP = 10


def report(name: str, ranks: list[int | None]) -> None:
    """Print recall at 1 and 10 and nDCG at 10, with the half-width of a 95 % interval of the last."""
    gains = np.array([1 / np.log2(rank + 2) if rank is not None else 0 for rank in ranks])
    half = 1.96 * gains.std() / np.sqrt(len(gains))
    first = np.mean([rank == 0 for rank in ranks])
    found = np.mean([rank is not None for rank in ranks])
    print(f"| {name} | {len(ranks)} | {first:.3f} | {found:.3f} | {gains.mean():.3f} ± {half:.3f} |", flush=True)


def rank_of(passage: str, found: list[str]) -> int | None:
    return found.index(passage) if passage in found else None


def chunk_ranks(queries: np.ndarray, chunks: np.ndarray, owner: np.ndarray, answers: list[int]) -> list[int | None]:
    """Return the rank of each answer among passages, where a passage scores as its best chunk."""
    ranks = []
    starts = np.searchsorted(owner, np.arange(owner[-1] + 1))
    for query, answer in zip(queries, answers, strict=True):
        best = np.maximum.reduceat(chunks @ query, starts)
        rank = int((best > best[answer]).sum())
        ranks.append(rank if rank < TOP else None)
    return ranks


def main() -> None:
    embedder = Embedder()
    rows = pq.read_table(sys.argv[1]).to_pylist()
    print("| | questions | recall@1 | recall@10 | nDCG@10 |\n|---|---|---|---|---|")
    for source in sorted({row["source"] for row in rows}):
        own = [row for row in rows if row["source"] == source]
        corpus = list(dict.fromkeys(row["passage"] for row in own))
        vectors = embedder.encode(corpus, task="retrieval.passage")
        queries = embedder.encode([row["query"] for row in own], task="retrieval.query")
        with tempfile.TemporaryDirectory() as folder:
            width = vectors.shape[1]
            store = Store(Path(folder) / "db", {"dimensions": width})
            store.write([Passage(source, 0, len(text), text) for text in corpus], vectors, {source: ""})
            store.optimize()
            for mode in ("vector", "text", "hybrid"):
                ranks = []
                for row, query in zip(own, queries, strict=True):
                    hits = store.search(query, row["query"], mode=mode, top=TOP)
                    ranks.append(rank_of(row["passage"], [hit.passage.text for hit in hits]))
                report(f"{source}, {own[0]['lang']}, {mode}", ranks)
        spans = [passage_spans(text) for text in corpus]
        owner = np.repeat(np.arange(len(corpus)), [len(own_spans) for own_spans in spans])
        late = embedder.encode(corpus, task="retrieval.passage", late_chunking=passage_spans)
        texts = [text[a:b] for text, own_spans in zip(corpus, spans, strict=True) for a, b in own_spans]
        answers = [corpus.index(row["passage"]) for row in own]
        for name, chunks in (
            ("late chunks", np.concatenate([c.vectors for c in late])),
            ("naive chunks", embedder.encode(texts, task="retrieval.passage")),
        ):
            report(f"{source}, {own[0]['lang']}, {name}", chunk_ranks(queries, chunks, owner, answers))


if __name__ == "__main__":
    main()
