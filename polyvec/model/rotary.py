"""Rotary position embeddings (arXiv 2104.09864), the non-interleaved "rotate half" form of GPT-NeoX.

Shape letters: N packed tokens, H heads, K head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(position_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (N, K/2) in ``dtype``, for (N,) positions.

    Angles are float32 and the table is rounded once: in bfloat16 the angles of neighbouring positions collapse beyond a
    few hundred tokens.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids.float().unsqueeze(-1) * (theta**-exponents)  # (N, K/2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (N, ..., K) queries or keys by the angles (N, K/2) of their positions, all of one type.

    In bfloat16 too: in float32 kernels that run one by one would move three times the bytes, and the vectors of
    polyvec-mini are as near to the exact ones either way (measured to 6000 tokens, 2026-11-26).
    """
    between = (1,) * (states.dim() - 2)
    cos, sin = (table.view(len(table), *between, table.shape[-1]) for table in (cos, sin))
    first, second = states.chunk(2, dim=-1)
    return torch.cat(
        (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)), dim=-1
    )
