"""A whole job: plan, embed what is not done, commit the manifest last.

The folder holds the parts, ``_rejects.jsonl`` and ``_manifest.json``; while a job runs also ``_work`` with receipts,
what parts lend each other, and trials. A part counts when its receipt is there and its size is the receipt's, or when a
committed manifest names it, unless a text of it was set aside for less memory than there is now. Nothing else is
trusted. ``formats`` says how parts lie there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from polyvec.batch.ceiling import is_below
from polyvec.batch.engines import Place
from polyvec.batch.formats import Receipt, format_of
from polyvec.batch.job import Job, changes
from polyvec.batch.parts import part_table, record_schema, retyped, types_of
from polyvec.batch.plan import Part, Plan, make_plan, runs_of
from polyvec.batch.rows import units_of
from polyvec.batch.storage import WORK, Folder
from polyvec.batch.worker import cannot_write, receipt_name
from polyvec.errors import InputError
from polyvec.files import json_text, packed_width, storage_dtype
from polyvec.inputs import InputFile, filesystem, input_files

MANIFEST = "_manifest.json"
REJECTS = "_rejects.jsonl"
_JOB = f"{WORK}/job.json"
_LENT = f"{WORK}/lent"


@dataclass(frozen=True)
class Progress:
    """Where a job stands. ``rows`` and ``tokens`` are those of this run, ``rejected`` of the whole job."""

    parts_done: int
    parts: int
    rows: int
    rows_left: int
    tokens: int
    rejected: int


@dataclass
class Prepared:
    """A job that was checked and planned: nothing has been embedded, and nothing written."""

    job: Job
    folder: Folder
    fs: Any
    plan: Plan
    done: dict[str, Receipt]
    news: list[str] = field(default_factory=list)  # why there are parts to do, one sentence each

    @property
    def pending(self) -> list[Part]:
        return [part for part in self.plan.parts if part.name not in self.done]


def prepare(
    job: Job, output: str, place: Place, *, replace: bool = False, is_engine_measured: bool = False
) -> Prepared:
    """Return the job with its plan, after every check that needs no model.

    An engine that was only measured here, and not asked for, gives way to the one with which the folder was begun.
    Raises ``InputError`` for an input that cannot be read, and for a folder that holds something else: vectors of
    another model or of other options, which only ``replace`` lets go.
    """
    folder = Folder.of(output)
    parts = format_of(folder)
    try:
        manifest = folder.read_json(MANIFEST)
        earlier = folder.read_json(_JOB) or manifest
        names, sizes = list(folder.sizes()), parts.sizes(folder)
    except OSError as error:
        raise InputError(f"output must be a folder or the URL of one, got {output}: {error}") from error
    except ValueError as error:
        raise InputError(f"output must be a folder of whole files, got {output}: {error}; choose another") from error
    if earlier is not None and not (isinstance(earlier, dict) and {"identity", "plan"} <= earlier.keys()):
        raise InputError(f"output must be a new folder or one of an earlier job, got {output} with another {MANIFEST}")
    foreign = [name for name in names if name not in sizes and not name.startswith(("_", "."))]
    if earlier is None:
        foreign += [*names, *sizes]
    if foreign:
        raise InputError(f"output must be a new folder or one of an earlier job, got {output} with {min(foreign)}")
    if is_engine_measured and earlier and {**earlier["identity"], "engine": job.engine} == job.identity():
        job = dataclasses.replace(job, engine=earlier["identity"]["engine"])
    news = changes(earlier["identity"], job.identity()) if earlier else []
    if news and not replace:
        raise InputError(
            f"output must be of the same model, task and options, got {output} with other {', '.join(news)}; "
            "choose another folder, or let --replace make all of it anew"
        )
    left_out: list[str] = []
    fs, files = _files(job, folder, left_out)
    units = units_of(fs, files)
    plan = make_plan(units, place.facts(fs, units, job), job)
    committed = {receipt["part"]: receipt for receipt in (manifest or {}).get("parts", [])}
    done = _done(folder, plan, committed, sizes)
    if news:
        news = [f"all parts are new: {', '.join(news)}"]
    elif earlier and (fresh := {p.name for p in plan.parts} - set(earlier["plan"])):
        news = [f"input has changed: {len(fresh)} of {len(plan.parts)} parts are new"]
    again = [n for n, r in done.items() if any(is_below(reject["reason"], place.memory_mb) for reject in r["rejects"])]
    for name in again:
        del done[name]
    if again:
        news.append(f"more memory: {len(again)} of {len(plan.parts)} parts hold texts that needed it")
    types = types_of(record_schema(job, plan.schema))
    if other := sum(receipt["types"] != types for receipt in done.values()):
        news.append(f"columns have other types: {other} of {len(plan.parts)} parts are written again")
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        news.append(f"left out {min(left_out)}{more}: names that begin with _ are hidden")
    return Prepared(job, folder, fs, plan, done, news)


def _files(job: Job, folder: Folder, left_out: list[str]) -> tuple[Any, list[InputFile]]:
    """Return the file system and the files of the input, without those of an output that lies in it.

    Names of hidden files that no job made are added to ``left_out``.
    """
    fs, _ = filesystem(job.source)
    hidden: list[str] = []
    files = input_files(job.source, hidden)
    left_out += [name for name in hidden if not {WORK, REJECTS} & set(name.split("/"))]
    if fs == folder.fs:
        own = _real_path(fs, folder.path)
        files = [file for file in files if own not in (path := _real_path(fs, file.path), os.path.dirname(path))]
    if not files:
        raise InputError(f"input must hold other files than the output's, got {job.source} for {folder.location}")
    return fs, files


def _real_path(fs: Any, path: str) -> str:
    return os.path.realpath(path) if fs.type_name == "local" else path.rstrip("/")


def _done(folder: Folder, plan: Plan, committed: dict[str, Receipt], sizes: dict[str, int]) -> dict[str, Receipt]:
    receipts = set(folder.sizes(f"{WORK}/receipts"))
    done = {}
    for part in plan.parts:
        # Newer than the manifest, where a part of a finished job is made again.
        is_here = f"{part.name}.json" in receipts
        receipt = folder.read_json(receipt_name(part.name)) if is_here else committed.get(part.name)
        # A part from before receipts told types may have any. Of sizes both are None: a part without rows, in Lance.
        if receipt and "types" in receipt and sizes.get(receipt["name"]) == receipt["bytes"]:
            done[part.name] = receipt
    return done


def _retype(ready: Prepared) -> None:
    """Write done parts again whose columns had other types, from when the input was another one.

    A folder has one schema: most readers take that of any file for all, and Lance reads the bytes of one type as those
    of the other. What does not take the new types as it is, is no longer done.
    """
    folder = ready.folder
    parts = format_of(folder)
    schema = record_schema(ready.job, ready.plan.schema)
    types = types_of(schema)
    for name, receipt in list(ready.done.items()):
        if receipt["types"] == types:
            continue
        table = parts.read(folder, receipt)
        table = None if table is None else retyped(table, schema, ready.job.stamp)
        if table is None:
            del ready.done[name]
        else:
            ready.done[name] = {**receipt, **parts.write(folder, name, table), "types": types}
            folder.write_json(receipt_name(name), ready.done[name])


def run(ready: Prepared, place: Place, report: Callable[[Progress], None] = lambda _: None) -> dict[str, Any]:
    """Embed what is not done, commit the manifest, remove what is stale, and return the summary.

    Raises ``PolyvecError`` for what stops the job; finished parts stay, and the same job goes on from there.
    """
    folder, job, plan = ready.folder, ready.job, ready.plan
    names = [part.name for part in plan.parts]
    _check_room(ready)
    try:
        # What parts lend each other is for the whole plan to say, and what is too large to be lent for the ceiling.
        state = {"identity": job.identity(), "plan": names, "memory_mb": place.memory_mb}
        if folder.read_json(_JOB) != state:
            folder.remove(_LENT)
            folder.write_json(_JOB, state)
        _retype(ready)
    except OSError as error:
        raise cannot_write(folder, error) from error
    done = dict(ready.done)
    pending = ready.pending
    rows_left = sum(part.rows for part in pending)
    rows = tokens = 0
    for receipt in _receipts(ready, place):
        tokens += receipt["tokens"]
        if "lent" not in receipt:
            done[receipt["part"]] = receipt
            count = receipt["rows"] + len(receipt["rejects"])
            rows, rows_left = rows + count, rows_left - count
        rejected = sum(len(r["rejects"]) for r in done.values())
        report(Progress(len(done), len(names), rows, rows_left, tokens, rejected))
    return _commit(ready, [done[name] for name in names])


def _receipts(ready: Prepared, place: Place) -> Iterator[Receipt]:
    folder, plan, pending = ready.folder, ready.plan, ready.pending
    schema = record_schema(ready.job, plan.schema)
    lent = folder.sizes(_LENT)
    lenders = {part.name for part in pending if part.lends}
    lenders |= {lender for part in pending for lender, _ in part.borrows.values()}
    to_lend = [p for p in plan.parts if p.name in lenders and f"{p.name}.parquet" not in lent]
    yield from place.embed(ready.fs, runs_of(plan, to_lend, is_lending=True), ready.job, folder, schema)
    yield from place.embed(ready.fs, runs_of(plan, pending, is_lending=False), ready.job, folder, schema)


def vector_bytes(job: Job, rows: int) -> int:
    """Return the bytes of the vectors of that many rows, uncompressed."""
    return rows * packed_width(job.stamp) * storage_dtype(job.stamp["dtype"]).itemsize


def _check_room(ready: Prepared) -> None:
    if ready.folder.fs.type_name != "local":
        return
    path = ready.folder.path
    while not os.path.isdir(path):
        path = path.rsplit("/", 1)[0] or "/"
    free, need = shutil.disk_usage(path).free, vector_bytes(ready.job, sum(p.rows for p in ready.pending))
    if need > free:
        raise InputError(f"output needs about {need / 1e9:.1f} GB of disk, got {free / 1e9:.1f} GB free in {path}")


def _commit(ready: Prepared, receipts: list[Receipt]) -> dict[str, Any]:
    folder, job = ready.folder, ready.job
    rejects = [reject for receipt in receipts for reject in receipt["rejects"]]
    reasons = Counter(reject["reason"] for reject in rejects)
    summary = {
        "output": folder.location,
        "rows": sum(r["rows"] for r in receipts),
        "rejected": len(rejects),
        "reasons": dict(reasons.most_common(20)),
        "truncated": sum(r["truncated"] for r in receipts),
        "tokens": sum(r["tokens"] for r in receipts),
        "distinct": ready.plan.distinct,
        "parts": len(receipts),
    }
    manifest = {
        "summary": summary,
        "job": {**asdict(job), "keep": list(job.keep)},
        "identity": job.identity(),
        "plan": [part.name for part in ready.plan.parts],
        "parts": receipts,
    }
    lines = (json_text({**r, "count": reasons[r["reason"]]}) for r in rejects)
    parts = format_of(folder)
    schema = part_table([], record_schema(job, ready.plan.schema), job.stamp).schema
    try:
        parts.commit(folder, receipts, schema)
        folder.write(REJECTS, "".join(f"{line}\n" for line in lines).encode())
        folder.write(MANIFEST, (json_text(manifest, indent=1) + "\n").encode())
        parts.clean(folder, receipts)
        folder.remove(WORK)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return summary
