"""A model class of the ``mteb`` package (2.x): each of its task types embedded with the adapter and prompt that fit.

import mteb
from polyvec.evaluation.mteb import MtebModel

mteb.evaluate(MtebModel(), mteb.get_tasks(tasks=["STSBenchmark"]))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polyvec.errors import InputError, MissingExtraError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.suites import TASKS
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import as_unit

try:
    from mteb.models import ModelMeta
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise MissingExtraError.of("polyvec.evaluation.mteb", "mteb") from error

#: MTEB's task types -> our kinds, whose tasks are those of the paper.
_KINDS = {
    "STS": "sts",
    "Summarization": "sts",
    "BitextMining": "bitext",
    "Retrieval": "retrieval",
    "InstructionRetrieval": "retrieval",
    "Reranking": "reranking",
    "InstructionReranking": "reranking",
    "Clustering": "clustering",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "PairClassification": "pair-classification",
}
#: Retrieval of like by like: both sides are embedded for text matching (Sturua et al. 2024, section 5.2).
_SYMMETRIC = ("ArguAna", "CQADupstack", "Quora")


def task_of(task_type: str, task_name: str, side: str | None) -> str:
    """Return our task for a text of MTEB's; ``side`` is query, document or None.

    Raises ``InputError`` for a task type that has no adapter.
    """
    if task_type not in _KINDS:
        raise InputError(f"MTEB's task type must be one of {', '.join(_KINDS)}, got {task_type!r} of {task_name}")
    if task_type == "Retrieval" and task_name.startswith(_SYMMETRIC):
        return "text-matching"
    query, passage = TASKS[_KINDS[task_type]]
    return passage if side == "document" else query


class MtebModel(AbsEncoder):
    """An ``Embedder`` as mteb wants it; ``model`` and ``engine`` as there.

    ``dimensions`` and ``dtype`` are those of the vectors that mteb scores; what fewer bits lose is lost here too.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        revision: str | None = None,
        *,
        dimensions: int | None = None,
        dtype: str = "float32",
        engine: str = "auto",
        device: str | None = None,
        **_: Any,
    ) -> None:
        self.embedder = Embedder(model, engine=engine, device=device)
        self.dimensions, self.dtype = dimensions, dtype
        width = dimensions or self.embedder.config.hidden_size
        stem = Path(self.embedder.model_name).name
        # The name and revision are the key of mteb's cache: another width, dtype or weight is another model.
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": f"polyvec/{stem}-{width}-{dtype}",
                "revision": revision or self.embedder.weights_hash,
                "embed_dim": width,
                "max_tokens": self.embedder.max_tokens,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> Vectors:
        """Return unit rows (B, M) for mteb's batches of ``{"text": [...]}``."""
        task = task_of(task_metadata.type, task_metadata.name, None if prompt_type is None else prompt_type.value)
        texts = [text for batch in inputs for text in batch["text"]]
        vectors = self.embedder.encode(texts, task=task, dimensions=self.dimensions, dtype=self.dtype)
        return np.asarray(as_unit(vectors, self.dtype))
