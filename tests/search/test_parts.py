"""A vector in two parts keeps its cosines, as far as the bits that store it go."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from polyvec.errors import InputError
from polyvec.inference.quantize import unit
from polyvec.search import parts
from polyvec.search.store import Passage, Store

RNG = np.random.default_rng(0)
#: Components that fall as those of a Matryoshka model do.
VECTORS = unit((RNG.normal(size=(400, 384)) * np.geomspace(1, 0.1, 384)).astype(np.float32))


# A sign loses 1 - 2 / pi of a component's own square, so a vector's cosine with itself is the most wrong.
@pytest.mark.parametrize(
    ("dtype", "bytes_each", "error"),
    [("float32", 1536, 1e-6), ("float16", 768, 1e-3), ("int8", 256 + 256 + 4, 2e-3), ("binary", 256 + 32 + 4, 0.11)],
)
def test_cosines_survive_their_storage(dtype: str, bytes_each: int, error: float) -> None:
    table = pa.table(parts.split(VECTORS, dtype))
    assert table.column_names == parts.part_names(384, dtype)
    assert sum(column.nbytes for column in table.itercolumns()) == bytes_each * len(VECTORS)
    query = VECTORS[7]
    np.testing.assert_allclose(parts.cosines(query, table, dtype), VECTORS @ query, atol=error)


@pytest.mark.parametrize("dtype", parts.DTYPES)
@pytest.mark.parametrize("width", [6, 64, 128, 130, 256])
def test_every_width_has_a_head(dtype: str, width: int) -> None:
    vectors = unit(VECTORS[:, :width])
    table = pa.table(parts.split(vectors, dtype))
    assert table.column_names == parts.part_names(width, dtype)
    assert table["head"].type.list_size == (width if "float" in dtype else min(width, 128))
    np.testing.assert_allclose(parts.cosines(vectors[3], table, dtype), vectors @ vectors[3], atol=0.11)


@pytest.mark.parametrize("dtype", parts.DTYPES)
def test_the_whole_vector_decides_the_order(dtype: str, tmp_path: Path) -> None:
    """Passages that share a head differ in their rest alone."""
    vectors = np.zeros((3, 256), np.float32)
    vectors[:, 0] = 0.8
    vectors[[0, 1, 2], [200, 201, 202]] = 0.6
    store = Store(tmp_path / "db", {"dimensions": 256, "dtype": dtype})
    store.write([Passage("a", i, i + 1, f"word{i}") for i in range(3)], vectors, {"a": "d"})
    for i in range(3):
        hits = Store(tmp_path / "db").search(vectors[i], "", mode="vector", top=2)
        assert hits[0].passage.text == f"word{i}" and hits[0].score > hits[1].score


def test_a_dtype_that_is_none_is_an_error() -> None:
    with pytest.raises(
        InputError, match="dtype of a database must be one of float32, float16, int8, binary, got 'int4'"
    ):
        parts.check_dtype("int4")
