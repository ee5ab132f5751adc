"""Bidirectional attention over packed rows: FlashAttention where it runs, scaled-dot-product elsewhere.

Shape letters: B texts, T longest text, N packed tokens, H heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


def packed_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, dropout: float = 0.0) -> Tensor:
    """Attend within each text, never across. (N, H, K) each, (B+1,) int32 offsets -> (N, H, K).

    ``dropout`` falls on the attention probabilities; the FlashAttention kernel has none, so a training step that
    asks for it takes the padded path.
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        longest = int(cu_seqlens.diff().max())
        out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out
    return _padded_attention(query, key, value, cu_seqlens, dropout)


def _padded_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, dropout: float) -> Tensor:
    lengths = cu_seqlens.diff().long()
    batch, longest = len(lengths), int(lengths.max())
    if batch * longest == len(query):  # equal lengths: no mask, which lets the kernel skip the T x T matrix
        q, k, v = (x.view(batch, longest, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return out.transpose(1, 2).flatten(0, 1)
    real = torch.arange(longest, device=query.device) < lengths.unsqueeze(-1)  # (B, T)
    slots = real.flatten().nonzero().squeeze(-1)  # where each packed token lies in the padded grid

    def pad(x: Tensor) -> Tensor:
        grid = x.new_zeros((batch * longest, *x.shape[1:])).index_copy(0, slots, x)
        return grid.view(batch, longest, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), attn_mask=real[:, None, None, :], dropout_p=dropout
    )
    return out.transpose(1, 2).flatten(0, 1)[slots]
