"""The parts of a job: what each is made of, which texts they share, which are done."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.batch.job import Job
from polyvec.batch.parts import kept_schema, unified
from polyvec.batch.rows import Slice, Unit, read_slices
from polyvec.errors import InputError
from polyvec.text.tokenizer import Tokens

_DIGEST_BYTES = 16  # of a text: two of 10^11 texts meet by chance with a probability of 10^-17


@dataclass(frozen=True)
class SliceFacts:
    """What planning keeps of a slice.

    ``digests`` of its texts are 16 bytes a row, zeros for a row without one; empty where slices share nothing.
    """

    digest: str
    rows: int
    faults: int
    characters: int
    distinct: int  # texts in the slice
    digests: bytes
    kept: Any  # Arrow schema of the kept columns


@dataclass(frozen=True)
class Part:
    """A slice with its place. ``lends`` are rows whose texts other parts hold too; ``borrows`` maps a row to the part
    and row that lend it its result."""

    name: str
    unit: int
    ordinal: int
    digest: str
    rows: int
    characters: int
    lends: tuple[int, ...] = ()
    borrows: Mapping[int, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All parts of a job in the order of the input. ``distinct`` counts the texts that are embedded."""

    units: list[Unit]
    parts: list[Part]
    schema: Any
    faults: int
    distinct: int

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def slice_facts(fs: Any, unit: Unit, job: Job) -> Iterator[SliceFacts]:
    """Yield the facts of each slice of a unit."""
    names = ["id", *job.keep]
    for piece in read_slices(fs, unit, job):
        good = [row for row in piece.rows if row.fault is None]
        digests = b""
        if job.dedupe == "job":
            digests = b"".join(
                bytes(_DIGEST_BYTES)
                if row.fault is not None
                else hashlib.blake2b(row.text.encode(), digest_size=_DIGEST_BYTES).digest()
                for row in piece.rows
            )
        kept = kept_schema([row.kept for row in good], names, piece.rows[0].where)
        characters = sum(len(row.text) for row in good)
        distinct = len({row.text for row in good})
        faults = len(piece.rows) - len(good)
        yield SliceFacts(piece.digest, len(piece.rows), faults, characters, distinct, digests, kept)


def make_plan(units: list[Unit], facts: Iterable[Sequence[SliceFacts]], job: Job) -> Plan:
    """Return the plan of ``units`` from the facts of each, in order. Raises ``InputError`` where there is no text."""
    places = [(u, o, f) for u, group in enumerate(facts) for o, f in enumerate(group)]
    found = [f for _, _, f in places]
    rows, faults = sum(f.rows for f in found), sum(f.faults for f in found)
    if rows == faults:
        raise InputError(
            f"input must hold at least one text under {job.column!r}, got {rows} rows without; see --column"
        )
    seen: Counter[str] = Counter()
    names = []
    for f in found:  # two slices of equal content are two parts
        names.append(f"part-{f.digest}" + (f"-{seen[f.digest]}" if seen[f.digest] else ""))
        seen[f.digest] += 1
    lends, borrows, distinct = (
        _shared(found, names) if job.dedupe == "job" else ({}, {}, sum(f.distinct for f in found))
    )
    parts = [
        Part(name, u, o, f.digest, f.rows, f.characters, tuple(lends.get(i, ())), borrows.get(i, {}))
        for i, (name, (u, o, f)) in enumerate(zip(names, places, strict=True))
    ]
    return Plan(units, parts, unified([f.kept for f in found if f.rows > f.faults]), faults, distinct)


def _shared(
    found: Sequence[SliceFacts], names: Sequence[str]
) -> tuple[dict[int, list[int]], dict[int, dict[int, tuple[str, int]]], int]:
    """Return which rows each slice lends and borrows, and the number of distinct texts.

    The first slice that holds a text owns it. Sorting takes about 60 bytes a row.
    """
    keys = np.frombuffer(b"".join(f.digests for f in found), dtype="<u8").reshape(-1, 2)
    lengths = [f.rows for f in found]
    slice_of = np.repeat(np.arange(len(found), dtype=np.int32), lengths)
    row_of = np.arange(len(keys)) - np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equal texts comes first
    order = order[keys[order].any(axis=1)]
    is_first: NDArray[np.bool_] = np.ones(len(order), dtype=bool)
    is_first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    owner = order[is_first][np.cumsum(is_first) - 1]
    lends: dict[int, set[int]] = {}
    borrows: dict[int, dict[int, tuple[str, int]]] = {}
    is_foreign = slice_of[order] != slice_of[owner]
    for position, source in zip(order[is_foreign].tolist(), owner[is_foreign].tolist(), strict=True):
        lender = int(slice_of[source])
        lends.setdefault(lender, set()).add(int(row_of[source]))
        borrows.setdefault(int(slice_of[position]), {})[int(row_of[position])] = (names[lender], int(row_of[source]))
    return {i: sorted(rows) for i, rows in lends.items()}, borrows, int(is_first.sum())


@dataclass(frozen=True)
class Run:
    """Parts of one unit that one reader reads in order. ``is_lending``: only what they lend to others is embedded."""

    unit: Unit
    parts: list[Part]
    is_lending: bool


@dataclass(frozen=True)
class Work:
    """A slice to be done, or with ``is_lending`` what it lends to others. ``tokens`` are those of ``texts``, where they
    were made already."""

    part: Part
    piece: Slice
    is_lending: bool
    tokens: Sequence[Tokens] | None = None

    def texts(self) -> list[str]:
        """Return the texts that are embedded: distinct, and neither lent before nor borrowed."""
        rows = self.piece.rows
        if self.is_lending:
            return [rows[i].text for i in self.part.lends]
        shared = {rows[i].text for i in (*self.part.lends, *self.part.borrows)}
        return [text for text in dict.fromkeys(row.text for row in rows if row.fault is None) if text not in shared]


def runs_of(plan: Plan, parts: Sequence[Part], *, is_lending: bool) -> list[Run]:
    """Return the runs of some of a plan's parts."""
    by_unit: dict[int, list[Part]] = {}
    for part in parts:
        by_unit.setdefault(part.unit, []).append(part)
    return [Run(plan.units[unit], group, is_lending) for unit, group in by_unit.items()]


def read_run(fs: Any, run: Run, job: Job) -> Iterator[Work]:
    """Yield what is to be done of a run, slice by slice. Raises ``InputError`` if the input is not what was planned."""
    wanted = {part.ordinal: part for part in run.parts}
    for ordinal, piece in enumerate(read_slices(fs, run.unit, job)):
        part = wanted.pop(ordinal, None)
        if part is None:
            continue
        if piece.digest != part.digest:
            break
        yield Work(part, piece, run.is_lending)
        if not wanted:
            return
    if wanted:
        raise InputError(f"{run.unit.file.name} must not change while the job runs; run the same command again")
