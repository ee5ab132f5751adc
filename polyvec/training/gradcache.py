"""Contrastive batches of any size in the memory of one part (GradCache, arXiv 2101.06983), on any number of processes.

InfoNCE compares every text of a batch with every other, so its gradient needs all embeddings at once; but not all
activations. The texts are embedded without a graph, the loss gives the gradient of each embedding, and each part is
then embedded again, with a graph, to carry its gradients on to the weights: a third more work, the same numbers. Parts
whose activations fit into the memory of one are spared that: they keep their graph from the first time.
Several processes share the parts; each sees all embeddings, so that negatives come from the whole batch.

Shape letters: B texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from polyvec.training import distributed

Part = TypeVar("Part")
#: Texts with their task to (B, D) mean-pooled vectors.
Encode = Callable[[Sequence[str], str | None], Tensor]
#: Texts with their task to parts that run together, and the (B,) place of each text among the parts' rows.
PartsOf = Callable[[Sequence[str], str | None], tuple[Sequence[Part], Tensor]]


def cached_shares(
    loss_of: Callable[[Encode], Tensor],
    parts_of: PartsOf[Part],
    embed: Callable[[Part], Tensor],
    heads: Sequence[nn.Parameter] = (),
    *,
    seed: Sequence[int],
    size_of: Callable[[Part], int] = lambda part: 1,
    room: int = 0,
) -> Iterator[Tensor]:
    """Yield a share of the loss for each part; sent backwards one by one, they add up to its whole gradient.

    ``loss_of`` is the step: it embeds what it needs through the function given to it and returns the loss. ``embed``
    maps a part to its (b, D) embeddings. ``heads`` are parameters of the loss itself; their gradient is set at once.
    Parts keep their graph as long as their ``size_of``, in tokens, adds up to ``room`` at most. On several processes
    the gradients are to be summed over them. Dropout draws a part's masks from ``seed``, another one each step, and the
    part's number: the same in both passes, on any process.
    """
    calls: list[tuple[list[_Turn[Part]], Tensor]] = []
    left = room

    def encode(texts: Sequence[str], task: str | None) -> Tensor:
        nonlocal left
        parts, places = parts_of(texts, task)
        mine, size = distributed.my_share(len(parts)), distributed.world_size()
        turns: list[_Turn[Part]] = []
        cached = []
        for number, i in enumerate(mine):
            # Of all processes' parts of this turn: under FSDP2 they must run the model alike.
            largest = max(map(size_of, parts[number * size : (number + 1) * size]))
            keeps = largest <= left
            left -= largest if keeps else 0
            numbers = (*seed, len(calls), i)
            distributed.seed_part(*numbers)
            with torch.set_grad_enabled(keeps):
                vectors = embed(parts[i])
            turns.append(_Turn(parts[i], numbers, vectors if keeps else None))
            cached.append(vectors.detach())
        rows = distributed.gather_rows(cached, len(parts))
        edges = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
        leaf = torch.cat(rows).requires_grad_()
        for turn, i in zip(turns[: distributed.num_own(len(parts))], mine, strict=False):
            turn.rows = slice(edges[i], edges[i + 1])
        calls.append((turns, leaf))
        return leaf[places.to(leaf.device)]

    loss = loss_of(encode)
    leaves = [leaf for _, leaf in calls]
    gradients = torch.autograd.grad(loss, [*leaves, *heads])
    for head, gradient in zip(heads, gradients[len(leaves) :], strict=True):
        head.grad = gradient / distributed.world_size()  # every process has the whole of it
    pending = [(turn, gradient) for (turns, _), gradient in zip(calls, gradients, strict=False) for turn in turns]
    value = loss.detach() / len(pending) / distributed.world_size()
    # Those with a graph first: no other part's activations come on top of theirs.
    for turn, gradient in sorted(pending, key=lambda each: each[0].vectors is None):
        vectors, turn.vectors = turn.vectors, None
        if vectors is None:
            distributed.seed_part(*turn.seed)
            vectors = embed(turn.part)
        # A part that only fills this process's turn runs for the others' sake and adds nothing.
        carrier = (vectors * (torch.zeros_like(vectors) if turn.rows is None else gradient[turn.rows])).sum()
        yield carrier - carrier.detach() + value  # its gradient is the part's, its value a share of the loss


@dataclass
class _Turn(Generic[Part]):
    """A part of this process, what its random numbers come from, its embeddings if they have a graph, and its rows
    among all, None where it only fills the turn."""

    part: Part
    seed: tuple[int, ...]
    vectors: Tensor | None
    rows: slice | None = None
