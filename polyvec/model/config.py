"""Architecture of the encoder: what changes tensor shapes or numerics. Without torch: every engine reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polyvec.errors import WeightsError
from polyvec.tasks import TASK_PROMPTS


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """XLM-RoBERTa topology with rotary positions and task adapters; the names are Hugging Face's.

    The defaults are jina-embeddings-v3 (arXiv 2409.10173, section 3, and its published config).
    """

    vocab_size: int = 250_002
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    type_vocab_size: int = 1
    max_position_embeddings: int = 8194
    layer_norm_eps: float = 1e-5
    rope_theta: float = 20_000.0  # 10,000 while jina trained, 20,000 in its released config
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    bos_token_id: int = 0
    pad_token_id: int = 1
    eos_token_id: int = 2
    lora_rank: int = 4
    lora_alpha: float = 1.0  # the low-rank update is scaled by alpha / rank
    lora_dropout: float = 0.0  # on the adapter's input, training only
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(TASK_PROMPTS))  # task -> prompt, in adapter order
    matryoshka_dims: tuple[int, ...] = (32, 64, 128, 256, 512, 768, 1024)  # trained widths

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise WeightsError(
                f"hidden_size must be a multiple of twice num_attention_heads (rotary pairs), "
                f"got {self.hidden_size} for {self.num_attention_heads} heads"
            )
        if not self.matryoshka_dims or max(self.matryoshka_dims) > self.hidden_size:
            raise WeightsError(
                f"matryoshka_dims must lie between 1 and hidden_size {self.hidden_size}, got {self.matryoshka_dims}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def tokenizer_ids(self) -> dict[str, int]:
        """What the tokenizer must agree with."""
        return {
            "vocab_size": self.vocab_size, "bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id,
        }  # fmt: skip

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.prompts)

    @property
    def max_tokens(self) -> int:
        """Longest sequence, ``<s>``, prompt and ``</s>`` included; XLM-R counts two positions for its padding."""
        return self.max_position_embeddings - 2

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {"model_type": "polyvec", **values, "matryoshka_dims": list(self.matryoshka_dims)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read our own ``config.json``. Raises ``WeightsError`` naming each missing or unknown key."""
        values = dict(values)
        if (model_type := values.pop("model_type", None)) != "polyvec":
            raise WeightsError(f"config.json: model_type must be 'polyvec', got {model_type!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        if problems := [f"unknown {k}" for k in sorted(values.keys() - known)] + [
            f"missing {k}" for k in sorted(known - values.keys())
        ]:
            raise WeightsError(f"config.json must hold exactly the fields of ModelConfig, got {', '.join(problems)}")
        return cls(**{**values, "matryoshka_dims": tuple(values["matryoshka_dims"])})


def tiny(**changes: Any) -> ModelConfig:
    """A model of a few thousand parameters for tests."""
    values = dict(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=514, matryoshka_dims=(8, 16, 32),
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})


def mini(**changes: Any) -> ModelConfig:
    """polyvec-mini: 6 layers x 384, the model inside the package."""
    values = dict(
        vocab_size=40_000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        matryoshka_dims=(32, 64, 128, 256, 384),
    )  # fmt: skip
    return ModelConfig(**{**values, **changes})
