"""The exact (erf) GELU (arXiv 1606.08415)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Return ``x`` times the normal distribution function of ``x``, same shape.

    A compiler has nothing to fuse it with, between two products, and its own kernel takes an H200 1.5 times as long as
    torch's (3.3 and 2.1 of 23 ms for 16,384 tokens of the 570M shape, measured 2026-11-26): inference keeps torch's.
    """
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        kept: Tensor = _opaque_gelu(x)
        return kept
    return F.gelu(x)


@torch.library.custom_op("polyvec::gelu", mutates_args=())
def _opaque_gelu(x: Tensor) -> Tensor:  # for a compiler one step; without gradient
    return F.gelu(x)


@_opaque_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
