"""The four ways in which retrieval fails (arXiv 2409.10173, section 4.3), as queries with an answer and 7 negatives.

The paper has F1 to F3 written by a language model. Here they come from what the corpora hold already; ``read_cases``
takes written ones.

F1 overlap    passages that repeat the query's words and answer something else
F2 entities   passages about another bearer of a part of the name
F3 polar      yes-or-no questions, whose negatives contradict or leave open
F4 quality    worse answers to the same question
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyvec.data.negatives import bm25_candidates
from polyvec.data.values import as_number, group_of
from polyvec.errors import InputError
from polyvec.files import Record, read_records

NUM_NEGATIVES = 7
_QUALITY_GAP = 0.3  # a negative is at least so much worse than the answer, on a scale of 0 to 1
_MOST_BEARERS = 50  # a word that more titles share is no name

#: How a language asks whether a statement holds.
POLAR_TEMPLATES = {
    "en": "Is it true that {}?",
    "de": "Stimmt es, dass {}?",
    "fr": "Est-il vrai que {} ?",
    "es": "¿Es cierto que {}?",
    "pt": "É verdade que {}?",
    "it": "È vero che {}?",
    "id": "Apakah benar bahwa {}?",
    "fa": "آیا درست است که {}؟",
}


@dataclass(frozen=True)
class Case:
    """A query, the passage that should come first, and passages that come first by mistake."""

    query: str
    passage: str
    negatives: tuple[str, ...]

    def to_record(self) -> Record:
        return {"query": self.query, "passage": self.passage, "negatives": list(self.negatives)}


def overlap_cases(
    pairs: Sequence[tuple[str, str]], ids_of: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[Case]:
    """F1: of (query, passage) ``pairs``, the passages of others that share most words with the query.

    ``ids_of`` holds the token ids of each pair's two sides. A query with fewer than two such passages gives no case.
    """
    passages = list(dict.fromkeys(passage for _, passage in pairs))
    place = {passage: i for i, passage in enumerate(passages)}
    ids: list[Sequence[int]] = [()] * len(passages)
    for (_, passage), (_, passage_ids) in zip(pairs, ids_of, strict=True):
        ids[place[passage]] = passage_ids
    queries = [query_ids for query_ids, _ in ids_of]
    answers: dict[str, set[str]] = defaultdict(set)
    for query, passage in pairs:
        answers[query].add(passage)
    found = bm25_candidates(queries, ids, depth=4 * NUM_NEGATIVES)
    for (query, passage), query_ids, row in zip(pairs, queries, found, strict=True):
        words = set(query_ids)
        negatives = [
            passages[i]
            for i in row
            if passages[i] not in answers[query] and len(words & set(ids[i])) >= 0.5 * len(words)
        ]
        if len(negatives) >= 2:
            yield Case(query, passage, tuple(negatives[:NUM_NEGATIVES]))


def entity_cases(pairs: Sequence[tuple[str, str]]) -> Iterator[Case]:
    """F2: of (title, passage) ``pairs`` with titles of several words, passages whose titles share a word with it.

    A word counts as part of a name if it is capitalised in the title and few titles have it.
    """
    bearers: dict[str, list[int]] = defaultdict(list)
    for i, (title, _) in enumerate(pairs):
        for word in set(title.split()):
            if word[:1].isupper():
                bearers[word.casefold()].append(i)
    for title, passage in pairs:
        words = {word.casefold() for word in title.split()}
        others = dict.fromkeys(
            j
            for word in sorted(words, key=lambda w: (len(bearers.get(w, ())), w))
            if 1 < len(bearers.get(word, ())) <= _MOST_BEARERS
            for j in bearers[word]
            if pairs[j][0].casefold() != title.casefold() and pairs[j][1] != passage
        )
        if len(words) > 1 and others:
            yield Case(title, passage, tuple(pairs[j][1] for j in list(others)[:NUM_NEGATIVES]))


def polar_cases(rows: Iterable[Record]) -> Iterator[Case]:
    """F3: of premises and hypotheses, a question whether the hypothesis holds, answered by the premise that entails it.

    ``rows`` have ``premise``, ``hypothesis``, ``label`` (entailment, neutral or contradiction) and ``lang``. Negatives
    are the hypotheses that the same premise contradicts or leaves open, and the premise is never among them. Raises
    ``InputError`` for an unknown label; a language without a template asks the bare statement.
    """
    labels = ("entailment", "neutral", "contradiction")
    by_premise: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, start=1):
        if row["label"] not in labels:
            raise InputError(f"example {number}: label must be one of {', '.join(labels)}, got {row['label']!r}")
        by_premise[row["lang"], row["premise"]][row["label"]].append(row["hypothesis"])
    for (lang, premise), hypotheses in by_premise.items():
        negatives = hypotheses["contradiction"] + hypotheses["neutral"]
        if not negatives:
            continue
        for hypothesis in hypotheses["entailment"]:
            statement = hypothesis.strip().rstrip(".。!?")
            if lang in POLAR_TEMPLATES:
                statement = POLAR_TEMPLATES[lang].format(statement[:1].lower() + statement[1:])
            yield Case(statement, premise, tuple(negatives[:NUM_NEGATIVES]))


def quality_cases(rows: Iterable[Record], *, seed: int = 0) -> Iterator[Case]:
    """F4: each rated answer against the nearest of those rated at least 0.3 lower, filled up with answers to other
    questions.

    ``rows`` have ``query``, ``answer`` and ``quality`` between 0 and 1. An answer without a worse one gives no case.
    Raises ``InputError`` for another quality.
    """
    answers: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        answers[row["query"]].append((quality_of(row["quality"], f"example {number}"), row["answer"]))
    everything = [answer for rated in answers.values() for _, answer in rated]
    rng = np.random.default_rng(seed)
    for query, rated in answers.items():
        rated.sort(reverse=True)
        own = {answer for _, answer in rated}
        for best, passage in rated:
            worse = [answer for quality, answer in rated if quality <= best - _QUALITY_GAP and answer != passage]
            if not worse:
                break
            drawn = rng.integers(len(everything), size=4 * NUM_NEGATIVES)
            fill = [everything[i] for i in drawn if everything[i] not in own]
            yield Case(query, passage, tuple(dict.fromkeys(worse + fill))[:NUM_NEGATIVES])


def quality_of(value: Any, where: str) -> float:
    """Return the quality of a row, which a CSV file holds as text. Raises ``InputError`` for what can be none."""
    quality = as_number(value)
    if not 0 <= quality <= 1:
        raise InputError(f"{where}: quality must lie between 0 and 1, got {value!r:.60}")
    return quality


def read_cases(path: Path, langs: Collection[str] = ()) -> list[Case]:
    """Return the cases of a file with columns ``query``, ``passage`` and ``negatives``, a list of 1 to any number;
    with ``langs`` those of these languages, or sources, alone.

    Raises ``InputError`` naming file and row for what is missing, empty, or both answer and negative.
    """
    cases = []
    for number, row in enumerate(read_records(path, column="query"), start=1):
        negatives = row.get("negatives")
        fits = isinstance(negatives, list) and negatives and all(isinstance(n, str) and n for n in negatives)
        if not fits or not isinstance(row.get("passage"), str):
            raise InputError(
                f"{path}: example {number} must have a text 'passage' and a list of texts 'negatives', "
                f"got {row.get('passage')!r:.40} and {negatives!r:.40}"
            )
        assert isinstance(negatives, list)
        if row["passage"] in negatives:
            raise InputError(
                f"{path}: example {number}: 'passage' must not be a negative too, got {row['passage']!r:.40}"
            )
        if not langs or group_of(row) in langs:
            cases.append(Case(row["query"], row["passage"], tuple(negatives)))
    if not cases:
        which = f" of {', '.join(langs)}" if langs else ""
        raise InputError(f"{path} must hold at least one case{which}, got none")
    return cases
