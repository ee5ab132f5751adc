"""8-bit floating point: its arithmetic is the reference's, and weights that it spoils are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.inference.batching import Batch
from polyvec.inference.engines import torch as engine_module
from polyvec.inference.engines.torch import TorchEngine
from polyvec.inference.quantize import smallest_cosine
from polyvec.model import float8
from polyvec.model.float8 import Float8Linear, to_float8
from polyvec.model.lora import AdaptedLinear, adapter_gate
from tests.conftest import random_encoder


def rounded(value: float) -> float:
    """The nearest e4m3 number, by its definition: 3 bits after the point, exponents from -6, even of two."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(np.floor(np.log2(abs(value))), -6) - 3)
    return float(np.round(value / step) * step)


def test_rows_are_rounded_as_the_type_is_defined() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 7) * torch.tensor([1e-3, 1.0, 30.0, 1e4, 0.0]).unsqueeze(1)
    codes, scales = to_float8(rows)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (5, 1)
    for row, own, scale in zip(rows, codes.float(), scales, strict=True):
        want = [rounded(float(value) / float(scale)) for value in row]
        assert own.tolist() == pytest.approx(want, rel=1e-6)
    assert codes.float().abs().amax(1).tolist() == [448.0] * 4 + [0.0]


@torch.no_grad()
def test_a_layer_in_8_bits_is_the_product_of_what_was_rounded() -> None:
    torch.manual_seed(0)
    linear = AdaptedLinear(48, 32, num_adapters=3, rank=2, dropout=0.0)
    torch.nn.init.normal_(linear.weight), torch.nn.init.normal_(linear.bias), torch.nn.init.normal_(linear.lora_B)
    x = torch.randn(9, 48)
    (codes, scales), (weight, weight_scales) = to_float8(x), to_float8(linear.weight)
    want = (codes.double() * scales) @ (weight.double() * weight_scales).t() + linear.bias
    got = Float8Linear(linear)(x, None)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    gate = adapter_gate(torch.arange(9) % 4 - 1, 3, 2, 0.5, torch.float32)
    update = linear(x, gate) - linear(x, None)
    torch.testing.assert_close(Float8Linear(linear)(x, gate) - got, update, atol=1e-4, rtol=1e-4)
    error = (got - linear(x, None)).norm() / linear(x, None).norm()
    assert 0.005 < error < 0.05  # it rounds, by 2**-4 at most of each factor


def test_a_number_that_is_none_stays_so() -> None:
    for bad in (float("nan"), float("inf")):
        codes, scales = to_float8(torch.tensor([[1.0, bad]]))
        assert not torch.isfinite(codes.float() * scales).all()


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU do the arithmetic."""
    monkeypatch.setattr(float8, "check_device", lambda device: None)


def test_an_engine_in_8_bits_keeps_the_vectors(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SMALLEST_COSINE", 0.99)  # of two layers of random weights
    engine = TorchEngine(random_encoder(), device="cpu", dtype="float8")
    assert engine.name == "torch-float8"
    batch = Batch.of([np.arange(4, 40, dtype=np.int32), np.arange(9, 12, dtype=np.int32)], [0, -1])
    want = TorchEngine(random_encoder(), device="cpu").pool(batch)
    got = engine.pool(batch)
    assert smallest_cosine(want, got) > 0.99
    assert not np.array_equal(want, got)
    with pytest.raises(InputError, match="8-bit"):
        engine._encoder.merge(0)


def test_an_embedder_opens_it_by_the_name_that_it_has(
    anywhere: None, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    monkeypatch.setattr(engine_module, "SMALLEST_COSINE", 0.9)
    model = Embedder(model_folder, engine="torch-float8", device="cpu")
    assert model.engine.name == "torch-float8"
    texts = ["the router is on", "the night train"]
    vectors, exact = model.encode(texts), Embedder(model_folder, engine="torch", device="cpu").encode(texts)
    assert smallest_cosine(vectors, exact) > 0.9 and not np.array_equal(vectors, exact)


def test_weights_that_8_bits_spoil_are_refused(anywhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SMALLEST_COSINE", 0.999999)
    with pytest.raises(InputError, match=r"must keep a cosine of 0.999999 to torch.bfloat16, got 0\.\d+ .*bfloat16"):
        TorchEngine(random_encoder(), device="cpu", dtype="float8")


def test_a_device_without_8_bit_products_is_named() -> None:
    with pytest.raises(InputError, match="compute capability 8.9, got cpu"):
        TorchEngine(random_encoder(), device="cpu", dtype="float8")
    with pytest.raises(InputError, match="dtype must be 'float8' or a torch.dtype, got 'int4'"):
        TorchEngine(random_encoder(), device="cpu", dtype="int4")  # type: ignore[arg-type]


def test_an_older_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(InputError, match=r"got 8\.0 \(A100\)"):
        float8.check_device(torch.device("cuda"))
