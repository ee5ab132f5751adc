"""Teachers: ONNX sentence encoders whose vectors a student learns, alone or several as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.progress import track
from tokenizers import Tokenizer

from polyvec.inference.batching import plan_batches

FloatArray = NDArray[np.float32]


class OnnxTeacher:
    """A mean-pooled BERT-like encoder from a folder with ``tokenizer.json`` and ``onnx/model.onnx``."""

    def __init__(self, folder: Path, *, max_tokens: int = 256) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(max_tokens)
        self.tokenizer.no_padding()
        self.session = ort.InferenceSession(str(folder / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
        self._needs_types = any(i.name == "token_type_ids" for i in self.session.get_inputs())

    def encode(self, texts: Sequence[str], *, batch_tokens: int = 4096) -> FloatArray:
        """Return (B, D) unit rows, in the order of ``texts``."""
        rows = [e.ids for e in self.tokenizer.encode_batch(list(texts))]
        plan = plan_batches([len(r) for r in rows], batch_tokens=batch_tokens)
        vectors: FloatArray | None = None
        for batch in track(plan, description="teacher"):
            lengths = np.array([len(rows[i]) for i in batch])
            ids = np.zeros((len(batch), lengths.max()), np.int64)
            for row, index in zip(ids, batch, strict=True):
                row[: len(rows[index])] = rows[index]
            mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
            feed = {"input_ids": ids, "attention_mask": mask}
            if self._needs_types:
                feed["token_type_ids"] = np.zeros_like(ids)
            states = self.session.run(None, feed)[0]
            pooled = np.einsum("btd,bt->bd", states, mask.astype(np.float32)) / lengths[:, None]
            if vectors is None:
                vectors = np.empty((len(rows), pooled.shape[1]), np.float32)
            vectors[batch] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        assert vectors is not None
        return vectors


def combine(teachers: Sequence[FloatArray], *, width: int) -> FloatArray:
    """Return (B, width) unit targets whose cosines are the mean of the teachers' centred cosines.

    Each teacher is centred, because one with all cosines near 0.8 says little about which texts differ, and rescaled;
    side by side, their dot product is the sum of the dot products. The rotation onto principal axes keeps dot products
    and orders the components by variance, so that the first components of a target are its best short form: a student
    that matches them at every width is Matryoshka from the start.
    """
    centred = [t - t.mean(axis=0) for t in teachers]
    joined = np.concatenate([c / np.linalg.norm(c, axis=1, keepdims=True) for c in centred], axis=1)
    _, axes = np.linalg.eigh(joined.T @ joined / len(joined))
    targets = joined @ axes[:, ::-1][:, :width]
    return np.asarray(targets / np.linalg.norm(targets, axis=1, keepdims=True), dtype=np.float32)


def extend(targets: FloatArray, known: FloatArray, others: FloatArray) -> FloatArray:
    """Return (P, D) unit targets of texts that only one teacher reads, from what it says of those that all read.

    ``known`` (B, S) are that teacher's vectors of the texts with ``targets`` (B, D), ``others`` (P, S) its vectors of
    the rest. The linear map that fits best takes it from its space to that of all: what it cannot know of the others'
    opinion comes out as their mean.
    """
    mean = known.mean(axis=0)
    centred = known - mean
    gram = centred.T @ centred
    ridge = 1e-4 * float(np.trace(gram)) / len(gram) * np.eye(len(gram), dtype=np.float32)
    found = (others - mean) @ np.linalg.solve(gram + ridge, centred.T @ targets)
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float32)
