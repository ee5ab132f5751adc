"""Small random models and a small tokenizer: nothing is downloaded, and every adapter does something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from polyvec.model.config import ModelConfig, tiny
from polyvec.model.encoder import Encoder


def random_encoder(config: ModelConfig | None = None, *, seed: int = 0) -> Encoder:
    """Return an encoder whose every weight, the adapters' zero factors included, is random."""
    torch.manual_seed(seed)
    encoder = Encoder(config or tiny())
    for name, parameter in encoder.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.1)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
        else:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return encoder.eval()


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return random_encoder()


def packed(lengths: list[int], vocab_size: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) random ids between ``<s>`` and ``</s>`` and (B+1,) offsets for texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        row = torch.randint(4, vocab_size - 1, (length,), generator=generator)
        row[0], row[-1] = 0, 2
        rows.append(row)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat(rows), cu_seqlens
