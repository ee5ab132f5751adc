"""Multilingual distillation (arXiv 2004.09813): a text and its translations learn the teacher's vector of the English.

Two steps, because the word table holds most of the parameters and least of the arithmetic:

1. ``StaticStudent``: the table alone, every token normalised and averaged. A hundred times cheaper a token than the
   encoder, so it sees the whole corpus many times.
2. ``grow``: the same function as an encoder whose blocks start as the identity, to be trained from there.

Shape letters: B texts, N packed tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from polyvec.data.tokenized import TokenizedTexts
from polyvec.losses import distillation, relational_distillation
from polyvec.model.config import ModelConfig
from polyvec.model.encoder import Encoder, Layer
from polyvec.model.pooling import truncate


class StaticStudent(nn.Module):
    """The encoder without its layers: layer-normalised word rows, averaged, then one affine map per component."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Parameter(torch.randn(config.vocab_size, config.hidden_size))
        self.scale = nn.Parameter(torch.ones(config.hidden_size))
        self.shift = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(N,) packed ids -> (B, D) averages."""
        # The whole table is normalised, not each token: a batch holds more tokens than the table has rows.
        rows = F.layer_norm(self.table, self.table.shape[-1:], eps=self.config.layer_norm_eps)
        return F.embedding_bag(input_ids, rows, cu_seqlens[:-1].long(), mode="mean") * self.scale + self.shift


def co_occurrence_table(texts: TokenizedTexts, targets: Tensor, rows: NDArray[np.int64], vocab_size: int) -> Tensor:
    """Return a first (V, D) table: each token's row is the mean target of the texts that hold it, less the mean of all.

    ``rows[i]`` is the target of text i; texts beyond have none. One pass over the corpus, and every training step after
    it starts from here. A token that no text holds gets a small random row.
    """
    device = texts.ids.device
    sums = torch.zeros(vocab_size, targets.shape[1], device=device)
    counts = torch.zeros(vocab_size, device=device)
    for start in range(0, len(rows), 50_000):
        part = np.arange(start, min(start + 50_000, len(rows)))
        ids, cu_seqlens = texts.pack(np.stack((part, part + 1), axis=1))
        own = torch.from_numpy(rows[part]).to(device).repeat_interleave(cu_seqlens.diff(), output_size=len(ids))
        sums.index_add_(0, ids, targets[own].float())
        counts += torch.bincount(ids, minlength=vocab_size)
    mean = sums.sum(dim=0) / counts.sum()
    table = sums / counts.clamp_min(1).unsqueeze(-1) - mean
    return torch.where(counts.unsqueeze(-1) > 0, table, 0.01 * torch.randn_like(table))


@torch.no_grad()
def grow(student: StaticStudent) -> Encoder:
    """Return an encoder that computes exactly what ``student`` does.

    Each block's output projections start at zero, so x = LN(x + 0); layer norm of a normalised row is that row; and
    the last norm takes over the affine map.
    """
    encoder = Encoder(student.config)
    encoder.embeddings.word_embeddings.weight.copy_(student.table)
    encoder.embeddings.token_type_embeddings.weight.zero_()
    for layer in encoder.layers:
        assert isinstance(layer, Layer)
        layer.attention.out.weight.zero_()
        layer.mlp.fc2.weight.zero_()
        # Queries and keys wide enough that attention has a gradient to follow; 0.02 at this width leaves it uniform.
        nn.init.xavier_uniform_(layer.attention.qkv.weight)
        nn.init.xavier_uniform_(layer.mlp.fc1.weight)
    last = encoder.layers[-1]
    assert isinstance(last, Layer)
    last.mlp_norm.weight.copy_(student.scale)
    last.mlp_norm.bias.copy_(student.shift)
    return encoder


def distillation_loss(
    embeddings: Tensor,
    targets: Tensor,
    *,
    dims: Sequence[int],
    relation: float,
    temperature: float,
    projection: Tensor | None = None,
) -> Tensor:
    """Cosine distance to the targets plus ``relation`` times the relational loss, averaged over the widths.

    The distance alone lets short widths drift together; the relation to other texts keeps them apart, which is what
    bitext retrieval asks for. (B, D), (P, T) of different texts, the rows of ``targets`` beyond the first B being
    others to be told apart from. Without ``projection`` T must be D, and both sides are cut to each width. With one,
    (D, T), it takes the student to the teacher's space, its first rows a student that is cut (arXiv 2602.15547 projects
    the student's side; that the first rows serve the cut ones is ours).
    """
    losses = []
    for dim in dims:
        student, teacher = truncate(embeddings, dim), targets
        if projection is None:
            teacher = truncate(targets, dim)
        else:
            student = F.normalize(student @ projection[:dim], dim=-1)
        loss = distillation(student, teacher[: len(student)])
        if relation:
            loss = loss + relation * relational_distillation(student, teacher, temperature=temperature)
        losses.append(loss)
    return torch.stack(losses).mean()
