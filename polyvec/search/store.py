"""Vectors and texts in, the nearest out: one LanceDB table on disk, or behind a URL of object storage.

A source (a file) is written whole in one commit, so a reader, or a run after a crash, sees all of it or none.
Shape letters: B passages, M kept width.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError
from polyvec.files import as_text
from polyvec.search import parts

Result = TypeVar("Result")

MODES = ("hybrid", "vector", "text")

#: Share of meaning in a hybrid score, the rest is of words: half, chosen without a look at the questions that it was
#: then measured on: above reciprocal ranks or level on each of seven sets (benchmarks/results/2026-11-25-hybrid.md).
WEIGHT = 0.5
_FUSED = 50  # passages of each list, at least, that a hybrid search compares

_TABLE = "passages"
_STAMP_KEY = b"polyvec"
_EXACT_ROWS = 50_000  # below, comparing with every head takes a few milliseconds and misses nothing
_PARTITION_ROWS = 1000
_PROBED = 128  # partitions whose bits are compared, and
_CANDIDATES = 320  # passages, nearest by their bits or heads, whose whole vectors then decide
_REFINED = 4  # times as many heads that are compared, where vectors are in parts, as there are candidates
_ATTEMPTS = 5  # a thread that updates the store meanwhile moves rows to other ids, those of a search to none
_KEPT_VERSIONS = timedelta(hours=1)  # a search that is running still finds the files of its version
_TRIES = 20  # of a commit that others come before, with pauses of up to
_PAUSE_SECONDS = 0.2
_RACES = ("commit conflict", "Incompatible transaction", f"'{_TABLE}' already exists", f"'{_TABLE}' was not found")
_FIELDS = ("source", "digest", "line", "page", "heading", "start", "end", "text", "metadata")


@dataclass(frozen=True)
class Passage:
    """A part of a source: characters ``start`` to ``end`` of the text that was read from it, from ``line`` on.

    In a table ``line`` is the number of the row, whose text the characters are of. ``page`` counts from 1 and is None
    where the format has none; ``metadata`` holds the other columns of the row.
    """

    source: str
    start: int
    end: int
    text: str
    line: int = 1
    page: int | None = None
    heading: str | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Hit:
    """A passage with its score: the cosine (``vector``), BM25 (``text``), or both between 0 and 1 (``hybrid``)."""

    score: float
    passage: Passage


def _told(method: Callable[..., Result]) -> Callable[..., Result]:
    """Make of LanceDB's errors one sentence, and do again what a commit of another process came before.

    ``method`` of a store must be one that may run twice.
    """

    @wraps(method)
    def run(store: Store, *args: Any, **options: Any) -> Result:
        tries_left = _TRIES
        while True:
            try:
                return method(store, *args, **options)
            except InputError:
                raise
            except (RuntimeError, ValueError) as error:
                is_race = any(words in str(error) for words in _RACES)
                if isinstance(error, ValueError) and not is_race:
                    raise
                tries_left -= 1
                if not (is_race and tries_left):
                    cause = re.sub(r", /\S+:\d+:\d+$", "", str(error))  # without the line of LanceDB's source
                    raise InputError(
                        f"database {store.location} must be whole, readable and writable, got: {cause}; if files of it "
                        "are damaged or gone, index into a new database"
                    ) from error
            time.sleep(random.uniform(0, _PAUSE_SECONDS))  # two that wait as long would meet again
            if store._table is not None:
                store._table.checkout_latest()

    return run


class Store:
    """A folder or URL of passages, all of one model; ``stamp`` says which, and stays. Many may write to it.

    Where there is none, an empty store is made with the ``stamp`` that is given; without one, it is an ``InputError``.
    A stamp says at least the ``dimensions`` of a vector; ``dtype`` is how it is stored (``parts.py``).
    """

    _table: Any = None

    def __init__(self, location: str | Path, stamp: Mapping[str, Any] | None = None) -> None:
        self.location = str(location)
        try:
            import lancedb
        except ImportError as error:
            raise MissingExtraError.of("an index", "search") from error
        if stamp is None and "://" not in self.location and not Path(self.location).is_dir():
            raise _no_store(self.location)
        if "://" not in self.location and Path(self.location).is_file():
            raise InputError(f"database must be a folder or a URL, got the file {self.location}; choose another name")
        self._open(lancedb.connect(self.location), stamp)
        self._schema = _schema(self.stamp)
        if self._table.schema.names != self._schema.names:
            raise InputError(
                f"database {self.location} must have the columns of this version of polyvec, got others; "
                "index into a new database"
            )
        self._index_text()

    @_told
    def _open(self, database: Any, stamp: Mapping[str, Any] | None) -> None:
        if _TABLE in database.list_tables().tables:
            self._table = database.open_table(_TABLE)
        elif stamp is not None:
            self._table = database.create_table(_TABLE, schema=_schema(stamp))
        else:
            raise _no_store(self.location)
        self.stamp: dict[str, Any] = json.loads((self._table.schema.metadata or {}).get(_STAMP_KEY, b"{}"))

    @_told
    def __len__(self) -> int:
        """Number of passages."""
        return int(self._table.count_rows())

    @property
    def dimensions(self) -> int:
        """Width of a vector."""
        return int(self.stamp["dimensions"])

    @property
    def dtype(self) -> str:
        """How a vector is stored."""
        return str(self.stamp.get("dtype", "float32"))

    def check_stamp(self, stamp: Mapping[str, Any]) -> None:
        """Raise ``InputError`` unless ``stamp`` is the store's own: vectors of two models never meet."""
        if self.stamp.get("fingerprint") != stamp.get("fingerprint"):
            own, given = (tuple(s.get(key) for key in ("model", "dimensions")) for s in (self.stamp, stamp))
            other = f"use --model {own[0]} with {own[1]} dimensions, or " if own != given else ""
            raise InputError(
                f"database {self.location} must meet the model that made it, {_named(self.stamp)}, "
                f"got {_named(stamp)}; {other}index into a new database"
            )
        if self.dtype != stamp.get("dtype", "float32"):
            raise InputError(
                f"database {self.location} must keep its dtype, {self.dtype}, got {stamp['dtype']}; "
                "leave --dtype out, or index into a new database"
            )

    @_told
    def sources(self) -> dict[str, str]:
        """Return the digest of each source."""
        rows = self._table.search().where("ordinal = 0").select(["source", "digest"]).limit(None).to_arrow()
        return dict(zip(rows["source"].to_pylist(), rows["digest"].to_pylist(), strict=True))

    @_told
    def write(self, passages: Sequence[Passage], vectors: NDArray[np.float32], digests: Mapping[str, str]) -> None:
        """Make ``passages`` with their ``vectors`` (B, M) all that the store holds of the sources in ``digests``.

        One commit, whatever the number of sources.
        """
        import pyarrow as pa

        ordinals: list[int] = []
        counts = dict.fromkeys(digests, 0)
        for passage in passages:
            ordinals.append(counts[passage.source])
            counts[passage.source] += 1
        columns = {
            **{name: [getattr(p, name) for p in passages] for name in _FIELDS if name not in ("digest", "metadata")},
            "digest": [digests[p.source] for p in passages],
            "metadata": [[f"{key}={value}" for key, value in (p.metadata or {}).items()] for p in passages],
            "ordinal": ordinals,
            **parts.split(vectors, self.dtype),
        }
        table = pa.table({name: columns[name] for name in self._schema.names}, schema=self._schema)
        (
            self._table.merge_insert(["source", "ordinal"])
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(_one_of("source", digests))
            .execute(table)
        )

    @_told
    def remove(self, sources: Collection[str]) -> None:
        """Forget ``sources``."""
        if sources:
            self._table.delete(_one_of("source", sources))

    @_told
    def move(self, old: str, new: str) -> None:
        """Give a source another name; its vectors stay."""
        self._table.update(where=_one_of("source", [old]), values={"source": new})

    @_told
    def optimize(self) -> None:
        """Take new passages into the indexes, and drop versions that no search reads any longer.

        From 50 000 passages on, heads get an approximate index: one bit a component (RaBitQ, arXiv 2405.12497).
        """
        from lancedb.index import IvfRq

        if len(self) >= _EXACT_ROWS and not self._has_index("head"):
            config = IvfRq(distance_type="cosine", target_partition_size=_PARTITION_ROWS)
            self._table.create_index("head", config=config)
        self._table.optimize(cleanup_older_than=_KEPT_VERSIONS)

    @_told
    def search(
        self,
        vector: NDArray[np.float32] | None,
        text: str,
        *,
        mode: str = "hybrid",
        top: int = 10,
        where: Mapping[str, str | int] | None = None,
        weight: float = WEIGHT,
    ) -> list[Hit]:
        """Return the ``top`` passages, best first, for a unit ``vector`` (M,) and the ``text`` of a question.

        ``vector`` ranks by cosine, ``text`` by BM25. ``hybrid`` adds both, scaled to lie between 0 and 1 among the best
        of their list, ``weight`` parts of meaning to 1 - ``weight`` of words (convex combination; Bruch et al., arXiv
        2210.11934). ``where`` keeps passages whose ``source``, ``page``, ``heading`` or metadata has a value; ``*`` in
        the value of a source or heading stands for anything.
        """
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if top < 1:
            raise InputError(f"top must be at least 1, got {top}")
        if not 0 <= weight <= 1:
            raise InputError(f"weight must be between 0, words alone, and 1, meaning alone, got {weight}")
        condition = _condition(where) if where else None
        for _ in range(_ATTEMPTS):
            scores = self._scores(vector, text, mode, top, condition, weight)
            hits = self._hits(scores)
            if len(hits) == len(scores):
                break
        return hits

    def _scores(
        self, vector: NDArray[np.float32] | None, text: str, mode: str, top: int, condition: str | None, weight: float
    ) -> dict[int, float]:
        """Return the ids of the ``top`` rows with their scores, best first."""
        if mode == "text":
            return self._matching(text, top, condition)
        assert vector is not None
        if mode == "vector":
            return self._nearest(vector, top, condition)
        limit = max(_FUSED, top)
        nearest, matching = self._nearest(vector, limit, condition), self._matching(text, limit, condition)
        # The least cosine of the list stands for every passage that is not in it; the least of BM25 is 0.
        least = min(nearest.values(), default=0.0)
        fused: dict[int, float] = {}
        for scores, share, low in ((nearest, weight, least), (matching, 1 - weight, 0.0)):
            span = max(scores.values(), default=low) - low
            for row, score in scores.items():
                fused[row] = fused.get(row, 0.0) + share * ((score - low) / span if span > 0 else 1.0)
        best = sorted(fused, key=lambda row: (-fused[row], row))[:top]
        return {row: fused[row] for row in best}

    def _nearest(self, vector: NDArray[np.float32], limit: int, condition: str | None) -> dict[int, float]:
        """Return the ids of the nearest rows with their cosines, best first."""
        width = parts.head_width(self.dimensions, self.dtype)
        query: Any = self._table.search(vector[:width], vector_column_name="head", query_type="vector")
        query = query.distance_type("cosine").nprobes(_PROBED)
        if width == self.dimensions:
            query = query.refine_factor(max(2, _CANDIDATES // limit)).limit(limit)
            found = _only(query, [], "_distance", condition)
            return dict(zip(found["_rowid"].to_pylist(), (1 - found["_distance"].to_numpy()).tolist(), strict=True))
        query = query.refine_factor(_REFINED).limit(max(_CANDIDATES, limit))
        found = _only(query, parts.part_names(self.dimensions, self.dtype), "_distance", condition)
        scores = parts.cosines(vector, found, self.dtype)
        best = np.argsort(-scores, kind="stable")[:limit]
        return dict(zip(found["_rowid"].to_numpy()[best].tolist(), scores[best].tolist(), strict=True))

    def _matching(self, text: str, limit: int, condition: str | None) -> dict[int, float]:
        """Return the ids of the rows with the highest BM25, best first."""
        query = self._table.search(text, query_type="fts", fts_columns="text").limit(limit)
        found = _only(query, [], "_score", condition)
        return dict(zip(found["_rowid"].to_pylist(), found["_score"].to_pylist(), strict=True))

    def _hits(self, scores: Mapping[int, float]) -> list[Hit]:
        """Return the passages of rows, in the order of ``scores``, without those deleted or moved meanwhile."""
        columns = [name for name in _FIELDS if name != "digest"]
        rows = self._table.take_row_ids(list(scores)).select(columns).with_row_id().to_list() if scores else []
        passages = {row["_rowid"]: row for row in rows}
        return [_hit(passages[row], score) for row, score in scores.items() if row in passages]

    def _has_index(self, column: str) -> bool:
        return any(index.columns == [column] for index in self._table.list_indices())

    @_told
    def _index_text(self) -> None:
        from lancedb.index import FTS

        if self._has_index("text"):  # it has none after a crash between the two commits that make a store
            return
        # ICU finds words in every script; stemming and stop words would be those of one language. Long words stay:
        # hashes and names of code are what words are searched for.
        words = FTS(base_tokenizer="icu/split", stem=False, remove_stop_words=False, max_token_length=None)
        self._table.create_index("text", config=words)


def _schema(stamp: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    # What tells rows apart: of two that write one source at once, the second then waits for the first and replaces it.
    key = {"nullable": False, "metadata": {"lance-schema:unenforced-primary-key": "true"}}
    fields = [
        pa.field("source", pa.string(), **key),
        pa.field("ordinal", pa.int32(), **key),
        pa.field("digest", pa.string()),
        pa.field("line", pa.int64()),
        pa.field("page", pa.int32()),
        pa.field("heading", pa.string()),
        pa.field("start", pa.int64()),
        pa.field("end", pa.int64()),
        pa.field("text", pa.string()),
        pa.field("metadata", pa.list_(pa.string())),  # KEY=VALUE
    ]
    dtype = stamp.get("dtype", "float32")
    columns = parts.split(np.zeros((0, int(stamp.get("dimensions", 1))), np.float32), dtype)
    fields += [pa.field(name, column.type) for name, column in columns.items()]
    return pa.schema(fields, metadata={_STAMP_KEY: json.dumps(dict(stamp)).encode()})


def _only(query: Any, columns: Sequence[str], score: str, condition: str | None) -> Any:
    """Return ``columns`` of what a query finds, with the row ids and the score, as an Arrow table."""
    if condition is not None:
        query = query.where(condition, prefilter=True)
    return query.select([*columns, score]).with_row_id(True).to_arrow()


def _hit(row: Mapping[str, Any], score: float) -> Hit:
    metadata = dict(pair.split("=", 1) for pair in row["metadata"])
    values = {name: row[name] for name in _FIELDS if name not in ("digest", "metadata")}
    return Hit(score, Passage(**values, metadata=metadata or None))


def _condition(where: Mapping[str, str | int]) -> str:
    """Return the SQL of a filter; every value is quoted, none is code."""
    parts = []
    for key, given in where.items():
        if not isinstance(given, (str, int)):
            raise InputError(f"where[{key!r}] must be a str or a whole number, got {type(given).__name__}; convert it")
        value = as_text(given)
        if key in ("source", "heading"):
            pattern = value.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
            parts.append(f"{key} LIKE {_quoted(pattern)}")
        elif key == "page":
            if not value.isascii() or not value.isdigit() or int(value) >= 2**31:
                raise InputError(f"page must be a whole number below 2^31, got {value!r}")
            parts.append(f"page = {value}")
        else:
            parts.append(f"array_has(metadata, {_quoted(f'{key}={value}')})")
    return " AND ".join(parts)


def _one_of(column: str, values: Iterable[str]) -> str:
    return f"{column} IN ({', '.join(map(_quoted, values))})"


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _named(stamp: Mapping[str, Any]) -> str:
    return f"{stamp.get('model')} ({stamp.get('weights')}, {stamp.get('dimensions')} dimensions)"


def _no_store(location: str) -> InputError:
    make = f"polyvec index PATHS -d {location}"
    return InputError(f"database must be one that polyvec made, got none in {location}; make it with: {make}")
