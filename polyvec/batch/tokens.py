"""Tokenising on machines and cores of its own, beside workers whose devices would wait for it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import lru_cache

from polyvec.batch.job import Job
from polyvec.batch.plan import Work
from polyvec.batch.trial import WorkerError
from polyvec.errors import PolyvecError
from polyvec.model.config import ModelConfig
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import read_config
from polyvec.tasks import resolve_task
from polyvec.text.tokenizer import Tokenizer


def tokenised(work: Work, job: Job, digest: str) -> Work | PolyvecError:
    """Return ``work`` with the tokens of its texts, or what stops the job: here lies another tokenizer.

    ``digest`` is what ``tokenizer_hash`` says where the job was started.
    """
    try:
        tokenizer, config = _open(job.model)
        here = tokenizer_hash(job.model)
    except PolyvecError as error:
        return error
    if here != digest:
        return WorkerError(
            f"every machine must have the same tokenizer, got {here} for {digest}; put one model on shared disk"
        )
    texts = work.texts()
    limit = config.max_tokens if job.late_chunking is None else None
    prompt = resolve_task(job.task, config.prompts).prompt
    try:
        tokenise = tokenizer.tokens_batch if job.late_chunking is None else tokenizer.encode_batch
        return replace(work, tokens=tokenise(texts, [prompt] * len(texts), limit))
    except Exception:  # whatever a text does to the tokenizer, the worker finds out which
        return work


@lru_cache(maxsize=1)
def tokenizer_hash(model: str | None) -> str:
    """Return 16 hex digits of the model's tokenizer on this machine."""
    return hashlib.sha256((resolve_model_folder(model) / "tokenizer.json").read_bytes()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _open(model: str | None) -> tuple[Tokenizer, ModelConfig]:
    folder = resolve_model_folder(model)
    config = read_config(folder)
    return Tokenizer.from_file(folder / "tokenizer.json", **config.tokenizer_ids), config
