"""Test data and the protocol that scores a model on it: MTEB's, one plain function a kind.

A suite is data of one kind; ``score`` runs it. The model is a function from texts and a task's name to unit vectors, so
that adapter and prompt are chosen here, by the kind, and by no caller.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError
from polyvec.evaluation import metrics
from polyvec.evaluation.intervals import STATISTICS, Observations
from polyvec.evaluation.metrics import Vectors

#: Texts and the task they are embedded for -> unit vectors (B, M).
Encode = Callable[[Sequence[str], str], Vectors]
#: The same -> several unit vectors (C, M) of each text.
Chunks = Callable[[Sequence[str], str], list[Vectors]]

#: Kind -> tasks of its first and second side (Sturua et al. 2024, section 5.2; bitext as in MTEB's model card).
TASKS = {
    "sts": ("text-matching", "text-matching"),
    "bitext": ("text-matching", "text-matching"),
    "retrieval": ("retrieval.query", "retrieval.passage"),
    "reranking": ("separation", "separation"),
    "clustering": ("separation", "separation"),
    "classification": ("classification", "classification"),
    "pair-classification": ("classification", "classification"),
    "failure-cases": ("retrieval.query", "retrieval.passage"),
}
_SEED = 42  # MTEB's
_EXPERIMENTS = 10
_PER_LABEL = 8
_CLUSTERED = 16_384  # texts drawn for one clustering
_DEPTH = 1000  # ranks kept of each query
_RESCORED = 400  # nearest by few bits, then by the query in float32: four times as many as the deepest recall
_BLOCK = 256  # queries scored at once: a block of scores over a million passages is a gigabyte


@dataclass(frozen=True)
class Pairs:
    """Texts side by side; ``values`` are grades (sts), 0 or 1 (pair classification), or none (bitext)."""

    first: list[str]
    second: list[str]
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ranking:
    """Texts by id, ``qrels`` query -> passage -> grade, and for reranking ``candidates`` query -> passages."""

    queries: dict[str, str]
    corpus: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class Labelled:
    """Texts with labels; classification learns from the ``train`` ones, clustering has none."""

    texts: list[str]
    labels: list[str]
    train_texts: list[str] = field(default_factory=list)
    train_labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Suite:
    """Data of one kind of ``TASKS``, under a name; ``group`` is a language or source within it.

    ``num_tokens`` is the length of its texts where the length is what is varied, else 0; ``source`` the file or folder
    that it was read from.
    """

    kind: str
    name: str
    data: Pairs | Ranking | Labelled
    group: str = ""
    num_tokens: int = 0
    source: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.group}".strip()


@dataclass(frozen=True)
class Score:
    """The main score, what it is called, the observations (n, columns) it is a statistic of, and further metrics."""

    metric: str
    statistic: str
    observations: Observations
    others: dict[str, float] = field(default_factory=dict)

    @property
    def value(self) -> float:
        return STATISTICS[self.statistic](self.observations)


def score(
    suite: Suite,
    encode: Encode,
    *,
    tasks: tuple[str, str] | None = None,
    chunks: Chunks | None = None,
    exact: Encode | None = None,
    clusterings: int = _EXPERIMENTS,
) -> Score:
    """Return the score of a model on a suite. ``tasks`` replaces the kind's own, as ArguAna wants text-matching twice;
    ``clusterings`` is how often texts are clustered, MTEB's ten times.

    For rankings, ``chunks`` gives several vectors of a passage, whose nearest counts, and ``exact`` the queries whose
    products with the nearest passages decide among them. Raises ``InputError`` for data that the kind cannot score and
    for vectors that are not finite.
    """
    if suite.kind not in TASKS:
        raise InputError(f"kind must be one of {', '.join(TASKS)}, got {suite.kind!r}")
    checked = _checked(encode, suite.label)
    first, second = tasks or TASKS[suite.kind]
    data = suite.data
    if isinstance(data, Pairs):
        if not data.first:
            raise InputError(f"{suite.label} must hold at least one pair, got none; check the file")
        run = {"sts": sts, "bitext": bitext, "pair-classification": pair_classification}[suite.kind]
        return run(data, checked(data.first, first), checked(data.second, second))
    if isinstance(data, Ranking):
        check_ranking(data)
        texts = [data.queries[q] for q in judged(data)]
        queries = checked(texts, first)
        owners = np.arange(len(data.corpus))
        if chunks is None:
            passages = checked(list(data.corpus.values()), second)
        else:
            parts = chunks(list(data.corpus.values()), second)
            owners = np.repeat(owners, [len(part) for part in parts])
            passages = np.concatenate(parts)
            _check_finite(passages, [list(data.corpus.values())[i] for i in owners], suite.label)
        precise = None if exact is None else exact(texts, first)
        return score_ranking(data, rank(data, queries, passages, owners, precise))
    if not data.texts:
        raise InputError(f"{suite.label} must hold at least one text, got none; check the file")
    if suite.kind == "clustering":
        return clustering(checked(data.texts, first), data.labels, clusterings)
    if not data.train_texts:
        raise InputError(f"{suite.label} must hold texts to learn from, got no split 'train' or 'val'; add them")
    return classification(checked(data.train_texts, first), data.train_labels, checked(data.texts, first), data.labels)


def _checked(encode: Encode, label: str) -> Encode:
    def run(texts: Sequence[str], task: str) -> Vectors:
        vectors = np.asarray(encode(texts, task), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise InputError(f"a model must give one vector a text, got shape {vectors.shape} for {len(texts)} texts")
        _check_finite(vectors, texts, label)
        return vectors

    return run


def _check_finite(vectors: Vectors, texts: Sequence[str], label: str) -> None:
    broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(broken):
        raise InputError(
            f"vectors must be finite, got {len(broken)} of {len(texts)} with NaN or infinity in {label}, the first "
            f"of the text {texts[broken[0]][:60]!r}; leave this model or dtype out"
        )


def sts(data: Pairs, first: Vectors, second: Vectors) -> Score:
    """Return Spearman's correlation of cosines with grades. Vectors (B, M) twice."""
    if len(set(data.values)) < 2:
        raise InputError(f"grades must differ to be correlated, got {len(set(data.values))} value; add pairs")
    return Score("cosine_spearman", "spearman", np.stack([metrics.cosines(first, second), data.values], axis=1))


