"""The encoder: XLM-RoBERTa with rotary positions, post-layer-norm, and an adapter choice per text.

The forward pass reads top to bottom like the paper's figure (arXiv 2409.10173, figure 1). Rows are packed: the texts
of a batch lie end to end in one (N,) row of ids, and ``cu_seqlens`` says where each begins.

Shape letters: B texts, N packed tokens, D hidden width, H heads, K head width, A adapters, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from polyvec.errors import InputError
from polyvec.model.activation import gelu
from polyvec.model.attention import Packing, packed_attention, runs_varlen
from polyvec.model.config import ModelConfig
from polyvec.model.lora import Adapted, AdaptedEmbedding, AdaptedLinear, adapter_gate
from polyvec.model.pooling import text_of_token
from polyvec.model.rotary import rotary_table, rotate
from polyvec.tasks import NO_ADAPTER


def _linear(config: ModelConfig, in_features: int, out_features: int) -> AdaptedLinear:
    return AdaptedLinear(in_features, out_features, len(config.tasks), config.lora_rank, config.lora_dropout)


def _embedding(config: ModelConfig, num_embeddings: int) -> AdaptedEmbedding:
    return AdaptedEmbedding(
        num_embeddings, config.hidden_size, len(config.tasks), config.lora_rank, config.lora_dropout
    )


class Embeddings(nn.Module):
    """Word row plus token-type row, then layer norm. There is no position table: positions are rotary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = _embedding(config, config.vocab_size)
        self.token_type_embeddings = _embedding(config, config.type_vocab_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, input_ids: Tensor, gate: Tensor | None) -> Tensor:
        """(N,) ids -> (N, D)."""
        # Every token is of type 0; the row is trained, so leaving it out would shift every state.
        types = self.token_type_embeddings(torch.zeros_like(input_ids), gate)
        states: Tensor = self.norm(self.word_embeddings(input_ids, gate) + types)
        return states


class Attention(nn.Module):
    """Multi-head self-attention within each packed text."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.qkv = _linear(config, config.hidden_size, 3 * config.hidden_size)
        self.out = _linear(config, config.hidden_size, config.hidden_size)
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, gate: Tensor | None, packing: Packing, rotary: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(x, gate).view(len(x), 3, self.num_heads, self.head_dim)
        query, key = rotate(qkv[:, :2], *rotary).unbind(1)
        attended = packed_attention(query, key, qkv[:, 2], packing, self.dropout if self.training else 0.0)
        states: Tensor = self.out(attended.flatten(1), gate)
        return states


class FeedForward(nn.Module):
    """Two linear layers around the exact (erf) GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = _linear(config, config.hidden_size, config.intermediate_size)
        self.fc2 = _linear(config, config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, gate: Tensor | None) -> Tensor:
        states: Tensor = self.fc2(gelu(self.fc1(x, gate)), gate)
        return states


