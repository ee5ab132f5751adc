"""Output types: what they keep of a cosine, and that they compare from call to call."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from polyvec import Embedder, InputError
from polyvec.inference.quantize import calibrate, quantize

TEXTS = ["the router is on", "night train", "пароль", "打印机 and the router"]


@pytest.fixture
def calibrated(model_folder: Path, tmp_path: Path) -> Embedder:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    Embedder(folder).calibrate(TEXTS)
    return Embedder(folder)


def test_ranges_are_measured_once(calibrated: Embedder) -> None:
    before = calibrated.encode(TEXTS, dtype="int8")
    with pytest.raises(InputError, match=r"int8 ranges must be measured once, got a model with .*int8_ranges\.json"):
        calibrated.calibrate(TEXTS[:2])
    np.testing.assert_array_equal(Embedder(calibrated.folder).encode(TEXTS, dtype="int8"), before)


def test_int8_vectors_are_the_same_in_any_company(calibrated: Embedder) -> None:
    together = calibrated.encode(TEXTS, dtype="int8")
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.abs(calibrated.encode(text, dtype="int8").astype(int) - vector).max() <= 1  # rounding at a half
    assert together.dtype == np.int8 and np.abs(together).max() == 127


def test_int8_keeps_cosines(calibrated: Embedder) -> None:
    exact, codes = calibrated.encode(TEXTS), calibrated.encode(TEXTS, dtype="int8").astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    np.testing.assert_allclose(codes @ codes.T, exact @ exact.T, atol=0.02)


def test_int8_of_an_uncalibrated_width_is_an_error(calibrated: Embedder) -> None:
    with pytest.warns(UserWarning), pytest.raises(InputError, match="one of \\[8, 16, 32\\], got 12"):
        calibrated.encode(TEXTS, dtype="int8", dimensions=12)


def test_bits_are_packed_as_sentence_transformers_packs_them() -> None:
    from sentence_transformers.util import quantize_embeddings

    rows = np.random.default_rng(0).normal(size=(6, 32)).astype(np.float32)
    for dtype in ("binary", "ubinary"):
        ours = quantize(rows, dtype, {})
        theirs = quantize_embeddings(rows, precision=dtype)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_float16_is_the_rounded_vector(embedder: Embedder) -> None:
    exact, half = embedder.encode(TEXTS), embedder.encode(TEXTS, dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_array_equal(half, exact.astype(np.float16))


def test_ranges_are_measured_per_width() -> None:
    rows = np.eye(4, dtype=np.float32) + 1.0
    ranges = calibrate(rows, (2, 4))
    assert ranges[2] > ranges[4] > 0.5
