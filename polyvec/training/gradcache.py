"""Contrastive batches of any size in the memory of one part (GradCache, arXiv 2101.06983), on any number of processes.

InfoNCE compares every text of a batch with every other, so its gradient needs all embeddings at once; but not all
activations. The texts are embedded without a graph, the loss gives the gradient of each embedding, and each part is
then embedded again, with a graph, to carry its gradients on to the weights: a third more work, the same numbers.
Several processes share the parts; each sees all embeddings, so that negatives come from the whole batch.

Shape letters: B texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

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
) -> Iterator[Tensor]:
    """Yield a share of the loss for each part; sent backwards one by one, they add up to its whole gradient.

    ``loss_of`` is the step: it embeds what it needs through the function given to it and returns the loss. ``embed``
    maps a part to its (b, D) embeddings. ``heads`` are parameters of the loss itself; their gradient is set at once.
    On several processes the gradients are to be summed over them. Dropout draws the same masks in both passes.
    """
    calls: list[tuple[list[Part], list[list[Tensor]], Tensor, list[slice | None]]] = []

    def encode(texts: Sequence[str], task: str | None) -> Tensor:
        parts, places = parts_of(texts, task)
        mine = distributed.my_share(len(parts))
        states, cached = [], []
        with torch.no_grad():
            for i in mine:
                states.append(distributed.random_states())
                cached.append(embed(parts[i]))
        rows = distributed.gather_rows(cached, len(parts))
        edges = torch.tensor([0, *map(len, rows)]).cumsum(0).tolist()
        leaf = torch.cat(rows).requires_grad_()
        own = distributed.num_own(len(parts))
        slices = [slice(edges[i], edges[i + 1]) if turn < own else None for turn, i in enumerate(mine)]
        calls.append(([parts[i] for i in mine], states, leaf, slices))
        return leaf[places.to(leaf.device)]

    loss = loss_of(encode)
    leaves = [leaf for _, _, leaf, _ in calls]
    gradients = torch.autograd.grad(loss, [*leaves, *heads])
    for head, gradient in zip(heads, gradients[len(leaves) :], strict=True):
        head.grad = gradient / distributed.world_size()  # every process has the whole of it
    num_shares = sum(len(parts) for parts, *_ in calls)
    value = loss.detach() / num_shares / distributed.world_size()
    for (parts, states, _, slices), gradient in zip(calls, gradients, strict=False):
        for part, state, rows in zip(parts, states, slices, strict=True):
            after = distributed.random_states()
            distributed.set_random_states(state)
            vectors = embed(part)
            # A part that only fills this process's turn runs for the others' sake and adds nothing.
            carrier = (vectors * (torch.zeros_like(vectors) if rows is None else gradient[rows])).sum()
            distributed.set_random_states(after)
            yield carrier - carrier.detach() + value  # its gradient is the part's, its value a share of the loss
