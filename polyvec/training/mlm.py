"""Masked language modelling: the first training stage (arXiv 2409.10173, section 4.1).

Shape letters: N packed tokens, M hidden ones, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyvec.model.encoder import Encoder
from polyvec.tasks import NO_ADAPTER


class MaskedLanguageModel(nn.Module):
    """An encoder under XLM-RoBERTa's head: dense, GELU, layer norm, then the word table again as the output matrix, and
    a bias.

    The head serves this stage alone: an embedding model neither stores nor loads it. One module, so that FSDP gathers
    the table once for both its uses.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        return [*self.dense.parameters(), *self.norm.parameters(), self.bias]

    def logits(self, states: Tensor) -> Tensor:
        """Return (M, V) logits of (M, D) states."""
        table = self.encoder.embeddings.word_embeddings.weight
        return F.linear(self.norm(F.gelu(self.dense(states))), table, self.bias)

    def forward(
        self, input_ids: Tensor, cu_seqlens: Tensor, hidden: Tensor, answers: Tensor, *, max_seqlen: int | None = None
    ) -> Tensor:
        """Return the sum of the cross-entropies in nats of the hidden tokens. (N,) ids, (B+1,) offsets, (M,) places of
        the hidden tokens, (M,) the ids that stood there; ``max_seqlen`` as the encoder takes it.

        A sum, so that the parts of a step add up whatever they hide. Logits are made for hidden tokens alone: a
        vocabulary of 250,000 for every token would not fit.
        """
        no_task = torch.full((len(cu_seqlens) - 1,), NO_ADAPTER, device=input_ids.device)
        states = self.encoder(input_ids, cu_seqlens, no_task, max_seqlen=max_seqlen, adapters=(NO_ADAPTER,))
        return F.cross_entropy(self.logits(states[hidden]), answers, reduction="sum")
