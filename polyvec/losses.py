"""Training objectives as functions of embeddings. Every input row has unit length unless said otherwise.

Shape letters: B rows, M width, P passages per query, G rows of one task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polyvec.errors import InputError
from polyvec.model.pooling import truncate

_KEPT_ROWS = 1024  # whose scores are kept at every width: 4 MB a matrix; 1 to 2 ms a width without (AVX2, 2026-11-27)


def info_nce(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float,
    hardness: float = 0.0,
    guard: float = 0.0,
    related: Tensor | None = None,
) -> Tensor:
    """In-batch InfoNCE in nats: passages[i] answers queries[i], every other row is a negative. (B, M), (P, M), P >= B.

    Rows of ``passages`` beyond the first B are hard negatives, shared by all queries (arXiv 2409.10173, section 4.3).
    Each negative counts exp(``hardness`` * cosine) times, the cosine held constant: the nearer, the more it weighs
    (arXiv 2509.20354, section 2.2). What is no negative of a query is left out of its sum: where ``related``, a (B, P)
    mask, holds, and with a ``guard`` above 0 also what lies nearer than the answer by more than that, for it likely
    answers too (arXiv 2506.05176, section 3.3).
    """
    if len(passages) < len(queries):
        raise InputError(f"passages must be one for each query or more, got {len(passages)} for {len(queries)} queries")
    cosines = queries @ passages.T  # (B, P)
    logits = cosines / temperature
    answers = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    if hardness:
        logits = logits + (hardness * cosines.detach()).masked_fill(answers, 0.0)
    if guard:
        near = cosines > cosines.diagonal().unsqueeze(1) + guard
        related = near if related is None else related | near
    if related is not None:
        logits = logits.masked_fill(related & ~answers, float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))


def pair_loss(
    queries: Tensor,
    passages: Tensor,
    *,
    temperature: float,
    hardness: float = 0.0,
    guard: float = 0.0,
    related: Tensor | None = None,
) -> Tensor:
    """InfoNCE in both directions: the pair-training loss of arXiv 2409.10173, section 4.2. (B, M), (P, M), P >= B.

    Passages beyond the first B are hard negatives; backwards, only answers ask for their queries.
    """
    back = None if related is None else related[:, : len(queries)].T
    options = {"temperature": temperature, "hardness": hardness, "guard": guard}
    forwards = info_nce(queries, passages, **options, related=related)
    return forwards + info_nce(passages[: len(queries)], queries, **options, related=back)


def orthogonal_regularisation(embeddings: Tensor) -> Tensor:
    """Global orthogonal regularisation (arXiv 1708.06320, section 3): texts that do not match, like random directions.

    The squared mean of the cosines plus what the mean of their squares has above 1 / M, over every two rows of the
    (B, M) ``embeddings`` of different texts. Vectors that fill their space lose less when they are cut to bits. A text
    alone has no other: 0.
    """
    if len(embeddings) < 2:
        return embeddings.new_zeros(())
    first, second = torch.triu_indices(len(embeddings), len(embeddings), offset=1, device=embeddings.device)
    cosines = (embeddings @ embeddings.T)[first, second]
    return cosines.mean() ** 2 + (cosines.square().mean() - 1 / embeddings.shape[-1]).clamp_min(0.0)


def cosent(scores: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """CoSENT (arXiv 2409.10173, eq. 3): log(1 + sum exp((s_j - s_i) / temperature)) over pairs graded i above j.

    ``scores`` (B,) cosines of the pairs, ``targets`` (B,) their grades; only the order of the grades matters.
    """
    gaps = (scores.unsqueeze(0) - scores.unsqueeze(1)) / temperature  # gaps[i, j] = (s_j - s_i) / temperature
    wrong = gaps.masked_fill(targets.unsqueeze(1) <= targets.unsqueeze(0), float("-inf"))
    return torch.logsumexp(torch.cat((wrong.flatten(), wrong.new_zeros(1))), dim=0)


def separation_loss(embeddings: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """CoSENT over every two texts of a batch: same label above different label (arXiv 2409.10173, section 4.3).

    With two grades alone its sum over pairs of pairs is a product of two sums: a batch of 512 texts has 130,816 pairs,
    whose gaps to each other would take 68 GB.
    """
    first, second = torch.triu_indices(len(labels), len(labels), offset=1, device=labels.device)
    logits = (embeddings @ embeddings.T)[first, second] / temperature
    same = labels[first] == labels[second]
    # Not by index, whose size a GPU would have to tell, and not by infinity, which has no gradient where all are.
    least = torch.finfo(logits.dtype).min
    apart, together = logits.masked_fill(same, least), (-logits).masked_fill(~same, least)
    return F.softplus(torch.logsumexp(apart, dim=0) + torch.logsumexp(together, dim=0))


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine distance to the teacher's vector of the same text. (B, M) twice -> 0..2."""
    return (1.0 - (student * teacher).sum(dim=-1)).mean()


def relational_distillation(student: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy in nats between whom the teacher and whom the student hold for near. (B, M), (P, M), P >= B.

    ``targets[i]`` is the teacher's vector of text i; rows beyond the first B are of other texts. The teacher's cosines
    to all P rows, over ``temperature``, are the soft labels of the student's: unlike in InfoNCE, a near-duplicate among
    the others is no mistake (relational knowledge distillation as a softmax, arXiv 2106.04420).
    """
    labels = (targets[: len(student)] @ targets.T / temperature).softmax(dim=-1)
    return F.cross_entropy(student @ targets.T / temperature, labels)


def matryoshka(
    loss: Callable[..., Tensor], *embeddings: Tensor, dims: Sequence[int], **options: float | Tensor
) -> Tensor:
    """Mean of ``loss`` over each width in ``dims``, every side cut and renormalised (arXiv 2205.13147).

    Of many rows, what a width computes is not kept but computed again in the backward pass: the scores of one width and
    not of all are in memory, a gigabyte a matrix at 16,384 pairs. Raises ``InputError`` for a width that no side has.
    """
    width = min(e.shape[-1] for e in embeddings)
    if not dims or not all(1 <= dim <= width for dim in dims):
        raise InputError(f"dims must be widths from 1 to {width}, got {tuple(dims)}; leave out those that are wider")

    def at(dim: int) -> Tensor:
        return loss(*(truncate(e, dim) for e in embeddings), **options)

    if max(map(len, embeddings)) <= _KEPT_ROWS:
        return torch.stack([at(dim) for dim in dims]).mean()
    # No loss draws random numbers, whose state would be kept too.
    losses: list[Tensor] = [checkpoint(at, dim, use_reentrant=False, preserve_rng_state=False) for dim in dims]
    return torch.stack(losses).mean()
