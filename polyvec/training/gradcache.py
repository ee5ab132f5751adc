"""Contrastive batches of any size in the memory of one part (GradCache, arXiv 2101.06983).

InfoNCE compares every text of a batch with every other, so its gradient needs all embeddings at once; but not all
activations. The texts are embedded without a graph, the loss gives the gradient of each embedding, and each part is
then embedded again, with a graph, to carry its gradients on to the weights: a third more work, the same numbers.

Shape letters: B texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")


def cached_shares(
    encode: Callable[[Part], Tensor], parts: Sequence[Part], loss_of: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yield a share of the loss for each of ``parts``; sent backwards one by one, they add up to its whole gradient.

    ``encode`` maps a part to its (b, D) embeddings and ``loss_of`` all of them, (B, D) in the order of ``parts``, to
    the loss. Dropout draws the same masks in both passes.
    """
    states, cached = [], []
    with torch.no_grad():
        for part in parts:
            states.append(torch.get_rng_state())
            cached.append(encode(part))
    embeddings = torch.cat(cached).requires_grad_()
    loss = loss_of(embeddings)
    (gradients,) = torch.autograd.grad(loss, embeddings)
    value = loss.detach() / len(parts)
    for part, state, gradient in zip(parts, states, torch.split(gradients, [len(c) for c in cached]), strict=True):
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        carrier = (encode(part) * gradient).sum()
        torch.set_rng_state(after)
        yield carrier - carrier.detach() + value  # its gradient is the part's, its value a share of the loss
