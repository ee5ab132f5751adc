"""Models x suites x widths x dtypes x variants: one cell after the other, each kept in a file of its own.

So a run that was stopped goes on.

A cell's file is named after what was asked for and stamped with what decides the number: hashes of weights and data,
the tasks, the protocol. A file of another stamp is an error, never overwritten and never taken for the answer.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from polyvec import __version__
from polyvec.atomic import write_json
from polyvec.errors import InputError
from polyvec.evaluation.intervals import compare, interval
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import data_hash
from polyvec.evaluation.suites import TASKS, Labelled, Pairs, Ranking, Score, Suite, check_ranking, score, score_ranking
from polyvec.evaluation.systems import System
from polyvec.evaluation.variants import WHOLE, Variant
from polyvec.inference.quantize import as_unit

Row = dict[str, Any]
#: Counted up when the same vectors would score otherwise: results of the two never meet.
PROTOCOL = 1


@dataclass(frozen=True)
class Cell:
    """One number to measure. The dimensions of a system without vectors are 0."""

    system: System
    suite: Suite
    dimensions: int
    dtype: str
    variant: Variant = WHOLE

    @property
    def label(self) -> str:
        vectors = f", {self.dimensions} {self.dtype}" if self.dimensions else ""
        variant = f", {self.variant.name}" if self.variant.name else ""
        return f"{self.system.name} on {self.suite.label} ({self.suite.kind}){vectors}{variant}"

    @property
    def file_name(self) -> str:
        parts = (
            self.system.name, self.system.engine, self.suite.kind, self.suite.name, self.suite.group,
            str(self.dimensions), self.dtype, self.variant.name or "whole",
        )  # fmt: skip
        return "--".join(re.sub(r"[^\w.-]+", "_", part) for part in parts) + ".json"

    @property
    def ways(self) -> list[tuple[str | None, str]]:
        """Adapter and prompt of the suite's first and second side."""
        return [self.variant.way(task, self.system.prompts) for task in TASKS[self.suite.kind]]

    @cached_property
    def stamp(self) -> Row:
        """What decides the number: results of two stamps never meet."""
        return {
            "protocol": PROTOCOL,
            "weights": self.system.weights,
            "data": data_hash(self.suite),
            "tasks": [{"adapter": adapter, "prompt": prompt} for adapter, prompt in self.ways],
        }


def plan(
    systems: Sequence[System],
    suites: Sequence[Suite],
    *,
    dimensions: Sequence[int | None] = (None,),
    every_width: bool = False,
    dtypes: Sequence[str] = ("float32",),
    variants: Sequence[Variant] = (WHOLE,),
) -> list[Cell]:
    """Return the cells of every combination that makes sense; a width of None is the model's full one.

    A peer without tasks has no variants of them, and one that compares words no suites but those of ranking.
    ``every_width`` adds the trained ones. Raises ``InputError`` for a width that a model lacks, where nothing is left
    to measure, and for two cells of one name, which would share a file.
    """
    cells = []
    for system in systems:
        widths = [system.width if width is None else width for width in dimensions] + list(
            system.widths if every_width else ()
        )
        for width in widths:
            if not (1 if system.width else 0) <= width <= system.width:
                raise InputError(
                    f"dimensions of {system.name} must be between 1 and {system.width}, got {width}; drop it"
                )
        for suite in suites:
            if system.rank is not None:
                cells += [Cell(system, suite, 0, "words")] if isinstance(suite.data, Ranking) else []
                continue
            for variant in variants:
                if variant.needs_tasks and variant != WHOLE and not system.prompts:
                    continue
                cells += [
                    Cell(system, suite, width, dtype, variant)
                    for width in dict.fromkeys(widths)
                    for dtype in dict.fromkeys(dtypes)
                    if variant.applies(suite.kind, dtype)
                ]
    if not cells:
        raise InputError(
            f"{', '.join(s.name for s in systems)} must fit a suite's kind, got {', '.join({s.kind for s in suites})}; "
            "bm25 ranks passages alone"
        )
    named: dict[str, Cell] = {}
    for cell in cells:
        other = named.setdefault(cell.file_name, cell)
        if other is not cell:
            raise InputError(
                f"models and data must have names that differ, got {cell.label} twice, of {other.suite.source} and "
                f"{cell.suite.source}; name a file once, and of two rename one or give it an --output of its own"
            )
    return cells