def pair_classification(data: Pairs, first: Vectors, second: Vectors) -> Score:
    """Return the average precision of cosines for label 1. Vectors (B, M) twice."""
    wrong = sorted(set(data.values) - {0.0, 1.0})
    if wrong:
        raise InputError(f"labels of pairs must be 0 or 1, got {wrong[0]:g}; name graded pairs 'score'")
    if len(set(data.values)) < 2:
        raise InputError(f"labels of pairs must be of both kinds, 0 and 1, got {data.values[0]:g} alone; add pairs")
    observations = np.stack([metrics.cosines(first, second), data.values], axis=1)
    return Score("cosine_ap", "average_precision", observations)


def bitext(data: Pairs, first: Vectors, second: Vectors) -> Score:
    """Return the F1 of the nearest second text of each first one. Vectors (B, M) twice."""
    blocks = [(first[i : i + _BLOCK] @ second.T).argmax(axis=1) for i in range(0, len(first), _BLOCK)]
    nearest, own = np.concatenate(blocks), np.arange(len(first))
    observations = np.stack([nearest, own], axis=1).astype(np.float64)
    return Score("f1", "weighted_f1", observations, {"accuracy": metrics.accuracy(nearest, own)})


def classification(train: Vectors, train_labels: Sequence[str], test: Vectors, test_labels: Sequence[str]) -> Score:
    """Return the mean accuracy of ten logistic regressions, each on eight texts a label (MTEB's draws, seed 42).

    An observation is a test text: how many of the ten got it right. Vectors (train, M) and (test, M).
    """
    linear_model = _sklearn("linear_model")
    if len(set(train_labels)) < 2:
        raise InputError(f"classification must learn at least two labels, got {train_labels[0]!r} alone; add texts")
    true, learnt = np.asarray(test_labels), np.asarray(train_labels)
    right = np.zeros(len(test))
    for chosen in undersamples(train_labels):
        model = linear_model.LogisticRegression(max_iter=100, random_state=_SEED)
        right += model.fit(train[chosen], learnt[chosen]).predict(test) == true
    return Score("accuracy", "mean", (right / _EXPERIMENTS)[:, None])


def undersamples(labels: Sequence[str]) -> list[list[int]]:
    """Return the rows of each experiment. As in MTEB, each shuffles the order of the one before."""
    order = list(range(len(labels)))
    samples = []
    for _ in range(_EXPERIMENTS):
        np.random.RandomState(_SEED).shuffle(order)
        counts: dict[str, int] = {}
        sample = []
        for i in order:
            if counts.setdefault(labels[i], 0) < _PER_LABEL:
                counts[labels[i]] += 1
                sample.append(i)
        samples.append(sample)
    return samples


def clustering(vectors: Vectors, labels: Sequence[str], clusterings: int = _EXPERIMENTS) -> Score:
    """Return the mean v-measure of mini-batch k-means, each on 16,384 texts drawn with replacement (MTEB's).

    An observation is one clustering. Vectors (B, M).
    """
    cluster = _sklearn("cluster")
    true = np.asarray(labels)
    if len(set(labels)) < 2:
        raise InputError("clustering needs at least two labels, got one; check the label column")
    kmeans = cluster.MiniBatchKMeans(
        n_clusters=len(set(labels)), batch_size=512, init="k-means++", n_init=1, random_state=_SEED
    )
    draws = random.Random(_SEED)
    values = []
    for _ in range(clusterings):
        chosen = draws.choices(range(len(labels)), k=_CLUSTERED)
        values.append(metrics.v_measure(true[chosen], kmeans.fit_predict(vectors[chosen])))
    return Score("v_measure", "mean", np.array(values)[:, None])


