"""Suites from files of your own: folders in BEIR's layout, and tables whose columns say what they are.

| columns | kind |
|---|---|
| text_a, text_b, score | sts |
| text_a, text_b, label (0 or 1) | pair-classification |
| text_a, text_b; or en, text | bitext |
| query, passage | retrieval; the corpus is all passages, each once |
| query, positives, negatives (lists) | reranking |
| text, label, split (train or val, test) | classification |
| text, label | clustering |
| query, passage, negatives (a list) | failure-cases, if asked for; ``polyvec train cases`` writes them |

A column ``lang``, else ``source``, parts a table into one suite a value. From tables, and for ``passkey`` from nothing,
are also built the suites of ``long_documents.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from polyvec.data.failure_cases import read_cases
from polyvec.data.values import finite_number, group_of, is_blank
from polyvec.errors import InputError
from polyvec.evaluation.long_documents import DOCUMENTS, articles, needle, passkey
from polyvec.evaluation.suites import TASKS, Labelled, Pairs, Ranking, Suite, check_ranking
from polyvec.files import TABLE_SUFFIXES, Record, column_names, read_records

_COLUMNS = {
    "sts": ("text_a", "text_b", "score"),
    "pair-classification": ("text_a", "text_b", "label"),
    "reranking": ("query", "positives", "negatives"),
    "retrieval": ("query", "passage"),
    "classification": ("text", "label", "split"),
    "clustering": ("text", "label"),
    "bitext": ("text_a", "text_b"),
}
#: Suites of long documents that a table is made into -> its columns.
_LONG = {"needle": ("query", "passage"), "articles": ("title", "text")}


def open_suites(name: str, *, limit: int = 0, langs: Collection[str] = ()) -> list[Suite]:
    """Return the suites called PATH, KIND=PATH, needle=PATH, articles=PATH or passkey; see ``read_suites``.

    ``langs`` keeps those languages or sources alone; none keeps all.
    """
    kind, equals, path = name.partition("=")
    if name == "passkey":
        return passkey(limit or DOCUMENTS)
    if not equals:
        return read_suites(Path(name), limit=limit, langs=langs)
    if kind not in _LONG:
        return read_suites(Path(path), kind=kind, limit=limit, langs=langs)
    columns = _LONG[kind]
    rows = [row for row in read_records(Path(path), column=columns[1]) if not langs or group_of(row) in langs]
    missing = [c for c in columns if any(row.get(c) is None for row in rows[:1])]
    if missing or not rows:
        raise InputError(f"{path} must have rows with {' and '.join(columns)} for {kind}, got none; see --lang too")
    return (needle if kind == "needle" else articles)(rows, Path(path), count=limit or DOCUMENTS)


def read_suites(path: Path, *, kind: str | None = None, limit: int = 0, langs: Collection[str] = ()) -> list[Suite]:
    """Return the suites in a folder of BEIR's layout or a table; ``kind`` where the columns leave a choice.

    ``limit`` keeps the first rows of each language of a table and the first queries of a folder; 0 keeps all. ``langs``
    keeps those languages or sources.
    """
    if kind is not None and kind not in TASKS:
        raise InputError(f"kind must be one of {', '.join(TASKS)}, got {kind!r}")
    if path.is_dir():
        if langs:
            raise InputError(f"{path} must be a table for its languages to be chosen, got a folder; leave --lang out")
        return [read_beir(path, limit=limit)]
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise InputError(f"{path} must be a folder, {', '.join(TABLE_SUFFIXES)}; convert it, or name the folder")
    if kind == "failure-cases":
        return [_failure_cases(path, limit, langs)]
    groups: dict[str, list[Record]] = {}
    chosen = kind
    for number, row in enumerate(read_records(path, column=_first_column(path)), start=1):
        if "en" in row and "text" in row and "label" not in row:
            row = {"text_a": row.pop("en"), "text_b": row.pop("text"), **row}
        chosen = chosen or _kind_of(row, path)
        where = f"{path}: example {number}"
        missing = [c for c in _COLUMNS[chosen] if row.get(c) is None]
        if missing:
            raise InputError(
                f"{where} must have the column {missing[0]!r} for {chosen}, got {', '.join(map(str, row))}"
            )
        row = {**row, **{c: _value(row[c], c, chosen, where) for c in _COLUMNS[chosen]}}
        if not langs or group_of(row) in langs:
            groups.setdefault(group_of(row), []).append(row)
    if chosen is None or not groups:
        which = f" of {', '.join(langs)}" if langs else ""
        raise InputError(f"{path} must hold at least one row{which}, got none")
    if chosen == "classification":  # one group: its splits have languages of their own
        groups = {"": [row for rows in groups.values() for row in rows]}
        limit = 0
    builders: dict[str, Callable[[list[Record], str, Path], Pairs | Ranking | Labelled]] = {
        "retrieval": _retrieval,
        "reranking": _reranking,
        "classification": _classification,
    }
    build = builders.get(chosen, _plain)
    return [
        Suite(chosen, path.stem, build(rows[: limit or None], chosen, path), group, source=str(path))
        for group, rows in groups.items()
    ]


def _failure_cases(path: Path, limit: int, langs: Collection[str]) -> Suite:
    """Rank the answer of each case among its own negatives, as the paper's hand-made examples (section 6.4)."""
    rows = [
        {"query": case.query, "positives": [case.passage], "negatives": list(case.negatives)}
        for case in read_cases(path, langs)[: limit or None]
    ]
    return Suite("failure-cases", path.stem, _reranking(rows, "failure-cases", path), source=str(path))


