"""Where the slices of a job run: this process, or the processes of a Ray cluster. Both do the same in the same way."""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from polyvec.batch.cores import take_cores
from polyvec.batch.formats import Receipt
from polyvec.batch.job import Job
from polyvec.batch.plan import Run, SliceFacts, Work, read_run, slice_facts
from polyvec.batch.rows import Unit
from polyvec.batch.storage import Folder
from polyvec.batch.tokens import tokenised, tokenizer_hash
from polyvec.batch.trial import WorkerError
from polyvec.batch.worker import Worker
from polyvec.errors import InputError, MissingExtraError, PolyvecError


class Place(Protocol):
    """Where slices run. ``workers`` embed at the same time, each in ``memory_mb`` or, with None, in what there is."""

    workers: int
    memory_mb: float | None

    def facts(self, fs: Any, units: Sequence[Unit], job: Job) -> Iterator[list[SliceFacts]]:
        """Yield the facts of the slices of each unit, in order."""
        ...

    def embed(self, fs: Any, runs: Sequence[Run], job: Job, folder: Folder, schema: Any) -> Iterator[Receipt]:
        """Yield the receipt of every part of ``runs``, in any order. Raises ``PolyvecError`` for what stops a job."""
        ...


class Here:
    """This process."""

    workers = 1

    def __init__(self, *, memory_mb: float | None = None) -> None:
        self.memory_mb = memory_mb
        self._worker: Worker | None = None

    def facts(self, fs: Any, units: Sequence[Unit], job: Job) -> Iterator[list[SliceFacts]]:
        for unit in units:
            yield list(slice_facts(fs, unit, job))

    def embed(self, fs: Any, runs: Sequence[Run], job: Job, folder: Folder, schema: Any) -> Iterator[Receipt]:
        for run in runs:
            self._worker = self._worker or Worker(job, folder, schema, memory_mb=self.memory_mb)
            for work in read_run(fs, run, job):
                yield self._worker.do(work)


@dataclass(frozen=True)
class _Given:
    """What every process of a cluster is given."""

    fs: Any
    job: Job
    folder: Folder
    schema: Any
    threads: int
    memory_mb: float | None
    has_gpu: bool