def judged(data: Ranking) -> list[str]:
    """Return the ids of the queries that count, in order."""
    return [q for q in data.queries if q in data.qrels]


def rank(
    data: Ranking, queries: Vectors, passages: Vectors, owners: NDArray[Any], exact: Vectors | None = None
) -> list[list[str]]:
    """Return for each judged query the ids of passages, nearest first.

    ``queries`` (Q, M), ``passages`` (C, M) rows of which each belongs to the passage numbered in ``owners`` (C,), in
    order. ``exact`` (Q, M) queries rank the nearest again.
    """
    ids = np.asarray(list(data.corpus), dtype=object)
    place = {p: i for i, p in enumerate(ids)}
    wholes = np.array_equal(owners, np.arange(len(ids)))
    names = judged(data)
    rankings = []
    for start in range(0, len(queries), _BLOCK):
        block = queries[start : start + _BLOCK] @ passages.T
        for i, products in enumerate(block, start=start):
            scores = products if wholes else _nearest_part(products, owners, len(ids))
            if data.candidates is None:
                found = _top(scores, _DEPTH)
            else:
                found = np.array([place[p] for p in data.candidates[names[i]]])
            if exact is not None:
                found = found[_top(scores[found], _RESCORED)]
                scores = passages @ exact[i]
            rankings.append(_best_first(scores[found], list(ids[found])))
    return rankings


def _nearest_part(products: Vectors, owners: NDArray[Any], count: int) -> Vectors:
    scores = np.full(count, -1.0, products.dtype)  # a passage without parts comes last
    np.maximum.at(scores, owners, products)
    return scores


def _top(scores: Vectors, count: int) -> NDArray[np.int64]:
    kept = min(count, len(scores))
    return np.argpartition(-scores, kept - 1)[:kept]


def score_ranking(data: Ranking, rankings: Sequence[Sequence[str]]) -> Score:
    """Return the score of passages ranked for each judged query: nDCG@10, or MAP where there are candidates."""
    names = ("ndcg_at_10", "map", "mrr_at_10", "recall_at_10", "recall_at_100")
    rows: dict[str, list[float]] = {name: [] for name in names}
    for query, ranking in zip(judged(data), rankings, strict=True):
        grades = data.qrels[query]
        gains = np.array([grades.get(p, 0) for p in ranking], float)
        relevant = sum(grade > 0 for grade in grades.values())
        rows["ndcg_at_10"].append(metrics.ndcg(gains, np.array(list(grades.values())), 10))
        rows["map"].append(metrics.average_precision_of_ranks(gains, relevant, _DEPTH))
        rows["mrr_at_10"].append(metrics.reciprocal_rank(gains, 10))
        rows["recall_at_10"].append(metrics.recall(gains, relevant, 10))
        rows["recall_at_100"].append(metrics.recall(gains, relevant, 100))
    main = "ndcg_at_10" if data.candidates is None else "map"
    others = {name: float(np.mean(values)) for name, values in rows.items() if name != main}
    return Score(main, "mean", np.array(rows[main])[:, None], others)


def _best_first(scores: Vectors, ids: list[str]) -> list[str]:
    """Return ids by score, equal scores by descending id: trec_eval's rule, which no model can game."""
    return [p for _, p in sorted(zip(scores.tolist(), ids, strict=True), reverse=True)][:_DEPTH]


def check_ranking(data: Ranking) -> None:
    """Raise ``InputError`` for an empty corpus, no judged query, or ids that no text has."""
    for what, texts in (("corpus", data.corpus), ("queries", data.queries)):
        if not texts:
            raise InputError(f"{what} must hold at least one text, got none; check the file")
    judgements: Mapping[str, Mapping[str, int] | Sequence[str]]
    for what, judgements in (("qrels", data.qrels), ("candidates", data.candidates or {})):
        unknown = [q for q in judgements if q not in data.queries]
        unknown += [p for passages in judgements.values() for p in passages if p not in data.corpus]
        if unknown:
            raise InputError(
                f"{what} must name ids of queries and corpus, got {len(unknown)} unknown, the first {unknown[0]!r}; "
                "check that the files belong together"
            )
    if not any(q in data.qrels for q in data.queries):
        raise InputError("qrels must judge at least one query, got none; check the file")
    missing = [q for q in data.qrels if data.candidates is not None and q not in data.candidates]
    if missing:
        raise InputError(f"candidates must hold passages of every judged query, got none for {missing[0]!r}; add them")


def _sklearn(module: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise MissingExtraError.of("classification and clustering", "evaluate") from error
