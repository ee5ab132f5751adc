"""Jobs of a tiny model into folders, and what they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from polyvec import Embedder
from polyvec.batch.engines import Here
from polyvec.batch.job import Job
from polyvec.batch.output import Output as Finished
from polyvec.batch.run import Prepared, prepare, run
from polyvec.cli.common import make_stamp
from polyvec.samples import corpus


@dataclass(frozen=True)
class Output:
    """What a job left in its folder."""

    folder: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "_manifest.json").read_text(encoding="utf-8")))

    @property
    def table(self) -> pa.Table:
        """All rows, in the order of the input."""
        return pa.concat_tables([table for _, table in Finished(str(self.folder)).tables()])

    @property
    def rejects(self) -> list[dict[str, Any]]:
        lines = (self.folder / "_rejects.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def parts(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.glob("part-*")}


@pytest.fixture(scope="session")
def calibrated(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with ranges for int8."""
    folder = tmp_path_factory.mktemp("calibrated") / "tiny"
    shutil.copytree(model_folder, folder)
    Embedder(folder, engine="onnx").calibrate(row["text"] for row in corpus()[:20])
    return folder


@pytest.fixture(scope="session")
def embedder(calibrated: Path) -> Embedder:
    return Embedder(calibrated, engine="onnx")


@pytest.fixture(scope="session")
def new_job(embedder: Embedder) -> Callable[..., Job]:
    """Make a job of the tiny model: small parts, and any field by name."""

    def make(source: Path | str, **fields: Any) -> Job:
        job = Job(**{"source": str(source), "model": str(embedder.folder), "part_rows": 4, **fields})
        stamp = make_stamp(embedder, task=job.task, dimensions=job.dimensions, dtype=job.dtype)
        return Job(**{**{k: getattr(job, k) for k in job.__dataclass_fields__}, "stamp": stamp})

    return make


@pytest.fixture(scope="session")
def embed(new_job: Callable[..., Job]) -> Callable[..., Output]:
    """Run a job on this process from beginning to end."""

    def start(source: Path | str, output: Path, *, replace: bool = False, **fields: Any) -> Output:
        place = Here()
        run(prepare(new_job(source, **fields), str(output), place, replace=replace), place)
        return Output(output)

    return start


@pytest.fixture(scope="session")
def plan(new_job: Callable[..., Job]) -> Callable[..., Prepared]:
    """Plan a job and embed nothing."""

    def start(source: Path | str, output: Path, *, replace: bool = False, **fields: Any) -> Prepared:
        return prepare(new_job(source, **fields), str(output), Here(), replace=replace)

    return start
