"""One slice at a time: its distinct texts become vectors, its part and its receipt. The same on one process or many."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from polyvec.batch.ceiling import set_ceiling, told
from polyvec.batch.formats import Receipt, format_of
from polyvec.batch.job import Job
from polyvec.batch.parts import Result, lent_bytes, part_table, read_lent, types_of
from polyvec.batch.plan import Work
from polyvec.batch.rows import Row
from polyvec.batch.storage import WORK, Folder
from polyvec.batch.trial import Trial, WorkerError
from polyvec.errors import InputError, TruncationWarning
from polyvec.inference.embedder import Embedder
from polyvec.tasks import resolve_task
from polyvec.text.tokenizer import Tokens

T = TypeVar("T")

_LENT_IN_MEMORY = 16  # lent tables of other parts that a worker keeps
_NO_CHUNK = "must hold text to cut into chunks, got none"


class Worker:
    """Embeds slices into ``folder``. ``schema`` is that of the records of a part.

    Raises ``WorkerError`` when this machine's model is not the job's, or when the output cannot be written.
    """

    def __init__(
        self, job: Job, folder: Folder, schema: Any, *, threads: int | None = None, memory_mb: float | None = None
    ) -> None:
        self.job, self.folder, self.schema, self._memory_mb = job, folder, schema, memory_mb
        self.embedder = Embedder(job.model, engine=job.engine, threads=threads)
        if self.embedder.weights_hash != job.stamp["weights"]:
            raise WorkerError(
                f"every machine must have the same {self.embedder.model_name}, got weights "
                f"{self.embedder.weights_hash} for {job.stamp['weights']}; put one model on shared disk"
            )
        self._prompt = resolve_task(job.task, self.embedder.config.prompts).prompt
        # The same passes, and so the same bits, on one core or two. Before the ceiling: a lane is a part of the model.
        self._pass_tokens = self.embedder.engine.lane.batch_tokens
        self._known: dict[str, Tokens] = {}
        self._lent = lru_cache(maxsize=_LENT_IN_MEMORY)(self._read_lent)
        if memory_mb is not None:
            set_ceiling(memory_mb)

    def do(self, work: Work) -> Receipt:
        """Embed a slice, or what it lends to others, and write it."""
        self._known = {} if work.tokens is None else dict(zip(work.texts(), work.tokens, strict=True))
        return self._lend(work) if work.is_lending else self._finish(work)

    def _trial(self, work: Work) -> Trial:
        """Return the trial of the texts of ``work`` under this ceiling: a slice that shares other texts since the input
        has changed has another trial, whose indexes mean other texts."""
        texts = hashlib.sha256(json.dumps([self._memory_mb, *work.texts()]).encode()).hexdigest()[:16]
        return Trial(self.folder, f"{work.part.name}-{texts}")

    def _lend(self, work: Work) -> Receipt:
        part = work.part
        trial = self._trial(work)
        results = self._embed(work.texts(), trial)
        named = dict(zip(part.lends, results, strict=True))
        self._try(self.folder.write, lent_name(part.name), lent_bytes(named, self.job))
        trial.close()
        return {"lent": part.name, "tokens": sum(r.num_tokens for r in results if isinstance(r, Result))}

    def _finish(self, work: Work) -> Receipt:
        """Embed what is left of a part and write it, then its receipt, without which it does not count."""
        started = time.perf_counter()
        part, piece = work.part, work.piece
        trial = self._trial(work)
        results = self._results(work, trial)
        good: list[tuple[Row, Result]] = []
        rejects = []
        for row in piece.rows:
            result = row.fault if row.fault is not None else results[row.text]
            if isinstance(result, Result):
                good.append((row, result))
            else:
                rejects.append({"row": row.where, "id": row.kept.get("id"), "reason": result})
        table = self._table(good, piece.rows[0].where)
        receipt = {
            "part": part.name,
            **self._try(format_of(self.folder).write, self.folder, part.name, table),
            "types": types_of(self.schema),
            "first_row": piece.rows[0].where,
            "rows": len(good),
            "tokens": sum(result.num_tokens for _, result in good),
            "truncated": sum(result.truncated for _, result in good),
            "rejects": rejects,
            "seconds": round(time.perf_counter() - started, 3),
        }
        data = json.dumps(receipt, ensure_ascii=False, default=str).encode()
        self._try(self.folder.write, receipt_name(part.name), data)
        trial.close()
        return receipt

    def _table(self, good: list[tuple[Row, Result]], where: str) -> Any:
        import pyarrow as pa

        try:
            return part_table([(row.kept, result) for row, result in good], self.schema, self.job.stamp)
        except pa.ArrowException as error:  # a whole number that has no place in a column with fractions elsewhere
            raise InputError(
                f"columns that are kept must each have one type, got near {where}: {error}; "
                "leave the column out of --keep and --id"
            ) from error

    def _results(self, work: Work, trial: Trial) -> dict[str, Result | str]:
        """Return the result of every text of a slice: lent, borrowed, or embedded now."""
        part, rows = work.part, work.piece.rows
        results: dict[str, Result | str] = {rows[i].text: self._lent(part.name)[i] for i in part.lends}
        results |= {rows[i].text: self._lent(lender)[at] for i, (lender, at) in part.borrows.items()}
        texts = work.texts()
        results.update(zip(texts, self._embed(texts, trial), strict=True))
        return results

    def _embed(self, texts: list[str], trial: Trial) -> list[Result | str]:
        """Return what each of some distinct texts became, or why it became nothing."""
        over = self._over_the_limit(texts)
        found = trial.run([text for i, text in enumerate(texts) if i not in over], self._encode)
        # A text without a chunk would have no row: with a reason it is not lost.
        outcomes = iter(
            [trial.guilty[i][0] if r is None else r if len(r.vectors) else _NO_CHUNK for i, r in enumerate(found)]
        )
        return [over[i] if i in over else next(outcomes) for i in range(len(texts))]

    def _over_the_limit(self, texts: list[str]) -> dict[int, str]:
        if self.job.truncate or self.job.late_chunking is not None:
            return {}
        limit = self.embedder.max_tokens
        tokens = self._tokens(texts)
        if tokens is None:
            tokens = self.embedder.tokenizer.tokens_batch(texts, [self._prompt] * len(texts), limit)
        return {i: f"must be at most {limit} tokens, got more" for i, own in enumerate(tokens) if own.truncated}

    def _tokens(self, texts: list[str]) -> list[Tokens] | None:
        """Return the tokens of texts that were tokenised elsewhere."""
        return [self._known[text] for text in texts] if self._known else None

    def _encode(self, texts: list[str]) -> list[Result]:
        job = self.job
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # the parts say it, row by row
            stream = self.embedder.encode_stream(
                texts, task=job.task, dimensions=job.dimensions, dtype=job.dtype, late_chunking=job.late_chunking,
                batch_tokens=self._pass_tokens, tokens=self._tokens(texts),
            )  # fmt: skip
            try:
                return [Result.of(embedding) for embedding in stream]
            except Exception as error:
                raise told(error, self._memory_mb) from error

    def _read_lent(self, lender: str) -> dict[int, Result | str]:
        data = self.folder.read(lent_name(lender))
        if data is None:  # embedded before this part; another job of the folder has ended meanwhile and cleaned up
            raise WorkerError(
                f"output must be of one job at a time, got {self.folder.location} without what {lender} lends; "
                "run the same command again"
            )
        return read_lent(data, self.job)

    def _try(self, write: Callable[..., T], *arguments: Any) -> T:
        try:
            return write(*arguments)
        except OSError as error:
            raise cannot_write(self.folder, error) from error


def cannot_write(folder: Folder, error: OSError) -> WorkerError:
    return WorkerError(f"output must be a folder to write in, with room left, got {folder.location}: {error}")


def lent_name(part: str) -> str:
    return f"{WORK}/lent/{part}.parquet"


def receipt_name(part: str) -> str:
    return f"{WORK}/receipts/{part}.json"
