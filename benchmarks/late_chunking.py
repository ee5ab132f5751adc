"""Late against naive chunks on development questions, and whether "it" finds its city.

    python benchmarks/late_chunking.py retrieval_qa.parquet --limit 120

Every paragraph is cut as polyvec index cuts it and scores as its best chunk. Late chunks are read with their paragraph,
or with a document of four paragraphs that stand one after the other in the file.
"""

from __future__ import annotations

import argparse

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from polyvec import Embedder
from polyvec.text.chunking import Span, passage_spans, sentence_spans

TOGETHER = 4  # paragraphs of a document
CAPITALS = (
    "Berlin Germany, Madrid Spain, Vienna Austria, Lisbon Portugal, Warsaw Poland, Oslo Norway, Athens Greece, "
    "Cairo Egypt, Lima Peru, Tokyo Japan, Ottawa Canada, Canberra Australia"
)
#: A question and which of a capital's three sentences answers it.
QUESTIONS = (
    ("How many people live in {}?", 1),
    ("Wie viele Menschen leben in {}?", 1),
    ("How many terminals has the airport of {}?", 2),
    ("Wie viele Terminals hat der Flughafen von {}?", 2),
)


def ndcg_at_10(queries: NDArray, chunks: NDArray, owner: NDArray, answers: list[int]) -> float:
    """Return the mean nDCG@10, in %, of the one right paragraph, where ``owner`` maps chunks to paragraphs in order."""
    starts = np.searchsorted(owner, np.arange(owner[-1] + 1))
    gains = []
    for query, answer in zip(queries, answers, strict=True):
        best = np.maximum.reduceat(chunks @ query, starts)
        rank = int((best > best[answer]).sum())
        gains.append(1 / np.log2(rank + 2) if rank < 10 else 0.0)
    return 100 * float(np.mean(gains))


def late_chunks(embedder: Embedder, paragraphs: list[str], together: int) -> NDArray:
    """Return the vectors of the paragraphs' passages, each read with the paragraphs of its document."""
    texts, spans = [], {}
    for first in range(0, len(paragraphs), together):
        own: list[Span] = []
        text = ""
        for paragraph in paragraphs[first : first + together]:
            own += [(len(text) + start, len(text) + end) for start, end in passage_spans(paragraph)]
            text += paragraph + "\n\n"
        texts.append(text)
        spans[text] = own
    return np.concatenate(
        [c.vectors for c in embedder.encode(texts, task="retrieval.passage", late_chunking=spans.__getitem__)]
    )


def capitals(embedder: Embedder) -> tuple[int, int, int]:
    """Return of how many questions the right capital's sentence is the nearest: questions, naive, late."""
    names = [pair.split()[0] for pair in CAPITALS.split(", ")]
    texts = [
        f"{city} is the capital of {country}. The city is home to {i + 2}.5 million people. "
        f"Its airport has {i % 4 + 1} terminals."
        for i, (city, country) in enumerate(pair.split() for pair in CAPITALS.split(", "))
    ]
    late = [c.vectors for c in embedder.encode(texts, task="retrieval.passage", late_chunking="sentence")]
    sentences = [[text[a:b] for a, b in sentence_spans(text)] for text in texts]
    naive = [embedder.encode(own, task="retrieval.passage") for own in sentences]
    right = []
    for question, number in QUESTIONS:
        queries = embedder.encode([question.format(name) for name in names], task="retrieval.query")
        for chunks in (naive, late):
            nearest = (queries @ np.stack(chunks)[:, number].T).argmax(axis=1)
            right.append(int((nearest == np.arange(len(names))).sum()))
    return len(QUESTIONS) * len(names), sum(right[::2]), sum(right[1::2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=120, help="First rows of each source.")
    options = parser.parse_args()
    embedder = Embedder()
    rows = pq.read_table(options.data).to_pylist()
    print("| source | naive | late, paragraphs | late, documents |\n|---|---|---|---|")
    table = []
    for source in sorted({row["source"] for row in rows}):
        own = [row for row in rows if row["source"] == source][: options.limit]
        paragraphs = list(dict.fromkeys(row["passage"] for row in own))
        spans = [passage_spans(text) for text in paragraphs]
        owner = np.repeat(np.arange(len(paragraphs)), [len(s) for s in spans])
        texts = [text[a:b] for text, own_spans in zip(paragraphs, spans, strict=True) for a, b in own_spans]
        queries = embedder.encode([row["query"] for row in own], task="retrieval.query")
        answers = [paragraphs.index(row["passage"]) for row in own]
        ways = (
            embedder.encode(texts, task="retrieval.passage"),
            late_chunks(embedder, paragraphs, 1),
            late_chunks(embedder, paragraphs, TOGETHER),
        )
        table.append([ndcg_at_10(queries, chunks, owner, answers) for chunks in ways])
        print(f"| {source}, {own[0]['lang']} | {' | '.join(f'{score:.1f}' for score in table[-1])} |", flush=True)
    print(f"| mean | {' | '.join(f'{score:.1f}' for score in np.mean(table, axis=0))} |")
    questions, naive, late = capitals(embedder)
    print(f"\nThe right capital's sentence is the nearest of its kind: naive {naive}, late {late} of {questions}.")


if __name__ == "__main__":
    main()
