"""A unit vector in a database: whole, or its first components, which are searched, and the rest in fewer bits.

Matryoshka training puts what matters first (arXiv 2205.13147), so the head alone finds the candidates: of 100 000
texts, the 320 with the nearest heads hold all of the ten nearest. The rest settles their order; it has a scale of its
own a vector, while the question keeps all of its bits, and no component is stored twice. Floats stay whole: a search by
one bit of each of their components finds more in less time (benchmarks/results/2026-11-25-index.md).

Shape letters: B vectors, M kept width, H components of the head.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError

#: How vectors are stored; of int8 and binary, what follows a head of float16.
DTYPES = ("float32", "float16", "int8", "binary")

_HEAD = 128


def check_dtype(dtype: str) -> None:
    """Raise ``InputError`` unless a database can store ``dtype``."""
    if dtype not in DTYPES:
        raise InputError(f"dtype of a database must be one of {', '.join(DTYPES)}, got {dtype!r}")


def head_width(dimensions: int, dtype: str) -> int:
    """Return H: 128 of int8 and binary, unless all components are fewer; else all."""
    return dimensions if dtype in ("float32", "float16") else min(_HEAD, dimensions)


def part_names(dimensions: int, dtype: str) -> list[str]:
    """Return the names of the columns that hold a vector."""
    return ["head"] if head_width(dimensions, dtype) == dimensions else ["head", "tail", "scale"]


def split(vectors: NDArray[np.float32], dtype: str) -> dict[str, Any]:
    """Return unit vectors (B, M) as Arrow columns."""
    import pyarrow as pa

    width = head_width(vectors.shape[1], dtype)
    head, tail = vectors[:, :width], vectors[:, width:]
    parts: dict[str, Any] = {"head": _column(head if dtype == "float32" else head.astype(np.float16))}
    if not tail.shape[1]:
        return parts
    if dtype == "int8":
        scale = np.abs(tail).max(axis=1) / 127
        parts["tail"] = _column(np.rint(tail / np.maximum(scale, 1e-12)[:, None]).astype(np.int8))
    else:
        scale = np.abs(tail).mean(axis=1)
        parts["tail"] = _column(np.packbits(tail > 0, axis=1))
    return {**parts, "scale": pa.array(scale.astype(np.float32))}


def cosines(query: NDArray[np.float32], parts: Any, dtype: str) -> NDArray[np.float32]:
    """Return the cosines (B,) of a unit ``query`` (M,) with the vectors in the Arrow table ``parts``."""
    head = _matrix(parts["head"])
    width = head.shape[1]
    scores = head.astype(np.float32) @ query[:width]
    if width < len(query):
        tail = _matrix(parts["tail"])
        if dtype == "binary":
            tail = np.unpackbits(tail, axis=1, count=len(query) - width).astype(np.float32) * 2 - 1
        scores = scores + (tail.astype(np.float32) @ query[width:]) * parts["scale"].to_numpy()
    return np.asarray(scores, dtype=np.float32)


def _column(rows: NDArray[Any]) -> Any:
    import pyarrow as pa

    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), rows.shape[1])


def _matrix(column: Any) -> NDArray[Any]:
    flat: NDArray[Any] = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(len(column), column.type.list_size)
