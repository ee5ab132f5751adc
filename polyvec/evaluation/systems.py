"""What can be evaluated: models of ours and peers, behind functions from texts to full-width vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError, MissingExtraError
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.suites import Ranking
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import check_output_type, quantize, unit
from polyvec.model.hub import MINI, resolve_model_folder
from polyvec.model.layouts import weight_files
from polyvec.text.chunking import sentence_spans

#: Texts, an adapter's task or None for the base, a prompt -> unit rows (B, D).
EncodeTexts = Callable[[Sequence[str], "str | None", str], Vectors]
#: The same and whether chunks are read in context -> the unit rows (C, D) of each text's sentences.
EncodeChunks = Callable[[Sequence[str], "str | None", str, bool], list[Vectors]]


def _cut_and_quantize(vectors: Vectors, width: int, dtype: str) -> NDArray[Any]:
    if not 1 <= width <= vectors.shape[1]:
        raise InputError(f"dimensions must be between 1 and {vectors.shape[1]}, got {width}")
    check_output_type(dtype, width, {})
    return quantize(unit(vectors[:, :width]), dtype, {})


@dataclass(frozen=True)
class System:
    """A model under its name, with a hash of its weights and the engine that runs it.

    ``convert`` cuts vectors to a width (B, M) and a dtype; ``prompts`` are those of its tasks, and a peer without tasks
    has none; ``widths`` are the trained ones; ``num_bytes`` what it takes on disk, 0 if that is not known. A system
    that has ``rank`` compares words and gives no vectors: its width is 0.
    """

    name: str
    weights: str
    engine: str
    width: int
    encode: EncodeTexts | None = None
    convert: Callable[[Vectors, int, str], NDArray[Any]] = _cut_and_quantize
    prompts: dict[str, str] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    num_bytes: int = 0
    encode_chunks: EncodeChunks | None = None
    rank: Callable[[Ranking], list[list[str]]] | None = None


def open_system(name: str, *, engine: str = "auto", rope_theta: float | None = None) -> System:
    """Return the model called ``name``: a folder or name that ``Embedder`` takes, or a peer of ``peers.py``.

    ``rope_theta`` replaces the base of the rotary positions, and runs on engine ``torch``: in a graph it is a constant.
    Raises ``InputError`` for a peer that is not there.
    """
    from polyvec.evaluation.peers import is_peer, open_peer  # here, since peers are systems too

    if is_peer(name):
        if rope_theta is not None:
            raise InputError(f"rope_theta needs a model of polyvec, got {name}; leave one of the two out")
        return open_peer(name)
    if rope_theta is not None and not 1 < rope_theta < math.inf:
        raise InputError(f"rope_theta must be a finite number greater than 1, got {rope_theta}; 10000 is common")
    model = None if name == MINI else name
    if rope_theta is None:
        return of_embedder(Embedder(model, engine=engine), name)
    try:
        from polyvec.inference.engines.torch import TorchEngine
        from polyvec.model.weights import load_encoder
    except ImportError as error:
        raise MissingExtraError.of("rope_theta", "torch") from error
    encoder = load_encoder(resolve_model_folder(model))
    encoder.config = replace(encoder.config, rope_theta=rope_theta)
    system = of_embedder(Embedder(model, engine=TorchEngine(encoder)), name)
    return replace(
        system, name=f"{name}, rope theta {rope_theta:g}", weights=f"{system.weights}, rope theta {rope_theta:g}"
    )


def of_embedder(embedder: Embedder, name: str) -> System:
    """Return a model of ours as a system under ``name``."""

    def encode_chunks(texts: Sequence[str], adapter: str | None, prompt: str, late: bool) -> list[Vectors]:
        if late:
            found = embedder.encode(list(texts), task=adapter, prompt=prompt, late_chunking="sentence")
            return [chunks.vectors for chunks in found]
        parts = [[text[slice(*span)] for span in sentence_spans(text)] for text in texts]
        alone = embedder.encode([part for own in parts for part in own], task=adapter, prompt=prompt)
        return np.split(alone, np.cumsum([len(own) for own in parts])[:-1])

    graphs = {"onnx-float32": "model.onnx", "onnx-int8": "model.int8.*"}  # both read tables from the weights
    pattern = graphs.get(embedder.engine.name)
    files = [*weight_files(embedder.folder), *(embedder.folder.glob(pattern) if pattern else ())]
    return System(
        name, embedder.weights_hash, embedder.engine.name, embedder.config.hidden_size,
        lambda texts, adapter, prompt: embedder.encode(list(texts), task=adapter, prompt=prompt),
        lambda vectors, width, dtype: embedder.convert(vectors, dimensions=width, dtype=dtype),
        dict(embedder.config.prompts),
        embedder.dimensions,
        sum(path.stat().st_size for path in files),
        encode_chunks,
    )  # fmt: skip
