"""What training reads: each source is a dataset of one kind, which its columns say, checked row by row.

A source is a file, a folder or a glob, here or by URL. Its examples are checked once, in one pass, and written into the
cache of Hugging Face's ``datasets``, from where they are mapped: memory does not grow with them, and a run draws them
by number, so that it can go on at any step. The next run over the same files finds them there. Examples that a program
has in memory already are checked in the same way and stay there.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.data.failure_cases import quality_of
from polyvec.data.filters import overlaps
from polyvec.data.languages import is_language
from polyvec.data.values import finite_number, is_blank
from polyvec.errors import InputError, MissingExtraError, PolyvecError
from polyvec.files import Record, are_unicode, checked_rows
from polyvec.inputs import filesystem, input_columns, input_files, input_state, read_input

#: Kind of dataset -> columns. ``lang`` and ``source`` group a batch; ``negatives`` are hard ones of a query;
#: ``embedding`` is a teacher's vector, as ``polyvec embed`` writes it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "running text": ("text",),
    "pairs": ("query", "passage"),
    "graded": ("text_a", "text_b", "score"),
    "inference": ("premise", "hypothesis", "label"),
    "equals": ("text_a", "text_b"),
    "labelled": ("text", "label"),
    "targets": ("text", "embedding"),
}
#: Stage -> kinds that it can learn from, each by a loss of its own (arXiv 2409.10173, section 4.3); ``windows`` has
#: running text.
KINDS: dict[str, tuple[str, ...]] = {
    "distillation": ("targets",),
    "pairs": ("pairs", "equals"),
    "retrieval": ("pairs", "equals"),
    "text-matching": ("graded", "inference", "equals"),
    "classification": ("labelled", "pairs", "equals"),
    "separation": ("labelled", "pairs", "equals"),
}
INFERENCE = ("entailment", "neutral", "contradiction")
_OVERLAPPING = "that share nearly all their words"
_FEWEST = 8  # examples; fewer teach nothing but themselves
_LOOKED_AT = 1000  # examples of a source that tell it from its later self
_BLOCK = 10_000  # examples that are in memory while all are walked through


@dataclass(frozen=True)
class Dataset:
    """The examples of one source, all of one kind. ``left_out`` says how many were, and why; it is empty for none."""

    source: str
    kind: str
    rows: Any  # a datasets.Dataset or Rows; lang, source and negatives are there, empty where the source has none
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, numbers: Sequence[int]) -> list[Record]:
        """Return the examples of these numbers, in that order."""
        columns = self.rows[list(numbers)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def walk(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """Yield these columns of every example, in order."""
        rows = self.rows.select_columns(list(columns))
        for start in range(0, len(rows), _BLOCK):
            block = rows[start : start + _BLOCK]
            yield from zip(*(block[column] for column in columns), strict=True)

    def state(self) -> str:
        """Return what tells these examples from others: their number, and a hash of up to a thousand all over them."""
        numbers = np.unique(np.linspace(0, len(self) - 1, _LOOKED_AT).astype(int)).tolist()
        content = json.dumps(self.take(numbers), default=lambda array: array.tolist(), sort_keys=True)
        return f"{len(self)} of hash {hashlib.sha256(content.encode()).hexdigest()[:8]}"

    def embeddings(self, numbers: Sequence[int]) -> NDArray[np.float32]:
        """Return the (n, D) teacher's vectors of these numbers."""
        found: NDArray[np.float32] = self.rows.with_format("numpy", columns=["embedding"])[list(numbers)]["embedding"]
        return found


def left_out_of(total: int, kept: int, things: str, why: str) -> str:
    """Return the sentence that tells a reader of a run how many of his examples it does not use."""
    return f"left out {total - kept} of {total} {things} {why}" if kept < total else ""


