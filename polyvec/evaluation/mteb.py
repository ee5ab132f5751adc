"""A model class of the ``mteb`` package (2.x): each of its task types embedded with the adapter and prompt that fit.

import mteb
from polyvec.evaluation.mteb import MtebModel

mteb.evaluate(MtebModel(), mteb.get_tasks(tasks=["STSBenchmark"]))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from polyvec import __version__
from polyvec.atomic import write_json
from polyvec.errors import InputError, MissingExtraError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.suites import TASKS
from polyvec.evaluation.systems import System, of_embedder, open_system
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import as_unit
from polyvec.model.hub import MINI

try:
    import mteb
    from mteb.cache import ResultCache
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
#: Retrieval of like by like, and LongEmbed: both sides are embedded for text matching (Sturua et al. 2024, section 5).
_SYMMETRIC = ("ArguAna", "CQADupstack", "Quora", "LEMB")


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
    """A model as mteb wants it: an ``Embedder``, a ``System``, or what ``open_system`` opens.

    ``dimensions`` and ``dtype`` are those of the vectors that mteb scores; what fewer bits lose is lost here too.
    Raises ``InputError`` for those that the model does not have.
    """

    def __init__(
        self,
        model: str | Path | Embedder | System | None = None,
        revision: str | None = None,
        *,
        dimensions: int | None = None,
        dtype: str = "float32",
        engine: str = "auto",
        **_: Any,
    ) -> None:
        if isinstance(model, Embedder):
            model = of_embedder(model, model.model_name)
        self.system = model if isinstance(model, System) else open_system(str(model or MINI), engine=engine)
        if self.system.encode is None:
            raise InputError(f"mteb scores vectors, and {self.system.name} has none; leave it out")
        self.dimensions, self.dtype = self.system.width if dimensions is None else dimensions, dtype
        self.system.convert(np.eye(1, self.system.width, dtype=np.float32), self.dimensions, dtype)  # told before hours
        stem = Path(self.system.name).name
        # The name and revision are the key of mteb's cache: another width, dtype, engine or weight is another model.
        self.meta = ModelMeta.create_empty(
            {
                "name": f"polyvec/{stem}-{self.system.engine}-{self.dimensions}-{self.dtype}",
                "revision": revision or self.system.weights,
                "embed_dim": self.dimensions,
                "similarity_fn_name": ScoringFunction.COSINE,
            }
        )
        self.mteb_model_meta = self.meta

    @property
    def stamp(self) -> dict[str, Any]:
        """What made the scores: weights, the adapter and prompt of each task type, vectors, engine, versions."""
        sides = {kind: [task_of(kind, "", side) for side in ("query", "document")] for kind in _KINDS}
        prompts = self.system.prompts
        return {
            "model": self.system.name,
            "weights": self.system.weights,
            "engine": self.system.engine,
            "dimensions": self.dimensions,
            "dtype": self.dtype,
            "tasks": {
                kind: [{"adapter": task, "prompt": prompts[task]} for task in tasks] if prompts else None
                for kind, tasks in sides.items()
            },
            "text-matching on both sides": list(_SYMMETRIC),
            "versions": {"polyvec": __version__, "mteb": version("mteb"), "numpy": np.__version__},
        }

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
        system = self.system
        assert system.encode is not None
        vectors = system.encode(texts, task if system.prompts else None, system.prompts.get(task, ""))
        return np.asarray(as_unit(system.convert(vectors, self.dimensions, self.dtype), self.dtype))


def run_mteb(
    tasks: Sequence[Any],
    systems: Sequence[System],
    folder: Path,
    *,
    dimensions: Sequence[int | None] = (None,),
    dtypes: Sequence[str] = ("float32",),
) -> Iterator[str]:
    """Yield a line about every one of mteb's ``tasks``, for every model, width and dtype.

    Results are in mteb's own JSON under ``folder/results``, where a run goes on, each model's stamp in
    ``folder/stamps``. Raises ``InputError`` for data that cannot be had.
    """
    cache = ResultCache(folder)
    (folder / "stamps").mkdir(parents=True, exist_ok=True)
    for system in systems:
        for width in dimensions:
            for dtype in dtypes:
                model = MtebModel(system, dimensions=width, dtype=dtype)
                name = str(model.meta.name)
                stamp = re.sub(r"[^\w.-]+", "_", f"{name}--{model.meta.revision}")
                write_json(model.stamp, folder / "stamps" / f"{stamp}.json")
                for task in tasks:
                    yield f"{name}  {task.metadata.name}  {_main_score(model, task, cache):.4f}"


def find_tasks(name: str) -> list[Any]:
    """Return mteb's tasks of a benchmark, or the task, called ``name``. Raises ``InputError`` for an unknown one."""
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError:
        pass
    try:
        return list(mteb.get_tasks(tasks=[name]))
    except (KeyError, ValueError) as error:
        raise InputError(f"--mteb must name a benchmark or task of mteb {version('mteb')}, got {name!r}") from error


def _main_score(model: MtebModel, task: Any, cache: ResultCache) -> float:
    try:
        if cache.load_task_result(task.metadata.name, model.meta) is None:
            task.load_data()
    except Exception as error:  # of the hub, its client, datasets and the network under them
        raise InputError(
            f"the data of MTEB's {task.metadata.name} must come from huggingface.co or its cache on this machine, got "
            f"{type(error).__name__}; connect, or evaluate files of your own: polyvec evaluate FILE"
        ) from error
    found: Any = model  # which mteb takes for an encoder by its methods
    result = mteb.evaluate(found, task, cache=cache, co2_tracker=False, show_progress_bar=False)
    return float(result.task_results[0].get_score())