class Layer(nn.Module):
    """Post-layer-norm block: x = LN(x + Attention(x)); x = LN(x + FeedForward(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, gate: Tensor | None, packing: Packing, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, gate, packing, rotary)))
        states: Tensor = self.mlp_norm(x + self.dropout(self.mlp(x, gate)))
        return states


class Encoder(nn.Module):
    """The stack, with all adapters resident. Weights are random until loaded (``polyvec.model.weights``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        # In every published checkpoint, and not used for embeddings: kept so that a checkpoint leaves as it came.
        self.pooler = _linear(config, config.hidden_size, config.hidden_size)
        self.pooler.requires_grad_(False)
        self.gradient_checkpointing = False  # recompute each layer in the backward pass: less memory, a third more work
        self.merged_task: int | None = None
        self._merged_layers: dict[int, nn.ModuleList] = {}  # no part of the model: another form of the same weights
        self._is_compiled = False
        for module in self.modules():
            if isinstance(module, Adapted):
                nn.init.normal_(module.weight, std=config.initializer_range)

    @property
    def lora_scale(self) -> float:
        return self.config.lora_alpha / self.config.lora_rank

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        task_ids: Tensor,
        *,
        max_seqlen: int | None = None,
        adapters: Collection[int] | None = None,
    ) -> Tensor:
        """Return (N, D) token states for (N,) packed ids, (B+1,) int32 text offsets and (B,) adapter ids.

        An adapter id of -1 takes the base weights. ``max_seqlen`` is the length of the longest text or more, and
        ``adapters`` the ids among ``task_ids``: a caller that knows them spares a GPU two stops of its queue, after
        which a pass has none. Raises ``InputError`` when an adapter is merged and a text asks for another.
        """
        if max_seqlen is None:
            max_seqlen = int(cu_seqlens.diff().max())
        if adapters is None:
            adapters = set(task_ids.tolist())
        texts = text_of_token(cu_seqlens, len(input_ids))
        position_ids = torch.arange(len(input_ids), device=input_ids.device) - cu_seqlens[texts]
        gate = self._gate(task_ids, texts) if self.needs_gate(adapters) else None
        x: Tensor = self.dropout(self.embeddings(input_ids, gate))
        rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, _product_type(x))
        has_kernel = runs_varlen(x.device, _product_type(x), self.config.head_dim)
        packing = Packing(cu_seqlens, max(max_seqlen, 2), has_kernel)  # a compiler takes 1 for a constant
        layers = self.layers
        if gate is not None and len(adapters) == 1 and self._merged_layers:
            layers, gate = self._merged_layers[next(iter(adapters))], None
        elif gate is not None:
            columns: int = self.layers[0].attention.qkv.num_columns  # type: ignore[union-attr, assignment]
            gate = F.pad(gate, (0, columns - gate.shape[-1]))
        if self._is_compiled:
            _mark_dynamic(x, gate, cu_seqlens, *rotary)
        for layer in layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, gate, packing, rotary, use_reentrant=False, context_fn=_same_kernels)
            elif len(x) == 1:  # as above: past the compiler
                x = layer.forward(x, gate, packing, rotary)
            else:
                x = layer(x, gate, packing, rotary)
        return x

    def compile_layers(self, backend: str | Callable[..., Any]) -> None:
        """Compile the layers with a backend of ``torch.compile``: at the first pass, once for all layers, lengths and
        numbers of texts, and once more at the first pass with adapters. For inference alone."""
        for layers in self.all_layers:
            for layer in layers:
                layer.compile(backend=backend, dynamic=True)
        self._is_compiled = True

    def needs_gate(self, adapters: Collection[int]) -> bool:
        """Whether texts with these adapter ids need more than the weights as they are. Raises as ``forward`` does."""
        if self.merged_task is None:
            return any(adapter != NO_ADAPTER for adapter in adapters)
        if any(adapter != self.merged_task for adapter in adapters):
            raise InputError(
                f"task ids must all be {self.merged_task} while that adapter is merged, got {sorted(adapters)}; "
                "call unmerge() first, or load the model again"
            )
        return False

    def _gate(self, task_ids: Tensor, texts: Tensor) -> Tensor:
        config = self.config
        dtype = self.embeddings.word_embeddings.weight.dtype
        return adapter_gate(task_ids[texts], len(config.tasks), config.lora_rank, self.lora_scale, dtype)

    def merge(self, task_id: int, *, for_good: bool = False) -> None:
        """Add one task's adapter into the weights: the same vectors for less work, for that task alone. ``for_good``
        keeps no second copy of the weights for ``unmerge``."""
        if self.merged_task is not None:
            raise InputError(
                f"one adapter at a time can be merged, adapter {self.merged_task} is; call unmerge() first"
            )
        if not all(hasattr(layer.attention.qkv, "merge") for layer in self.layers):  # type: ignore[union-attr]
            raise InputError("weights must be whole to be merged, got 8-bit ones; merge first, then open the engine")
        if not 0 <= task_id < len(self.config.tasks):
            raise InputError(f"task_id must lie between 0 and {len(self.config.tasks) - 1}, got {task_id}")
        for module in self.modules():
            if isinstance(module, Adapted):
                module.merge(task_id, self.lora_scale, for_good=for_good)
        self.merged_task = task_id

    @torch.no_grad()
    def merge_beside(self) -> None:
        """Keep a copy of the layers for each task with its adapter merged, for inference: a pass whose texts all name
        one adapter then costs no more than the base model. Embeddings are not copied, their update is a gather."""
        for task_id in range(len(self.config.tasks)):
            layers = copy.deepcopy(self.layers)
            for module in layers.modules():
                if isinstance(module, Adapted):
                    module.merge(task_id, self.lora_scale, for_good=True)
            self._merged_layers[task_id] = layers

    def freeze_adapters(self) -> None:
        """Lay the adapters out for inference on a GPU. Three of the four weights of a layer are then there twice,
        alone and beside their factors."""
        if self.merged_task is not None:  # the second copy would hold that adapter for good
            raise InputError(
                f"weights must be unmerged to be frozen, got adapter {self.merged_task}; load the model again"
            )
        for module in self.layers.modules():
            if isinstance(module, AdaptedLinear):
                module.freeze()

    @property
    def all_layers(self) -> list[nn.ModuleList]:
        """The layers, and their copies with an adapter merged."""
        return [self.layers, *self._merged_layers.values()]

    def unmerge(self) -> None:
        """Undo ``merge``, bit for bit."""
        if self.merged_task is None:
            raise InputError("unmerge() needs a merged adapter, got none; call merge(task_id) first")
        for module in self.modules():
            if isinstance(module, Adapted):
                module.unmerge()
        self.merged_task = None


def _product_type(x: Tensor) -> torch.dtype:
    """Return the type in which a linear layer answers ``x``."""
    kind = x.device.type
    is_mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_mixed else x.dtype


def _mark_dynamic(x: Tensor, gate: Tensor | None, *others: Tensor) -> None:
    """Tell the compiler which sizes change: the first of each. It would take equal ones of the first pass, such as a
    number of tokens and a width, for one."""
    for tensor in (x, gate, *others):
        if tensor is not None and len(tensor) > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
            for dim in range(1, tensor.dim()):
                torch._dynamo.mark_static(tensor, dim)


def _same_kernels() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return contexts of a layer's two forward passes. The second runs in the backward pass, where the caller's choice
    of attention kernels has ended, and must come to the same tensors."""
    allowed = {
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
    }
    return nullcontext(), sdpa_kernel([backend for backend, enabled in allowed.items() if enabled])