class Rows:
    """Examples in memory, with what ``Dataset`` and its readers ask of a ``datasets.Dataset``."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], *, as_arrays: bool = False) -> None:
        self._columns, self._as_arrays = columns, as_arrays

    @classmethod
    def of(cls, records: Iterable[Record], names: Iterable[str]) -> Rows:
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for record in records:
            for name, values in columns.items():
                values.append(record[name])
        return cls(columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, numbers: Sequence[int] | slice) -> dict[str, Any]:
        numbers = range(*numbers.indices(len(self))) if isinstance(numbers, slice) else numbers
        found = {name: [values[i] for i in numbers] for name, values in self._columns.items()}
        return {name: np.array(values) for name, values in found.items()} if self._as_arrays else found

    def select(self, numbers: Sequence[int]) -> Rows:
        return Rows(self[numbers])

    def select_columns(self, names: Sequence[str]) -> Rows:
        return Rows({name: self._columns[name] for name in names})

    def with_format(self, kind: str, columns: Sequence[str]) -> Rows:
        assert kind == "numpy", kind
        return Rows({name: self._columns[name] for name in columns}, as_arrays=True)


def read_dataset(source: str, stage: str, records: list[Record] | None = None) -> Dataset:
    """Return the examples of a source for ``stage``: of the first kind of the stage whose columns it has.

    ``records`` are its examples where they are in memory, ``source`` then their name. Stage ``pairs`` leaves out pairs
    that share nearly all their words (``overlaps``). Raises ``InputError`` naming source, example and rule.
    """
    kind = _kind_of(source, stage, records)
    rows = _stored(source, kind, stage, records)
    if stage != "pairs":
        return Dataset(source, kind, rows)
    kept = np.flatnonzero(~rows.with_format("numpy", columns=["overlaps"])[:]["overlaps"])
    if not len(kept):
        raise InputError(
            f"{source} must hold pairs that share less than 80 % of their words, got none in {len(rows)} examples; a "
            "passage that repeats its query teaches to compare letters"
        )
    return Dataset(source, kind, rows.select(kept), left_out_of(len(rows), len(kept), "pairs", _OVERLAPPING))


def read_examples(
    source: str,
    columns: tuple[str, ...],
    purpose: str,
    records: Iterable[Record] | None = None,
    others: Sequence[tuple[str, ...]] = (),
) -> Iterator[Record]:
    """Yield the examples of ``source``, or ``records`` of that name, each with ``columns``.

    None may have all columns of one of ``others``, by which it would mean something else. Where labels or grades are
    read, they must differ: a source of one class teaches nothing. Raises ``InputError`` naming source, example and
    rule.
    """
    one_value = {column for column in ("score", "label") if column in columns}
    first: Record = {}
    total = 0
    read = read_input(source, column=columns[0]) if records is None else _in_memory(records, source, columns[0])
    for where, record in read:
        total += 1
        row = _checked(record, columns, where, purpose)
        for other in others:
            if all(row.get(column) is not None for column in other):
                raise InputError(
                    f"{where} must be of the kind of the first example ({', '.join(columns)}) for {purpose}, got "
                    f"{', '.join(other)}; give all examples of a source the same columns"
                )
        first = first or row
        one_value = {column for column in one_value if row[column] == first[column]}
        if "embedding" in columns and len(row["embedding"]) != len(first["embedding"]):
            widths = sorted({len(row["embedding"]), len(first["embedding"])})
            raise InputError(f"{where}: embedding must be of one teacher, got vectors of {widths} numbers")
        yield row
    if total < _FEWEST:
        raise InputError(f"{source} must hold at least {_FEWEST} examples, got {total}; add more")
    for column in one_value:
        raise InputError(f"{source}: {column} must differ between examples, got {first[column]!r} in all of them")


def _in_memory(records: Iterable[Record], source: str, column: str) -> Iterator[tuple[str, Record]]:
    for number, record in enumerate(checked_rows(records, source, column=column), start=1):
        if isinstance(record, InputError):
            raise record
        yield f"{source}: example {number}", record


def cached(generate: Callable[..., Iterator[Record]], features: Mapping[str, Any], **arguments: Any) -> Any:
    """Return what ``generate`` yields of ``arguments`` as a ``datasets.Dataset``, from its cache if it is there.

    ``features`` maps columns to the types of ``datasets``. ``arguments`` must tell one result from another, a source
    from its later self (``input_state``); a list among them would be shared out among processes. What ``generate``
    raises of ours is raised, and nothing kept. Raises ``InputError`` for a cache that cannot be written.
    """
    datasets = datasets_library()
    was_shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(generate, features=datasets.Features(features), gen_kwargs=arguments)
    except (datasets.exceptions.DatasetGenerationError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, PolyvecError):
            raise cause from None
        if isinstance(cause, OSError):
            raise InputError(
                "the cache of datasets must be a folder to write in, with room left, got "
                f"{datasets.config.HF_DATASETS_CACHE}: {cause}; make room, or set HF_DATASETS_CACHE to another folder"
            ) from error
        raise
    finally:
        if was_shown:
            datasets.enable_progress_bars()


def datasets_library() -> Any:
    """Return the module ``datasets``."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError.of("training", "train") from error
    return datasets


def _stored(source: str, kind: str, stage: str, records: list[Record] | None) -> Any:
    if records is not None:
        columns = (*COLUMNS[kind], "lang", "source", "negatives", *(("overlaps",) if stage == "pairs" else ()))
        return Rows.of(_records(source, kind, stage, records=records), columns)
    datasets = datasets_library()
    text = datasets.Value("string")
    types = {"score": datasets.Value("float64"), "embedding": datasets.List(datasets.Value("float32"))}
    features = {column: types.get(column, text) for column in COLUMNS[kind]}
    features |= {"lang": text, "source": text, "negatives": datasets.List(text)}
    if stage == "pairs":
        features["overlaps"] = datasets.Value("bool")
    return cached(_records, features, source=source, kind=kind, stage=stage, state=input_state(source))


