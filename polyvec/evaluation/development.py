"""The development sets: what a training run is steered by, never trained on and never the final word.

Each score has one number per language, so that a mean cannot hide a language that does not work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyvec.errors import MissingExtraError
from polyvec.evaluation.metrics import Vectors, accuracy_of_centroids, bitext_accuracy, cosine_spearman, ndcg_at_10

#: Texts and a side, ``query`` or ``passage`` where a score has two, to unit vectors.
Encode = Callable[[Sequence[str], str], Vectors]
Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """Rows read of each language or source, from the start of the file. 0 reads all."""

    pairs: int = 0
    queries: int = 0


def similarity(folder: Path, encode: Encode, limits: Limits) -> dict[str, float]:
    """Spearman's correlation of cosines with human grades, per language (STS-B development split)."""
    scores = {}
    for lang, rows in _groups(folder / "stsb_dev.parquet", "lang", limits.pairs).items():
        first, second = (encode([r[side] for r in rows], "query") for side in ("text_a", "text_b"))
        scores[lang] = cosine_spearman(first, second, np.array([r["score"] for r in rows]))
    return scores


def bitext(folder: Path, encode: Encode, limits: Limits) -> dict[str, float]:
    """How often a sentence's nearest English sentence is its translation, per language (TICO-19)."""
    scores = {}
    for lang, rows in _groups(folder / "tico19_bitext.parquet", "lang", limits.pairs).items():
        scores[lang] = bitext_accuracy(
            encode([r["en"] for r in rows], "query"), encode([r["text"] for r in rows], "query")
        )
    return scores


def retrieval(folder: Path, encode: Encode, limits: Limits) -> dict[str, float]:
    """nDCG@10 of questions over the paragraphs of their source, per source."""
    scores = {}
    for source, rows in _groups(folder / "retrieval_qa.parquet", "source", limits.queries).items():
        passages = list(dict.fromkeys(r["passage"] for r in rows))
        place = {passage: i for i, passage in enumerate(passages)}
        answers = np.array([place[r["passage"]] for r in rows])
        queries = encode([r["query"] for r in rows], "query")
        scores[f"{rows[0]['lang']} ({source})"] = ndcg_at_10(queries, encode(passages, "passage"), answers)
    return scores


def classification(folder: Path, encode: Encode, limits: Limits) -> dict[str, float]:
    """Accuracy of nearest class means: validation texts are the means, test texts are classed (CLINC150, English)."""
    rows = _groups(folder / "clinc150.parquet", "split", 0)
    (train, train_labels), (test, test_labels) = (
        (encode([r["text"] for r in rows[split]], "query"), np.array([r["label"] for r in rows[split]]))
        for split in ("val", "test")
    )
    return {"en": accuracy_of_centroids(train, train_labels, test, test_labels)}


def _groups(path: Path, key: str, limit: int) -> dict[str, list[Row]]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError.of("Parquet", "parquet") from error
    groups: dict[str, list[Row]] = {}
    for row in pq.read_table(path).to_pylist():
        group = groups.setdefault(row[key], [])
        if not limit or len(group) < limit:
            group.append(row)
    return groups