def _first_column(path: Path) -> str:
    """Return the first known text column of a table's first row: what the reader is to check."""
    names = column_names(path)
    known = [c for c in ("text_a", "query", "en", "text") if c in names]
    if not known:
        raise InputError(
            f"{path} must have columns of a suite, such as text_a and text_b, query and passage, or text and label, "
            f"got {', '.join(names) or 'none'}; rename them"
        )
    return known[0]


def _kind_of(row: Record, path: Path) -> str:
    for kind, columns in _COLUMNS.items():
        if all(row.get(c) is not None for c in columns):
            return kind
    raise InputError(
        f"{path} must have the columns of one kind of suite ({'; '.join(', '.join(c) for c in _COLUMNS.values())}), "
        f"got {', '.join(row)}; rename them"
    )


def _plain(rows: list[Record], kind: str, path: Path) -> Pairs | Labelled:
    if kind == "clustering":
        return Labelled([r["text"] for r in rows], [r["label"] for r in rows])
    values = {"sts": "score", "pair-classification": "label"}.get(kind)
    numbers = [r[values] for r in rows] if values else []
    return Pairs([r["text_a"] for r in rows], [r["text_b"] for r in rows], numbers)


def _value(value: Any, column: str, kind: str, where: str) -> Any:
    """Return the value of a column of a suite's ``kind``: a text, a number, or a list of texts."""
    if column == "score" or (column == "label" and kind == "pair-classification"):
        return finite_number(value, column, where)
    if column == "label":
        if isinstance(value, (list, dict)) or is_blank(value):
            raise InputError(f"{where}: 'label' must be a text or a number, and not blank, got {value!r:.60}")
        return str(value)
    if column in ("positives", "negatives"):
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise InputError(f"{where}: {column!r} must be a list of texts, got {value!r:.60}; one row a query")
        if not value and column == "positives":
            raise InputError(f"{where}: 'positives' must hold at least one text, got none; leave the query out")
        return value
    if not isinstance(value, str):
        raise InputError(f"{where}: {column!r} must be a text, got {type(value).__name__}")
    return value


