"""Rotary position embeddings (arXiv 2104.09864), the non-interleaved "rotate half" form of GPT-NeoX.

Shape letters: N packed tokens, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (N, K/2) in float32, for (N,) positions.

    Always float32: in bfloat16 the angles of neighbouring positions collapse beyond a few hundred tokens.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float().unsqueeze(-1) * (theta**-exponents)  # (N, K/2)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (N, ..., K) queries or keys by the angles (N, K/2) of their positions; dtype is kept.

    Two products and a sum for each half, in float32: a compiler makes one pass over memory of it.
    """
    between = (1,) * (states.dim() - 2)
    cos, sin = (table.view(len(table), *between, table.shape[-1]) for table in (cos, sin))
    first, second = states.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(states.dtype)
