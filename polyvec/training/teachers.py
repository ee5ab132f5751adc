"""What several teachers say of texts, as one target for each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


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
