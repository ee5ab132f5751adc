"""A plain XLM-RoBERTa as the start of training (arXiv 2409.10173, section 4.1): its weights, without its positions.

Rotary positions take the place of the learned table, so what comes out is no embedding model, and not even the language
model that it was, until it has learned with them. Adapters start as no change.
"""

from __future__ import annotations

from pathlib import Path

import torch

from polyvec.errors import WeightsError
from polyvec.model.config import ModelConfig
from polyvec.model.encoder import Encoder
from polyvec.model.layouts import JINA_V3_DIMS, read_json
from polyvec.model.weights import Tensors, _check, _read_tensors

_MODULES = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
_LAYER_MODULES = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_READ = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size",
    "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "bos_token_id",
    "pad_token_id", "eos_token_id",
)  # fmt: skip


def is_xlm_roberta(folder: Path) -> bool:
    """Whether ``folder`` holds the model of that name, and not jina-embeddings-v3, which bears it too."""
    values = read_json(folder / "config.json")
    return isinstance(values, dict) and values.get("model_type") == "xlm-roberta" and "lora_adaptations" not in values


def load_xlm_roberta(folder: Path) -> Encoder:
    """Return an encoder with the weights of an XLM-RoBERTa in transformers' layout.

    Its language model's head and positions are left out; a checkpoint of a language model has no pooler, which starts
    random and is not used. Raises ``WeightsError`` naming every missing, unexpected or misshapen tensor, and a value of
    the configuration that this encoder does not compute.
    """
    values = read_json(folder / "config.json")
    if missing := [key for key in _READ if key not in values]:
        raise WeightsError(f"{folder / 'config.json'} must hold {', '.join(missing)}, got none; fetch it again")
    if values.get("hidden_act") != "gelu":
        raise WeightsError(f"{folder / 'config.json'}: hidden_act must be 'gelu', got {values.get('hidden_act')!r}")
    dims = tuple(dim for dim in JINA_V3_DIMS if dim < values["hidden_size"])
    config = ModelConfig(**{key: values[key] for key in _READ}, matryoshka_dims=(*dims, values["hidden_size"]))
    encoder = Encoder(config)
    tensors = {name.removeprefix("roberta."): tensor for name, tensor in _read_tensors(folder, "model").items()}
    unused = ("lm_head.", "embeddings.position_embeddings.", "embeddings.position_ids")
    tensors = _renamed({n: t for n, t in tensors.items() if not n.startswith(unused)}, config.num_hidden_layers)
    own = (".lora_",) if "pooler.weight" in tensors else (".lora_", "pooler.")
    fresh = {name: tensor for name, tensor in encoder.state_dict().items() if any(part in name for part in own)}
    _check(folder, encoder, {**tensors, **fresh})
    encoder.load_state_dict({n: t.to(torch.float32) for n, t in {**tensors, **fresh}.items()})
    return encoder.eval()


def _renamed(tensors: Tensors, num_layers: int) -> Tensors:
    """Return the tensors under our names; what has none here keeps its own and is then reported."""
    modules = dict(_MODULES)
    for i in range(num_layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        modules |= {f"{ours}.{here}": f"{theirs}.{there}" for here, there in _LAYER_MODULES.items()}
        for kind in ("weight", "bias"):
            parts = [f"{theirs}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
            if all(part in tensors for part in parts):
                tensors[f"{ours}.attention.qkv.{kind}"] = torch.cat([tensors.pop(part) for part in parts])
    names = {f"{there}.{kind}": f"{here}.{kind}" for here, there in modules.items() for kind in ("weight", "bias")}
    return {names.get(name, name): tensor for name, tensor in tensors.items()}