class OnRay:
    """A Ray cluster at ``address``: ``auto`` for the one of this machine, or ``ray://HOST:PORT``.

    A reader's slices stream to ``workers`` actors, each with one model, ``cpus`` cores (its own, without a GPU),
    ``gpus`` of a GPU and ``memory_mb`` that no text may exceed; Ray holds readers back, restarts what dies and runs
    again what was lost. Raises ``InputError`` for a cluster that cannot be reached or that is too small.
    """

    def __init__(
        self,
        address: str,
        *,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        memory_mb: float | None = None,
    ) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"workers must be at least 1, got {workers}")
        if min(cpus, gpus) < 0 or not cpus and not gpus:
            raise InputError(f"a worker must have cores or a share of a GPU, got --cpus {cpus:g} and --gpus {gpus:g}")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "3")  # tries to connect; Ray's 20 take ten minutes
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError.of("--cluster", "cluster") from error
        self._ray = ray
        try:
            _check_port(address)
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"cluster must be reachable, got {address}: {reason}; start one with: ray start --head"
            ) from error
        have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        most = int(have.get("GPU", 0) / gpus if gpus else have.get("CPU", 0) / cpus)
        self.workers = workers or max(1, most)
        if self.workers > most:
            raise InputError(
                f"workers must be at most {most}, what the cluster has of {'GPU' if gpus else 'CPU'}, got {workers}"
            )
        self._cpus, self._gpus, self.memory_mb, self._cores = cpus, gpus, memory_mb, have.get("CPU", 0)
        context = ray.data.DataContext.get_current()
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # after ray.data is there, which sets it when it comes
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a block is one slice: what a death costs, and what a worker waits for

    def facts(self, fs: Any, units: Sequence[Unit], job: Job) -> Iterator[list[SliceFacts]]:
        if len(units) == 1:  # a process elsewhere would take longer to start than to read it
            yield list(slice_facts(fs, units[0], job))
            return
        items = [pickle.dumps((i, fs, unit, job)) for i, unit in enumerate(units)]
        found: dict[int, list[SliceFacts]] = {}
        for i, facts in self._results(self._items(items).map(_facts)):
            found[i] = facts
        yield from (found[i] for i in range(len(units)))

    def embed(self, fs: Any, runs: Sequence[Run], job: Job, folder: Folder, schema: Any) -> Iterator[Receipt]:
        if not runs:
            return
        # By value: what an actor is made from must outlive every node, or it could not be made again.
        threads = max(1, int(self._cpus))
        given = pickle.dumps(_Given(fs, job, folder, schema, threads, self.memory_mb, self._gpus > 0))
        workers = min(self.workers, sum(len(run.parts) for run in runs))
        resources = {"num_cpus": self._cpus, "num_gpus": self._gpus, "memory": (self.memory_mb or 0) * 2**20}
        slices = self._items([pickle.dumps((fs, run, job)) for run in runs]).flat_map(_read, num_cpus=0)
        if self._gpus:  # a GPU waits for a core that makes its tokens; a core would only wait for itself
            spare = int(self._cores - workers * self._cpus)
            # Asking for no core: where the workers have them all, it would wait for one for ever.
            slices = slices.map(
                _tokenise, fn_args=(pickle.dumps((job, tokenizer_hash(job.model))),), num_cpus=0,
                compute=self._ray.data.TaskPoolStrategy(size=max(1, spare)),
            )  # fmt: skip
        yield from self._results(
            slices.map_batches(
                _Embed, fn_constructor_args=(given,), batch_size=1, batch_format="numpy",
                compute=self._ray.data.ActorPoolStrategy(size=workers), **{k: v for k, v in resources.items() if v},
            )
        )  # fmt: skip

    def _items(self, items: Sequence[bytes]) -> Any:
        return self._ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))

    def _results(self, data: Any) -> Iterator[Any]:
        try:
            for row in data.iter_rows():
                result = pickle.loads(row["item"])
                if isinstance(result, PolyvecError):
                    raise result
                yield result
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise WorkerError(
                f"cluster must stay up, got: {reason}; finished parts stay, run the same command again"
            ) from error


def _check_port(address: str) -> None:
    """Raise ``OSError`` if nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """A unit to its facts, or to the error that stops the job."""
    i, fs, unit, job = pickle.loads(row["item"])
    try:
        return {"item": pickle.dumps((i, list(slice_facts(fs, unit, job))))}
    except PolyvecError as error:
        return {"item": pickle.dumps(error)}


def _read(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A run to its slices."""
    fs, run, job = pickle.loads(row["item"])
    try:
        for work in read_run(fs, run, job):
            yield {"item": pickle.dumps(work)}
    except PolyvecError as error:
        yield {"item": pickle.dumps(error)}


def _tokenise(row: dict[str, Any], given: bytes) -> dict[str, Any]:
    """A slice to itself with its tokens."""
    work = pickle.loads(row["item"])
    return {"item": pickle.dumps(tokenised(work, *pickle.loads(given)) if isinstance(work, Work) else work)}


class _Embed:
    """A worker: slices to receipts."""

    def __init__(self, given: bytes) -> None:
        from ray.util.metrics import Counter

        self._given: _Given = pickle.loads(given)
        names = ("rows", "tokens", "rejects")
        self._counters = {n: Counter(f"polyvec_{n}_total", description=f"{n} of this worker") for n in names}
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"item": [pickle.dumps(self._done(pickle.loads(item))) for item in batch["item"]]}

    def _done(self, work: Work | PolyvecError) -> Receipt | PolyvecError:
        if isinstance(work, PolyvecError):
            return work
        given = self._given
        try:
            if self._worker is None:
                if not given.has_gpu:
                    take_cores(given.threads)
                self._worker = Worker(
                    given.job, given.folder, given.schema, threads=given.threads, memory_mb=given.memory_mb
                )
            receipt = self._worker.do(work)
        except PolyvecError as error:
            return error
        except OSError as error:
            return WorkerError(f"output must be readable and writable, got {given.folder.location}: {error}")
        for name, counter in self._counters.items():
            value = receipt.get(name, 0)
            if count := len(value) if isinstance(value, list) else value:  # Ray refuses to count nothing
                counter.inc(count)
        return receipt
