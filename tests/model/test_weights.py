"""Round trips between the three layouts, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polyvec.errors import WeightsError
from polyvec.model.encoder import Encoder
from polyvec.model.weights import load_encoder, save_encoder, save_hf, save_original


def assert_same(first: Encoder, second: Encoder) -> None:
    assert first.config == second.config
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), name


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    return path


def test_our_layout_comes_back_bit_for_bit(encoder: Encoder, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path / "model")
    assert_same(load_encoder(tmp_path / "model"), encoder)


def test_the_original_layout_comes_back_bit_for_bit(encoder: Encoder, tmp_path: Path) -> None:
    save_original(encoder, tmp_path / "model")
    assert_same(load_encoder(tmp_path / "model"), encoder)
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert "roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight.0.lora_A" in names
    assert "roberta.emb_ln.weight" in names


def test_the_hf_layout_comes_back_bit_for_bit(encoder: Encoder, tmp_path: Path, tokenizer_path: Path) -> None:
    save_hf(encoder, tmp_path / "model", tokenizer_path)
    assert_same(load_encoder(tmp_path / "model"), encoder)


def test_bfloat16_files_come_back_bit_for_bit(encoder: Encoder, tmp_path: Path) -> None:
    save_original(encoder, tmp_path / "half", dtype=torch.bfloat16)
    save_original(load_encoder(tmp_path / "half"), tmp_path / "again", dtype=torch.bfloat16)
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("half", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_every_missing_unexpected_and_misshapen_tensor_is_named(encoder: Encoder, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stray"] = tensors.pop("layers.1.mlp.fc2.bias")
    tensors["embeddings.norm.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_encoder(tmp_path)
    assert "missing layers.1.mlp.fc2.bias" in str(error.value)
    assert "unexpected stray" in str(error.value)
    assert "embeddings.norm.bias has shape (3,) instead of (32,)" in str(error.value)


@pytest.mark.parametrize("save", [save_encoder, save_original])
def test_a_cut_file_is_an_error(encoder: Encoder, tmp_path: Path, save: object) -> None:
    save(encoder, tmp_path / "model")  # type: ignore[operator]
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="whole safetensors file"):
        load_encoder(tmp_path / "model")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_act", "relu", "hidden_act = 'relu' where only 'gelu' is computed"),
        ("position_embedding_type", "absolute", "position_embedding_type"),
        ("emb_pooler", "cls", "emb_pooler = 'cls'"),
        ("window_size", 128, "unknown window_size = 128"),
        ("lora_rank", 8, "instead of"),
    ],
)
def test_a_value_that_would_change_the_numbers_is_an_error(
    encoder: Encoder, tmp_path: Path, key: str, value: object, message: str
) -> None:
    save_original(encoder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(WeightsError, match=message):
        load_encoder(tmp_path / "model")


def test_adapters_of_different_rank_are_an_error(encoder: Encoder, tmp_path: Path, tokenizer_path: Path) -> None:
    save_hf(encoder, tmp_path / "model", tokenizer_path)
    path = tmp_path / "model" / "separation" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    with pytest.raises(WeightsError, match="must share one rank"):
        load_encoder(tmp_path / "model")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WeightsError, match="model_type 'bert'"):
        load_encoder(tmp_path)


def test_an_existing_export_is_never_overwritten(encoder: Encoder, tmp_path: Path) -> None:
    save_original(encoder, tmp_path / "model")
    with pytest.raises(WeightsError, match="new or empty"):
        save_original(encoder, tmp_path / "model")


def test_a_merged_encoder_is_not_saved(encoder: Encoder, tmp_path: Path) -> None:
    encoder.merge(0)
    try:
        with pytest.raises(WeightsError, match="unmerge"):
            save_encoder(encoder, tmp_path)
    finally:
        encoder.unmerge()
