"""The graph is written whole, close to its weights, or not at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from polyvec.errors import InputError, WeightsError
from polyvec.inference import export
from polyvec.inference.engines.onnx import OnnxEngine
from polyvec.model.config import tiny
from polyvec.model.encoder import Encoder
from polyvec.model.lora import AdaptedLinear
from polyvec.model.weights import load_encoder, save_encoder, save_original


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_the_fp32_graph_keeps_to_the_weights(folder: Path) -> None:
    parity = export.export_onnx(folder, precision="fp32")
    assert parity.max_abs_error < 1e-5 and parity.min_cosine > 0.999999


def test_the_int8_graph_keeps_the_cosines(folder: Path) -> None:
    assert export.export_onnx(folder, precision="int8").min_cosine > 0.999


def test_biases_take_back_what_rounding_adds_to_every_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs that share much of their direction turn rounding into a shift of all tokens alike."""
    torch.manual_seed(0)
    encoder = Encoder(tiny(hidden_size=192, num_attention_heads=6, intermediate_size=384, num_hidden_layers=6))
    for layer in encoder.layers:
        layer.attention_norm.bias.data += 2  # type: ignore[union-attr, operator]
        layer.mlp_norm.bias.data += 2  # type: ignore[union-attr, operator]
    save_encoder(encoder.eval(), tmp_path)
    monkeypatch.setitem(export.LIMITS, "int8", export.Parity(float("inf"), 0.0))
    plain = export.export_onnx(tmp_path, precision="int8").min_cosine
    monkeypatch.setitem(export.LIMITS, "int8", export.Parity(float("inf"), plain + 1e-7))
    corrected = export.export_onnx(tmp_path, precision="int8").min_cosine
    assert 1 - corrected < 0.5 * (1 - plain)  # 0.26


def test_a_graph_that_is_off_is_refused_and_the_old_one_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "model.onnx").read_bytes()
    monkeypatch.setitem(export.LIMITS, "fp32", export.Parity(1e-9, 1.0))
    with pytest.raises(WeightsError, match="must keep to"):
        export.export_onnx(folder, precision="fp32")
    assert (folder / "model.onnx").read_bytes() == before
    assert not list(folder.glob("*.partial"))


def test_one_file_of_codes_lies_beside_the_int8_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (before,) = folder.glob("*.bin")
    encoder = load_encoder(folder)
    encoder.layers[0].mlp.fc1.weight.data[0, :9] = 0  # type: ignore[union-attr, operator]
    save_encoder(encoder, folder)
    with monkeypatch.context() as patch:  # refused: the old graph still finds its codes
        patch.setitem(export.LIMITS, "int8", export.Parity(0.0, 1.0))
        with pytest.raises(WeightsError, match="must keep to"):
            export.export_onnx(folder, precision="int8")
    assert list(folder.glob("*.bin")) == [before]
    OnnxEngine(folder / "model.int8.onnx", encoder.config)
    export.export_onnx(folder, precision="int8")
    (after,) = folder.glob("*.bin")
    assert after != before


def test_of_weights_the_int8_graph_keeps_codes_of_layers_alone(folder: Path, encoder: Encoder) -> None:
    (codes,) = folder.glob("*.bin")
    layers = sum(layer.weight.numel() for layer in encoder.layers.modules() if isinstance(layer, AdaptedLinear))
    assert codes.stat().st_size == layers
    graph = onnx.load(folder / "model.int8.onnx", load_external_data=False).graph
    table = next(w for w in graph.initializer if w.name == "embeddings.word_embeddings.weight")
    assert {entry.key: entry.value for entry in table.external_data}["location"] == "model.safetensors"


def test_a_wrong_weight_is_caught_by_the_gate(folder: Path, encoder: Encoder) -> None:
    engine = OnnxEngine(folder / "model.onnx", encoder.config)
    changed = load_encoder(folder)
    changed.layers[1].mlp.fc2.bias.data[3] += 0.01  # type: ignore[union-attr, operator]
    assert export.measure_parity(encoder, engine).max_abs_error < export.LIMITS["fp32"].max_abs_error
    assert export.measure_parity(changed, engine).max_abs_error > export.LIMITS["fp32"].max_abs_error


def test_only_our_layout_takes_a_graph(encoder: Encoder, tmp_path: Path) -> None:
    save_original(encoder, tmp_path / "original")
    with pytest.raises(InputError, match="polyvec's layout"):
        export.export_onnx(tmp_path / "original")
    with pytest.raises(InputError, match="precision must be one of"):
        export.export_onnx(tmp_path / "original", precision="int4")


def test_a_cut_graph_is_an_error(folder: Path, encoder: Encoder) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(WeightsError, match="whole ONNX file"):
        OnnxEngine(path, encoder.config)


def test_embedding_on_the_cpu_imports_no_torch(model_folder: Path) -> None:
    code = (
        "import sys; from polyvec import Embedder; "
        f"Embedder({str(model_folder)!r}).encode('text', task='separation'); "
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