def _retrieval(rows: list[Record], kind: str, path: Path) -> Ranking:
    passages = {p: f"p{i}" for i, p in enumerate(dict.fromkeys(r["passage"] for r in rows))}
    queries = {q: f"q{i}" for i, q in enumerate(dict.fromkeys(r["query"] for r in rows))}
    qrels: dict[str, dict[str, int]] = {}
    for row in rows:
        qrels.setdefault(queries[row["query"]], {})[passages[row["passage"]]] = 1
    return Ranking({i: q for q, i in queries.items()}, {i: p for p, i in passages.items()}, qrels)


def _reranking(rows: list[Record], kind: str, path: Path) -> Ranking:
    texts = dict.fromkeys(t for r in rows for t in (*r["positives"], *r["negatives"]))
    ids = {text: f"p{i}" for i, text in enumerate(texts)}
    numbered = {f"q{i}": row for i, row in enumerate(rows)}
    return Ranking(
        {q: r["query"] for q, r in numbered.items()},
        {i: text for text, i in ids.items()},
        {q: {ids[t]: 1 for t in r["positives"]} for q, r in numbered.items()},
        {q: list(dict.fromkeys(ids[t] for t in (*r["positives"], *r["negatives"]))) for q, r in numbered.items()},
    )


def _classification(rows: list[Record], kind: str, path: Path) -> Labelled:
    splits = {r["split"] for r in rows}
    learnt = "train" if "train" in splits else "val"
    if not {learnt, "test"} <= splits <= {"train", "val", "test"}:
        raise InputError(
            f"{path}: 'split' must be train, val or test, with test and one of the others, got "
            f"{', '.join(sorted(splits))}; rename them, or drop the rows"
        )
    train, test = ([r for r in rows if r["split"] == s] for s in (learnt, "test"))
    return Labelled(
        [r["text"] for r in test], [r["label"] for r in test],
        [r["text"] for r in train], [r["label"] for r in train],
    )  # fmt: skip


def read_beir(folder: Path, *, split: str = "test", limit: int = 0) -> Suite:
    """Return the retrieval suite of ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``.

    ``limit`` keeps the first queries that are judged, among all passages; 0 keeps all. Title and text of a passage are
    joined by a blank, as MTEB does. Raises ``InputError`` for a file that is missing, an id that comes twice, and
    judgements of ids that no text has.
    """
    corpus, queries = (_texts_by_id(folder / f"{name}.jsonl") for name in ("corpus", "queries"))
    path = folder / "qrels" / f"{split}.tsv"
    qrels: dict[str, dict[str, int]] = {}
    for number, row in enumerate(read_records(path, column="query-id"), start=1):
        where = f"{path}: example {number}"
        if not row.get("corpus-id") or row.get("score") is None:
            raise InputError(
                f"{where} must have the columns query-id, corpus-id, score, got {', '.join(map(str, row))}"
            )
        grade = finite_number(row["score"], "score", where)
        if grade != int(grade):
            raise InputError(f"{where}: 'score' must be a whole number, got {row['score']!r}; scale the grades")
        qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(grade)
    if limit:
        left_out = set([q for q in queries if q in qrels][limit:])
        qrels = {q: grades for q, grades in qrels.items() if q not in left_out}
    data = Ranking({q: t for q, t in queries.items() if q in qrels} or queries, corpus, qrels)
    try:
        check_ranking(data)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    return Suite("retrieval", folder.resolve().name, data, source=str(folder))


def _texts_by_id(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, row in enumerate(read_records(path, column="text"), start=1):
        key = str(row.get("_id", row.get("id", "")))
        if not key:
            raise InputError(f"{path}:{number} must have the column '_id', got {', '.join(row)}")
        if key in texts:
            raise InputError(f"{path}:{number} must have an id of its own, got {key!r} again; remove one of the rows")
        texts[key] = f"{row.get('title') or ''} {row['text']}".strip()
    return texts


def data_hash(suite: Suite) -> str:
    """Return 16 hex digits of everything in a suite that decides a score, its name left out."""
    content = json.dumps([suite.kind, asdict(suite.data)], ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
