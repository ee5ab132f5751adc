"""Training starts from a plain XLM-RoBERTa."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

from polyvec.errors import WeightsError
from polyvec.model import encoder as encoder_module
from polyvec.model.xlm_roberta import is_xlm_roberta, load_xlm_roberta
from polyvec.tasks import NO_ADAPTER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=512, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5,
    )  # fmt: skip
    XLMRobertaForMaskedLM(config).save_pretrained(tmp_path / "xlm")
    return tmp_path / "xlm"


def test_without_positions_both_compute_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_xlm_roberta(folder)
    theirs = XLMRobertaForMaskedLM.from_pretrained(folder).eval().roberta
    theirs.embeddings.position_embeddings.weight.data.zero_()
    monkeypatch.setattr(encoder_module, "rotate", lambda states, *_: states)
    ours = load_xlm_roberta(folder)
    assert ours.config.max_tokens == 8192 and ours.config.matryoshka_dims == (32, 48)
    ids = torch.randint(4, 500, (3, 9))
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
        found = ours(ids.flatten(), torch.tensor([0, 9, 18, 27]).int(), torch.full((3,), NO_ADAPTER))
    torch.testing.assert_close(found.view(3, 9, 48), expected, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["roberta.encoder.layer.1.more"] = tensors.pop("roberta.encoder.layer.1.attention.self.key.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing layers.1.attention.qkv.bias; unexpected .*layer.1.*more"):
        load_xlm_roberta(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "hidden_act": "relu"}))
    with pytest.raises(WeightsError, match="hidden_act must be 'gelu', got 'relu'"):
        load_xlm_roberta(folder)
