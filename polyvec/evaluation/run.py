"""Models x suites x widths x dtypes: one cell after the other, each kept in a file of its own, so that a run resumes.

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
from pathlib import Path
from typing import Any

import numpy as np

from polyvec import __version__
from polyvec.atomic import write_json
from polyvec.errors import InputError
from polyvec.evaluation.intervals import compare, interval
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import data_hash
from polyvec.evaluation.suites import TASKS, Suite, score
from polyvec.evaluation.systems import System
from polyvec.inference.quantize import as_unit

Row = dict[str, Any]
#: Counted up when the same vectors would score otherwise: results of the two never meet.
PROTOCOL = 1


@dataclass(frozen=True)
class Cell:
    """One number to measure. ``adapter`` False is the model without task: neither adapter nor prompt."""

    system: System
    suite: Suite
    dimensions: int
    dtype: str
    adapter: bool

    @property
    def label(self) -> str:
        suite = f"{self.suite.name} {self.suite.group}".strip()
        task = "" if self.adapter else ", no task"
        return f"{self.system.name} on {suite} ({self.suite.kind}), {self.dimensions} {self.dtype}{task}"

    @property
    def file_name(self) -> str:
        parts = (
            self.system.name, self.system.engine, self.suite.kind, self.suite.name, self.suite.group,
            str(self.dimensions), self.dtype, "task" if self.adapter else "no-task",
        )  # fmt: skip
        return "--".join(re.sub(r"[^\w.-]+", "_", part) for part in parts) + ".json"


def plan(
    systems: Sequence[System],
    suites: Sequence[Suite],
    *,
    dimensions: Sequence[int | None] = (None,),
    dtypes: Sequence[str] = ("float32",),
    adapters: Sequence[bool] = (True,),
) -> list[Cell]:
    """Return the cells of every combination; a width of None is the model's full one. A peer without tasks has one."""
    cells = []
    for system in systems:
        for suite in suites:
            for adapter in adapters if system.prompts else (True,):
                for width in dimensions:
                    if width is not None and not 1 <= width <= system.width:
                        raise InputError(
                            f"dimensions of {system.name} must be between 1 and {system.width}, got {width}; drop it"
                        )
                    cells += [Cell(system, suite, width or system.width, dtype, adapter) for dtype in dtypes]
    return cells


def run_cells(cells: Sequence[Cell], folder: Path, *, report: Callable[[str], None] = lambda line: None) -> list[Row]:
    """Return a result per cell, measured or read from ``folder``, where each appears as soon as it is there.

    ``report`` is told of each, with the seconds that the rest may take. Raises ``InputError`` for a file in ``folder``
    of other weights or data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {cell.file_name: _read(cell, folder) for cell in cells}  # first: a wrong file stops the run before it works
    todo = sum(row is None for row in known.values())
    results, done, started = [], 0, time.monotonic()
    texts_of: tuple[Any, dict[Any, Vectors]] = (None, {})
    for cell in cells:
        row = known[cell.file_name]
        if row is None:
            if texts_of[0] != (id(cell.system), id(cell.suite)):  # vectors of one suite at a time stay in memory
                texts_of = ((id(cell.system), id(cell.suite)), {})
            row = _measure(cell, texts_of[1])
            write_json(row, folder / cell.file_name)
            done += 1
            left = (time.monotonic() - started) / done * (todo - done)
            report(f"{done}/{todo}  {cell.label}: {row['metric']} {row['score']:.4f}  about {left:.0f} s left")
        results.append(row)
    return results


def _stamp(cell: Cell) -> Row:
    return {
        "protocol": PROTOCOL,
        "weights": cell.system.weights,
        "data": data_hash(cell.suite),
        "tasks": list(TASKS[cell.suite.kind]) if cell.adapter and cell.system.prompts else None,
    }


def _read(cell: Cell, folder: Path) -> Row | None:
    path = folder / cell.file_name
    if not path.exists():
        return None
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        stamp = row["stamp"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} must be a result of this command, got: {error!r}; move it away") from error
    for key, value in _stamp(cell).items():
        if stamp.get(key) != value:
            raise InputError(
                f"{path} must be of the same {key} ({value}), got a result of {stamp.get(key)}; "
                "choose another --output folder, or move it away"
            )
    return dict(row)


def _measure(cell: Cell, embedded: dict[Any, Vectors]) -> Row:
    seconds, num_texts, stored = 0.0, 0, 0

    def encode(texts: Sequence[str], task: str) -> Vectors:
        nonlocal seconds, num_texts, stored
        key = (task if cell.adapter else None, tuple(texts))
        if key not in embedded:  # every width and dtype is made of the same vectors
            started = time.perf_counter()
            embedded[key] = cell.system.encode(texts, key[0])
            seconds += time.perf_counter() - started
            num_texts += len(texts)
        vectors = cell.system.convert(embedded[key], cell.dimensions, cell.dtype)
        stored = vectors[0].nbytes
        return as_unit(vectors, cell.dtype)

    result = score(cell.suite, encode)
    low, high = interval(result.observations, result.statistic)
    tasks = _stamp(cell)["tasks"]
    return {
        "model": cell.system.name,
        "engine": cell.system.engine,
        "kind": cell.suite.kind,
        "suite": cell.suite.name,
        "group": cell.suite.group,
        "dimensions": cell.dimensions,
        "dtype": cell.dtype,
        "adapter": bool(tasks),
        "prompts": {task: cell.system.prompts[task] for task in tasks} if tasks else None,
        "metric": result.metric,
        "score": result.value,
        "low": low,
        "high": high,
        "others": result.others,
        "bytes_per_vector": stored,
        "texts_per_second": num_texts / seconds if seconds else None,
        "stamp": _stamp(cell),
        "versions": {"polyvec": __version__, "numpy": np.__version__, "python": platform.python_version()},
        "statistic": result.statistic,
        "observations": result.observations.tolist(),
    }


def comparisons(results: Sequence[Row]) -> Iterator[Row]:
    """Yield a paired test of each result against the first model's of the same suite, width, dtype and adapter.

    Where the first has no such width, its widest of the dtype stands in.
    """
    first = results[0]["model"] if results else None
    for row in results:
        of_first = [
            r for r in results
            if r["model"] == first and r["stamp"]["data"] == row["stamp"]["data"] and r["dtype"] == row["dtype"]
            and r["kind"] == row["kind"] and r["group"] == row["group"] and r["suite"] == row["suite"]
        ]  # fmt: skip
        if row["model"] == first or not of_first:
            continue
        base = max(of_first, key=lambda r: (r["dimensions"] == row["dimensions"], r["adapter"], r["dimensions"]))
        difference = compare(np.array(base["observations"]), np.array(row["observations"]), row["statistic"])
        yield {
            "suite": row["suite"], "group": row["group"], "kind": row["kind"], "first": first, "second": row["model"],
            "dimensions": [base["dimensions"], row["dimensions"]], "dtype": row["dtype"],
            "difference": difference.value, "low": difference.low, "high": difference.high, "p": difference.p,
        }  # fmt: skip