def _records(
    source: str, kind: str, stage: str, state: str = "", records: list[Record] | None = None
) -> Iterator[Record]:
    """Yield what is stored of a source in its ``state``, or of its ``records``."""
    earlier = [COLUMNS[other] for other in KINDS[stage][: KINDS[stage].index(kind)]]  # had the first row had them
    for row in read_examples(source, COLUMNS[kind], stage, records, earlier):
        kept = {column: row[column] for column in COLUMNS[kind]}
        if kind == "labelled":
            kept["label"] = str(kept["label"])
        shared = {column: str(row.get(column) or "") for column in ("lang", "source")}
        judged = {"overlaps": overlaps(*kept.values())} if stage == "pairs" else {}
        yield {**kept, **shared, **judged, "negatives": row.get("negatives") or []}


def _kind_of(source: str, stage: str, records: list[Record] | None) -> str:
    kinds = KINDS[stage]
    if len(kinds) == 1 or records == []:
        return kinds[0]  # whose columns the rows are checked for
    names = set(records[0] if records else input_columns(filesystem(source)[0], input_files(source)[0]))
    for kind in kinds:
        if names.issuperset(COLUMNS[kind]):
            return kind
    wanted = "; or ".join(", ".join(COLUMNS[kind]) for kind in kinds)
    raise InputError(
        f"{source}: example 1 must have the columns {wanted} for {stage}, got {', '.join(sorted(names)) or 'none'}"
    )


def _checked(row: Record, columns: tuple[str, ...], where: str, purpose: str) -> Record:
    for column in columns[1:]:
        if row.get(column) is None:
            raise InputError(
                f"{where} must have the columns {', '.join(columns)} for {purpose}, got {', '.join(map(str, row))}"
            )
        if column not in ("score", "label", "quality", "embedding") and not isinstance(row[column], str):
            raise InputError(f"{where}: {column!r} must be a text, got {type(row[column]).__name__}")
    may_be_blank = columns in (COLUMNS["running text"], COLUMNS["targets"])
    for column in columns:
        if not may_be_blank and column != "lang" and is_blank(row[column]):
            raise InputError(f"{where}: {column!r} must hold text, got nothing; fill it in or drop the row")
    if "label" in columns and isinstance(row["label"], (list, dict)):
        raise InputError(f"{where}: 'label' must be a text or a number, got {row['label']!r:.60}")
    if row.get("source") is not None and not isinstance(row["source"], str):
        raise InputError(f"{where}: 'source' must be a text or left out, got {row['source']!r:.60}")
    language_of(row, where)
    negatives = row.get("negatives")
    if negatives is not None and not (isinstance(negatives, list) and all(isinstance(n, str) for n in negatives)):
        raise InputError(f"{where}: 'negatives' must be a list of texts, got {negatives!r:.60}")
    if any(not negative.strip() for negative in negatives or ()):
        raise InputError(f"{where}: 'negatives' must hold text, got a blank one; leave it out")
    texts = (*(row[column] for column in columns), row.get("lang"), row.get("source"), *(negatives or ()))
    if not are_unicode(texts):
        raise InputError(f"{where} must be UTF-8 text, got bytes or surrogates that are none")
    if "hypothesis" in columns and row["label"] not in INFERENCE:
        raise InputError(f"{where}: 'label' must be one of {', '.join(INFERENCE)}, got {row['label']!r}")
    checks: dict[str, Callable[[Any, str], Any]] = {
        "score": lambda value, where: finite_number(value, "score", where),
        "embedding": _unit_vector,
        "quality": quality_of,
    }
    return {**row, **{column: checks[column](row[column], where) for column in checks.keys() & set(columns)}}


def language_of(row: Record, where: str) -> str:
    """Return the language of a row, empty where it names none. Raises ``InputError`` for what can be none."""
    lang = row.get("lang") or ""
    if lang and not (isinstance(lang, str) and is_language(lang)):
        raise InputError(
            f"{where}: 'lang' must be a language's code (BCP 47), such as de, pt-BR or zh-Hant, or left out, got "
            f"{lang!r:.60}"
        )
    return str(lang)


def _unit_vector(value: Any, where: str) -> NDArray[np.float32]:
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError, OverflowError):
        vector = np.zeros(0, np.float32)
    norm = float(np.linalg.norm(vector.astype(np.float64)))  # squares of float32 end at 1e38
    if vector.ndim != 1 or not 0 < norm < math.inf:
        raise InputError(f"{where}: 'embedding' must be a list of finite numbers, not all 0, got {value!r:.60}")
    return (vector / norm).astype(np.float32)
