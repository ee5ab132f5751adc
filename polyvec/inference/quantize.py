"""Embeddings as numbers of fewer bits, in a way that stays comparable from call to call.

Shape letters: B texts, M kept width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError

OutputType = Literal["float32", "float16", "int8", "binary", "ubinary"]
OUTPUT_TYPES: tuple[str, ...] = get_args(OutputType)


def calibrate(embeddings: NDArray[np.float32], dims: tuple[int, ...]) -> dict[int, float]:
    """Return for each width the magnitude that int8 maps to 127: the 99.99th percentile of a sample's components.

    ``embeddings`` (B, D) of a text sample, not normalised. One magnitude for all components, so that the dot product of
    two int8 vectors is their cosine times a constant.
    """
    ranges = {}
    for dim in dims:
        cut = embeddings[:, :dim]
        unit = np.abs(cut) / np.linalg.norm(cut, axis=1, keepdims=True)
        ranges[dim] = round(float(np.quantile(unit, 0.9999)), 5)
    return ranges


def quantize(embeddings: NDArray[np.float32], dtype: str, ranges: Mapping[int, float]) -> NDArray[Any]:
    """Return unit rows (B, M) as ``dtype``.

    ``int8``: (B, M), components over the calibrated range of this width, times 127, clipped. ``binary`` and
    ``ubinary``: (B, M / 8), one sign a bit, packed as sentence-transformers does (``binary`` is ``ubinary`` - 128).
    """
    if dtype == "float32":
        return embeddings
    if dtype == "float16":
        return embeddings.astype(np.float16)
    if dtype == "int8":
        scaled = np.rint(embeddings * (127 / ranges[embeddings.shape[1]]))
        return np.asarray(np.clip(scaled, -127, 127), dtype=np.int8)
    bits: NDArray[np.uint8] = np.packbits(embeddings > 0, axis=1)
    return bits if dtype == "ubinary" else np.asarray(bits.astype(np.int16) - 128, dtype=np.int8)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return float rows (B, M) at length 1; a row of zeros stays."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def as_unit(vectors: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return rows of any output type as float32 (B, M) whose dot products are cosines; of bits, those of the signs."""
    if dtype in ("binary", "ubinary"):
        bits = np.unpackbits((vectors.astype(np.int16) + (128 if dtype == "binary" else 0)).astype(np.uint8), axis=1)
        vectors = bits.astype(np.float32) * 2 - 1
    return unit(vectors.astype(np.float32))


def check_output_type(dtype: str, dimensions: int, ranges: Mapping[int, float]) -> None:
    """Raise ``InputError`` unless vectors of this width can be given as ``dtype``."""
    if dtype not in OUTPUT_TYPES:
        raise InputError(f"dtype must be one of {', '.join(OUTPUT_TYPES)}, got {dtype!r}")
    if dtype in ("binary", "ubinary") and dimensions % 8:
        raise InputError(f"dimensions must be a multiple of 8 to be packed into bits, got {dimensions}")
    if dtype == "int8" and not ranges:
        raise InputError(
            "dtype 'int8' needs calibrated ranges, which this model lacks; write them with Embedder.calibrate(texts)"
        )
    if dtype == "int8" and dimensions not in ranges:
        raise InputError(f"dimensions must be a calibrated width for int8, one of {sorted(ranges)}, got {dimensions}")


def smallest_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Return the smallest cosine between vectors (B, M) and (B, M), in turn."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return float(((left * right).sum(axis=1) / norms).min())
