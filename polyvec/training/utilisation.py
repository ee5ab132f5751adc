"""How much of what the chip can do a run gets done: model FLOP utilisation (MFU; arXiv 2204.02311, appendix B).

Only arithmetic that the gradient needs counts: what is embedded twice to save memory counts once, and padding not at
all. Shape letters: T tokens of a text, D width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from polyvec.model.config import ModelConfig


@dataclass
class Work:
    """What a run has done so far: tokens that it learned from, and the FLOPs that those take."""

    tokens: int = 0
    flops: float = 0.0

    def add(self, config: ModelConfig, lengths: list[int], *, trains_base: bool) -> None:
        """Count one forward and backward pass over texts of these lengths."""
        self.tokens += sum(lengths)
        linear, attention = forward_flops(config, lengths)
        # Backwards, a product of weights costs once more for the gradient of its input, and again for the weights'; of
        # attention's products both sides are activations.
        self.flops += linear * (3 if trains_base else 2) + attention * 3


def forward_flops(config: ModelConfig, lengths: list[int]) -> tuple[float, float]:
    """Return the FLOPs of one forward pass: of the layers' weights, adapters left out (below 1 %), and of attention."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linear = 2.0 * layers * sum(lengths) * (4 * width * width + 2 * width * inner)
    attention = 4.0 * layers * width * sum(length * length for length in lengths)
    return linear, attention


def head_flops(config: ModelConfig, hidden: int) -> float:
    """Return the FLOPs of the forward pass of the masked-language head over ``hidden`` tokens."""
    return 2.0 * hidden * config.hidden_size * (config.hidden_size + config.vocab_size)


def measured_peak(device: torch.device, *, bf16: bool) -> float:
    """Return the FLOPs a second of the best of a few square products on ``device``: what a run can reach at most.

    With ``bf16`` also of such in bfloat16, which a processor without instructions for it multiplies far more slowly.
    """
    size = 8192 if device.type == "cuda" else 1024
    best = float("inf")
    for dtype in (torch.float32, torch.bfloat16) if bf16 else (torch.float32,):
        left = torch.randn(size, size, device=device, dtype=dtype)
        for number in range(5):
            started = time.perf_counter()
            product = left @ left
            product[0, 0].item()  # waits for the device
            taken = time.perf_counter() - started
            best = min(best, taken)
            if number and taken > 10 * best:  # no repeat would be the best; the first one also loads its kernel
                break
    return 2.0 * size**3 / best