def run_cells(cells: Sequence[Cell], folder: Path, *, report: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Return a result per cell, measured or read from ``folder``, where each appears as soon as it is there.

    ``report`` is told of each, with the seconds that the rest may take. Raises ``InputError`` for a file in ``folder``
    of other weights or data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {cell.file_name: _read(cell, folder) for cell in cells}  # first: a wrong file stops the run before it works
    clock = _Clock([cell for cell in cells if known[cell.file_name] is None])
    results = []
    texts_of: tuple[Any, dict[Any, Vectors]] = (None, {})
    for cell in cells:
        row = known[cell.file_name]
        if row is None:
            if texts_of[0] != _embedded_once(cell):  # vectors of one suite at a time stay in memory
                texts_of = (_embedded_once(cell), {})
            row = _measure(cell, texts_of[1])
            write_json(row, folder / cell.file_name)
            report(f"{clock.tick(cell)}  {cell.label}: {row['metric']} {row['score']:.4f}  {clock.left()}")
        results.append(row)
    return results


def _embedded_once(cell: Cell) -> tuple[int, int]:
    return id(cell.system), id(cell.suite)


class _Clock:
    """Time left, by the characters that are still to be embedded: other widths of the same vectors cost nothing."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._costs: dict[str, int] = {}
        ways = set()
        for cell in cells:
            way = (*_embedded_once(cell), *cell.ways, cell.variant.chunks)
            self._costs[cell.file_name] = 0 if way in ways else _num_characters(cell.suite)
            ways.add(way)
        self._total, self._started = len(self._costs), time.monotonic()
        self._spent = 0

    def tick(self, cell: Cell) -> str:
        self._spent += self._costs.pop(cell.file_name)
        return f"{self._total - len(self._costs)}/{self._total}"

    def left(self) -> str:
        seconds = (time.monotonic() - self._started) / max(self._spent, 1) * sum(self._costs.values())
        return f"about {seconds:.0f} s left"


def _num_characters(suite: Suite) -> int:
    data = suite.data
    if isinstance(data, Pairs):
        return sum(map(len, data.first)) + sum(map(len, data.second))
    if isinstance(data, Labelled):
        return sum(map(len, data.texts)) + sum(map(len, data.train_texts))
    return sum(map(len, data.queries.values())) + sum(map(len, data.corpus.values()))


#: What tables, reports and tests take from a result.
_COLUMNS = {
    "model", "engine", "kind", "suite", "group", "num_tokens", "dimensions", "dtype", "variant", "metric", "score",
    "low", "high", "bytes_per_vector", "texts_per_second", "statistic", "observations",
}  # fmt: skip


def _read(cell: Cell, folder: Path) -> Row | None:
    path = folder / cell.file_name
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        stamp = dict(row["stamp"])
        if missing := _COLUMNS - row.keys():  # else what is printed last would find out
            raise KeyError(*sorted(missing))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} must be a result of this command, got: {error!r}; move it away") from error
    for key, value in cell.stamp.items():
        if stamp.get(key) != value:
            raise InputError(
                f"{path} must be of the same {key} ({value}), got a result of {stamp.get(key)}; "
                "choose another --output folder, or move it away"
            )
    return dict(row)


def _measure(cell: Cell, embedded: dict[Any, Vectors]) -> Row:
    if cell.system.rank is not None:
        assert isinstance(cell.suite.data, Ranking)
        check_ranking(cell.suite.data)
        started = time.perf_counter()
        rankings = cell.system.rank(cell.suite.data)
        seconds = time.perf_counter() - started
        result = score_ranking(cell.suite.data, rankings)
        return _row(cell, result, (len(cell.suite.data.corpus) + len(rankings)) / seconds, 0)
    vectors = _Vectors(cell, embedded)
    result = score(
        cell.suite,
        vectors.encode,
        chunks=vectors.encode_chunks if cell.variant.chunks else None,
        exact=vectors.encode_exactly if cell.variant.rescores else None,
    )
    return _row(cell, result, vectors.texts_per_second, vectors.num_bytes)


class _Vectors:
    """A cell's vectors, made once for every width and dtype, with the time that they took and the bytes of a text's."""

    def __init__(self, cell: Cell, embedded: dict[Any, Any]) -> None:
        self._cell, self._embedded = cell, embedded
        self._seconds, self._num_texts = 0.0, 0
        self.num_bytes = 0.0

    @property
    def texts_per_second(self) -> float | None:
        """None where every vector was there already."""
        return self._num_texts / self._seconds if self._num_texts else None

    def encode(self, texts: Sequence[str], task: str) -> Vectors:
        return self._narrow(self._once(texts, task), len(texts))

    def encode_exactly(self, texts: Sequence[str], task: str) -> Vectors:
        return as_unit(self._cell.system.convert(self._once(texts, task), self._cell.dimensions, "float32"), "float32")

    def encode_chunks(self, texts: Sequence[str], task: str) -> list[Vectors]:
        parts = self._once(texts, task, chunks=self._cell.variant.chunks)
        narrow = self._narrow(np.concatenate(parts), len(texts))
        return np.split(narrow, np.cumsum([len(part) for part in parts])[:-1])

    def _narrow(self, vectors: Vectors, num_texts: int) -> Vectors:
        found = self._cell.system.convert(vectors, self._cell.dimensions, self._cell.dtype)
        self.num_bytes = found.nbytes / num_texts  # of the side that comes last: the passages
        return as_unit(found, self._cell.dtype)

    def _once(self, texts: Sequence[str], task: str, *, chunks: str | None = None) -> Any:
        adapter, prompt = self._cell.variant.way(task, self._cell.system.prompts)
        key = (adapter, prompt, chunks, tuple(texts))
        if key not in self._embedded:
            started = time.perf_counter()
            if chunks is None:
                assert self._cell.system.encode is not None
                self._embedded[key] = self._cell.system.encode(texts, adapter, prompt)
            else:
                assert self._cell.system.encode_chunks is not None
                self._embedded[key] = self._cell.system.encode_chunks(texts, adapter, prompt, chunks == "late")
            self._seconds += time.perf_counter() - started
            self._num_texts += len(texts)
        return self._embedded[key]


def _row(cell: Cell, result: Score, texts_per_second: float | None, num_bytes: float) -> Row:
    low, high = interval(result.observations, result.statistic)
    return {
        "model": cell.system.name,
        "engine": cell.system.engine,
        "model_bytes": cell.system.num_bytes,
        "kind": cell.suite.kind,
        "suite": cell.suite.name,
        "group": cell.suite.group,
        "num_tokens": cell.suite.num_tokens,
        "dimensions": cell.dimensions,
        "dtype": cell.dtype,
        "variant": cell.variant.name,
        "metric": result.metric,
        "score": result.value,
        "low": low,
        "high": high,
        "others": result.others,
        "bytes_per_vector": round(num_bytes),
        "texts_per_second": texts_per_second,
        "stamp": cell.stamp,
        "versions": {"polyvec": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "statistic": result.statistic,
        "observations": result.observations.tolist(),
    }


def comparisons(results: Sequence[Row]) -> Iterator[Row]:
    """Yield a paired test of each result against the first system's on the same suite.

    Of another system or variant it is tested against the vectors of its width and dtype, or else the widest; another
    width or dtype of the first system against that system's first.
    """
    for row in results:
        first = results[0]
        of_first = [
            r for r in results
            if (r["model"], r["engine"], r["variant"]) == (first["model"], first["engine"], first["variant"])
            and all(r[key] == row[key] for key in ("kind", "suite", "group"))
            and r["stamp"]["data"] == row["stamp"]["data"]
        ]  # fmt: skip
        if not of_first or row is of_first[0]:
            continue
        base = of_first[0]
        if row not in of_first:
            base = max(
                of_first,
                key=lambda r: (r["dimensions"] == row["dimensions"], r["dtype"] == row["dtype"], r["dimensions"]),
            )
        difference = compare(np.array(base["observations"]), np.array(row["observations"]), row["statistic"])
        yield {
            "suite": row["suite"], "group": row["group"], "kind": row["kind"],
            "first": title(base, results), "second": title(row, results),
            "dimensions": [base["dimensions"], row["dimensions"]], "dtype": row["dtype"],
            "difference": difference.value, "low": difference.low, "high": difference.high, "p": difference.p,
        }  # fmt: skip


def title(row: Row, results: Sequence[Row]) -> str:
    """Return what a row is called beside ``results``: the model, its engine if it has several, vectors, variant."""
    engines = {r["engine"] for r in results if r["model"] == row["model"]}
    parts = [row["model"]]
    parts += [row["engine"]] if len(engines) > 1 else []
    parts += [f"{row['dimensions']} {row['dtype']}"] if row["dimensions"] else []
    parts += [row["variant"]] if row["variant"] else []
    return ", ".join(parts)
