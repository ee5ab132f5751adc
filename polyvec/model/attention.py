"""Bidirectional attention over packed rows: FlashAttention where it runs, scaled-dot-product elsewhere.

Shape letters: B texts, T longest text, N packed tokens, H heads, K head width.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyvec.errors import MachineWarning


class Packing(NamedTuple):
    """Where the texts of a packed row lie, and what the host knows of them.

    ``cu_seqlens`` (B+1,) int32 offsets on the device. ``max_seqlen`` is T or more, a number of the host: reading it
    from a GPU in every layer would stop the queue of kernels. ``has_kernel``: see ``has_varlen_kernel``; asked once
    a pass, outside of what is compiled.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    has_kernel: bool


def packed_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float = 0.0) -> Tensor:
    """Attend within each text, never across. (N, H, K) each -> (N, H, K).

    ``dropout`` falls on the attention probabilities; the FlashAttention kernel has none, so a training step that
    asks for it takes the padded path.
    """
    offsets, longest, has_kernel = packing
    if has_kernel and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn  # here: it brings the compiler, two seconds of a start

        out = varlen_attn(query, key, value, offsets, offsets, longest, longest)
        assert isinstance(out, Tensor)
        return out
    if torch.compiler.is_compiling():
        stood_in: Tensor = _opaque_padded_attention(query, key, value, offsets, longest)
        return stood_in
    return _padded_attention(query, key, value, offsets, longest, dropout)


def runs_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether packed rows of this type go to FlashAttention; warns once of a GPU that lacks it."""
    is_half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and is_half and has_varlen_kernel(device, dtype, head_dim)


@cache
def has_varlen_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether FlashAttention's packed kernel runs here, found by one tiny call; warns where it does not."""
    from torch.nn.attention.varlen import varlen_attn

    x = torch.zeros(1, 1, head_dim, device=device, dtype=dtype)
    offsets = torch.tensor([0, 1], device=device, dtype=torch.int32)
    try:
        varlen_attn(x, x, x, offsets, offsets, 1, 1)
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        warnings.warn(
            f"{name} lacks the kernel varlen_attn for {dtype} and heads of {head_dim} ({error}); "
            "padded attention stands in, slower on texts of mixed lengths",
            MachineWarning,
            stacklevel=2,
        )
        return False
    return True


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, dropout: float
) -> Tensor:
    lengths = cu_seqlens.diff().long()
    batch = len(lengths)
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


@torch.library.custom_op("polyvec::padded_attention", mutates_args=())
def _opaque_padded_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int
) -> Tensor:  # for a compiler one step, whose shapes do not depend on what lies in cu_seqlens; without gradient
    return _padded_attention(query, key, value, cu_seqlens, longest, 0.0).contiguous()


@_opaque_padded_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return query.new_empty(query.shape)
