"""What can be evaluated: models of ours and peers, behind one function from texts and a task to full-width vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError
from polyvec.evaluation.metrics import Vectors
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import check_output_type, quantize, unit


@dataclass(frozen=True)
class System:
    """A model under its name, with a hash of its weights and the engine that runs it.

    ``encode`` maps texts and a task, or None for no adapter, to unit rows (B, D); ``convert`` cuts them to a width
    (B, M) and a dtype; ``prompts`` are those it adds, by task. A peer without tasks has no prompts.
    """

    name: str
    weights: str
    engine: str
    width: int
    encode: Callable[[Sequence[str], str | None], Vectors]
    convert: Callable[[Vectors, int, str], NDArray[Any]]
    prompts: dict[str, str]


def open_system(name: str, *, engine: str = "auto") -> System:
    """Return the model called ``name``: a folder or name that ``Embedder`` takes, or ``st:FOLDER`` for a peer.

    ``st:`` opens a folder of sentence-transformers. Raises ``InputError`` for a folder that is not there.
    """
    if name.startswith("st:"):
        return _sentence_transformer(Path(name[3:]))
    embedder = Embedder(None if name == "polyvec-mini" else name, engine=engine)
    return System(
        name, embedder.weights_hash, embedder.engine.name, embedder.config.hidden_size,
        lambda texts, task: embedder.encode(list(texts), task=task),
        lambda vectors, width, dtype: embedder.convert(vectors, dimensions=width, dtype=dtype),
        dict(embedder.config.prompts),
    )  # fmt: skip


def _sentence_transformer(folder: Path) -> System:
    if not folder.is_dir():
        raise InputError(f"st:FOLDER must be a folder of sentence-transformers, got none at {folder}; fetch it")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("st:FOLDER needs sentence-transformers: pip install sentence-transformers") from error
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode(texts: Sequence[str], task: str | None) -> Vectors:
        vectors = model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)
        return unit(np.asarray(vectors, np.float32))

    def convert(vectors: Vectors, width: int, dtype: str) -> NDArray[Any]:
        check_output_type(dtype, width, {})
        return quantize(unit(vectors[:, :width]), dtype, {})

    width = int(model.encode(["a"]).shape[1])
    return System(f"st:{folder}", _folder_hash(folder), "sentence-transformers", width, encode, convert, {})


def _folder_hash(folder: Path) -> str:
    """Return 16 hex digits of every weight, tokenizer and setting in a folder."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".json", ".txt", ".model")):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
