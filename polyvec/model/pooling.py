"""From token states to embeddings: average, keep the first components, rescale, in that order.

Shape letters: B texts, N packed tokens, D width, M kept width, C spans.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mean_pool(hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average each text's tokens, ``<s>``, prompt and ``</s>`` included. (N, D), (B+1,) -> (B, D) in float32."""
    lengths = cu_seqlens.diff()
    rows = text_of_token(cu_seqlens, len(hidden_states))
    # Summed text by text, never by differences of a running sum: a neighbour's size must not cost precision.
    sums = hidden_states.new_zeros((len(lengths), hidden_states.shape[-1]), dtype=torch.float32)
    sums = sums.index_add(0, rows, hidden_states.float())
    return sums / lengths.unsqueeze(-1)


def text_of_token(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return (N,) which text each packed token belongs to. ``num_tokens`` is N: a GPU need not be asked for it."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=num_tokens)


def truncate(embeddings: Tensor, dim: int) -> Tensor:
    """Keep the first ``dim`` components and rescale to unit length. (B, D) -> (B, M)."""
    return F.normalize(embeddings[:, :dim], dim=-1)  # cutting alone leaves norms below 1
