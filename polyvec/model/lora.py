"""Task adapters: every adapter resident, each row through its own, in two small matmuls.

The adapters of a layer are stacked: A tasks of rank R give A*R columns. A gate (N, A*R) opens the R columns of each
row's task and closes the others, so ``y = x W^T + b + ((x A^T) * gate) B^T`` is exact for any mix of tasks, without a
loop over tasks and without building a task's full weight. The gate also carries the scale alpha / rank.

On a GPU there are C columns, A*R and as many of zeros as fill a step of its matrix kernels. For inference the factors
are laid out once (``AdaptedLinear.freeze``), the second beside the weight, so that ``y`` is written once:
``y = [x, (x A^T) * gate] [W, B]^T + b``.

Shape letters: N packed tokens, I and O inner widths, A adapters, R rank, C columns, V vocabulary, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from polyvec.errors import InputError

_GPU_STEP = 64  # of 16-bit numbers a cache line, and what a kernel takes at a time; odd rows fall to slow ones


def adapter_gate(task_ids: Tensor, num_adapters: int, rank: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the (N, A*R) gate for (N,) adapter ids: ``scale`` in the columns of the row's adapter, else 0.

    A row of adapter -1 opens nothing: it passes through the base weights alone.
    """
    adapters = torch.arange(num_adapters, device=task_ids.device)
    gate = (task_ids.unsqueeze(-1) == adapters).to(dtype) * scale  # (N, A)
    return gate.repeat_interleave(rank, dim=-1)


def column_step(device: torch.device) -> int:
    """Return what the number of columns is filled up to a multiple of."""
    return _GPU_STEP if device.type == "cuda" else 1


def low_rank_columns(x: Tensor, gate: Tensor, first: Tensor) -> Tensor:
    """Return what each row (N, I) has in its own adapter's columns, for a gate (N, C) and a stacked factor (C, I)."""
    return F.linear(x, first) * gate


class Adapted(nn.Module):
    """What the two kinds of adapted layer share: a base weight, two stacked factors, and merging."""

    weight: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self._base: Tensor | None = None  # the weight before merging

    def delta(self, adapter_id: int) -> Tensor:
        """Return the update that the adapter adds to ``weight``, same shape, unscaled and in float32."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, adapter_id: int, scale: float, *, for_good: bool = False) -> None:
        """Add one adapter into the weight. The base is kept aside for ``unmerge``, unless ``for_good``: subtracting
        again would round differently."""
        self._base = None if for_good else self.weight.detach().clone()
        # In float32, rounded once: an update is smaller than the weight, and would lose its last bits twice.
        self.weight.copy_(self.weight.float().add_(self.delta(adapter_id), alpha=scale))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit. Raises ``InputError`` where it was not kept."""
        if self._base is None:
            raise InputError("unmerge() needs the base weight, which an engine merged for good; load the model again")
        self.weight.copy_(self._base)
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
        # No part of the model: another form of the same numbers, (C, I) and, with the weight before it, (O, I + C).
        self.frozen_first: Tensor | None
        self.frozen_second: Tensor | None
        self.register_buffer("frozen_first", None, persistent=False)
        self.register_buffer("frozen_second", None, persistent=False)
        for adapter in self.lora_A.unbind():  # one by one: fan-in is the width of one adapter, not of the stack
            nn.init.kaiming_uniform_(adapter, a=math.sqrt(5))

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        """Return (N, O) for (N, I) rows; ``gate`` (N, ``num_columns``) is None when no row has an adapter."""
        if gate is None:
            return F.linear(x, self.weight, self.bias)
        first, second = self.factors()
        columns = low_rank_columns(F.dropout(x, self.dropout, self.training), gate, first)
        if self.frozen_second is None:
            return torch.addmm(F.linear(x, self.weight, self.bias), columns, second.t())
        if self._is_extended:
            return F.linear(torch.cat((x, columns), dim=-1), self.frozen_second, self.bias)
        return F.linear(x, self.weight, self.bias).addmm_(columns, second.t())  # in place: addmm() would copy first

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the adapters as a GPU multiplies them fast, until ``train`` or a load of other numbers.

        Merging need not drop it: while an adapter is merged no row has a gate, and ``unmerge`` restores every bit.
        """
        first, second = self._padded_factors(_GPU_STEP)
        self.frozen_first = first
        self.frozen_second = torch.cat((self.weight, second), dim=1) if self._is_extended else second

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the stacked factors, (C, I) and (O, C)."""
        if self.frozen_first is None or self.frozen_second is None:
            return self._padded_factors(column_step(self.weight.device))
        return self.frozen_first, self.frozen_second[:, -len(self.frozen_first) :]

    @property
    def num_columns(self) -> int:
        """C."""
        if self.frozen_first is not None:
            return len(self.frozen_first)
        columns = self.lora_A.shape[0] * self.lora_A.shape[1]
        return columns + -columns % column_step(self.weight.device)

    def _padded_factors(self, step: int) -> tuple[Tensor, Tensor]:
        first, second = self.lora_A.flatten(0, 1), self.lora_B.transpose(0, 1).flatten(1)
        padding = -len(first) % step
        return (F.pad(first, (0, 0, 0, padding)), F.pad(second, (0, padding))) if padding else (first, second)

    @property
    def _is_extended(self) -> bool:
        """Whether columns go beside the rows: copies 2 I numbers a row, where an update afterwards moves 2 O."""
        return self.weight.shape[1] <= self.weight.shape[0]

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.frozen_first = self.frozen_second = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.frozen_first = self.frozen_second = None
        super()._load_from_state_dict(*args)

    def delta(self, adapter_id: int) -> Tensor:
        return self.lora_B[adapter_id].float() @ self.lora_A[adapter_id].float()


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

    def delta(self, adapter_id: int) -> Tensor:
        return self.lora_A[adapter_id].float() @ self.lora_B[adapter_id].float()
