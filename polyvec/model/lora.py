"""Task adapters: every adapter resident, each row through its own, in two small matmuls.

The adapters of a layer are stacked: A tasks of rank R give A*R columns. A gate (N, A*R) opens the R columns of each
row's task and closes the others, so ``y = x W^T + b + ((x A^T) * gate) B^T`` is exact for any mix of tasks, without a
loop over tasks and without building a task's full weight. The gate also carries the scale alpha / rank.

Shape letters: N packed tokens, A adapters, R rank, V vocabulary, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def adapter_gate(task_ids: Tensor, num_adapters: int, rank: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the (N, A*R) gate for (N,) adapter ids: ``scale`` in the columns of the row's adapter, else 0.

    A row of adapter -1 opens nothing: it passes through the base weights alone.
    """
    adapters = torch.arange(num_adapters, device=task_ids.device)
    gate = (task_ids.unsqueeze(-1) == adapters).to(dtype) * scale  # (N, A)
    return gate.repeat_interleave(rank, dim=-1)


def low_rank_update(y: Tensor, x: Tensor, gate: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return products ``y`` (N, O) of rows ``x`` (N, I) with each row's own update added."""
    columns = F.linear(x, lora_A.flatten(0, 1)) * gate  # (N, A*R)
    return torch.addmm(y, columns, lora_B.transpose(1, 2).flatten(0, 1))


class Adapted(nn.Module):
    """What the two kinds of adapted layer share: a base weight, two stacked factors, and merging."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._base: Tensor | None = None  # the weight before merging

    def delta(self, adapter_id: int, scale: float) -> Tensor:
        """Return the update that the adapter adds to ``weight``, same shape."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, adapter_id: int, scale: float) -> None:
        """Add one adapter into the weight. The base is kept aside: subtracting again would round differently."""
        self._base = self.weight.detach().clone()
        self.weight.add_(self.delta(adapter_id, scale))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        assert self._base is not None
        self.weight.copy_(self._base)
        self._base = None

    def forget_base(self) -> None:
        """Stay merged for good."""
        self._base = None


class AdaptedLinear(Adapted):
    """A linear layer and its stacked adapters: weight (O, I), lora_A (A, R, I), lora_B (A, O, R)."""

    def __init__(self, in_features: int, out_features: int, num_adapters: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.lora_A = nn.Parameter(torch.empty(num_adapters, rank, in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_adapters, out_features, rank))
        self.dropout = dropout
        for adapter in self.lora_A.unbind():  # one by one: fan-in is the width of one adapter, not of the stack
            nn.init.kaiming_uniform_(adapter, a=math.sqrt(5))

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return (N, O) for (N, I) rows; ``gate`` is None when no row has an adapter."""
        y = F.linear(x, self.weight, self.bias)
        if gate is None:
            return y
        return low_rank_update(y, F.dropout(x, self.dropout, self.training), gate, self.lora_A, self.lora_B)

    def delta(self, adapter_id: int, scale: float) -> Tensor:
        return self.lora_B[adapter_id] @ self.lora_A[adapter_id] * scale


class AdaptedEmbedding(Adapted):
    """A lookup table and its stacked adapters: weight (V, D), lora_A (A, V, R), lora_B (A, R, D)."""

    def __init__(self, num_embeddings: int, embedding_dim: int, num_adapters: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))
        self.lora_A = nn.Parameter(torch.zeros(num_adapters, num_embeddings, rank))
        self.lora_B = nn.Parameter(torch.randn(num_adapters, rank, embedding_dim))
        self.dropout = dropout

    def forward(self, ids: Tensor, gate: Tensor | None) -> Tensor:
        """Return (N, D) rows for (N,) ids: the low-rank part is a gather, the (V, D) update is never built."""
        rows = F.embedding(ids, self.weight)
        if gate is None:
            return rows
        columns = self.lora_A[:, ids].transpose(0, 1).flatten(1) * gate  # (N, A*R)
        return torch.addmm(rows, F.dropout(columns, self.dropout, self.training), self.lora_B.flatten(0, 1))

    def delta(self, adapter_id: int, scale: float) -> Tensor:
        return self.lora_A[adapter_id] @ self.lora_B[adapter_id] * scale
