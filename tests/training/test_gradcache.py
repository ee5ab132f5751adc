"""A batch in parts gives the gradient of the batch at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyvec.losses import matryoshka, pair_loss
from polyvec.model.config import tiny
from polyvec.model.pooling import mean_pool
from polyvec.training import distributed
from polyvec.training.gradcache import Encode, cached_shares
from tests.conftest import packed, random_encoder


def loss_of(embeddings: Tensor) -> Tensor:
    return matryoshka(pair_loss, embeddings[0::2], embeddings[1::2], dims=(8, 32), temperature=0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("num_parts", "room"), [(1, 0), (2, 0), (5, 0), (1, 10), (5, 4), (5, 10)])
def test_gradcache_equals_the_full_batch(dropout: float, num_parts: int, room: int) -> None:
    config = tiny(hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0)
    texts = [packed([4 + i], seed=i)[0] for i in range(10)]
    parts = torch.arange(10).chunk(num_parts)

    with_graph: list[int] = []  # texts embedded so

    def gradients(*, cached: bool) -> tuple[float, list[Tensor]]:
        encoder = random_encoder(config).train()
        head = torch.nn.Parameter(torch.eye(32))  # a parameter of the loss itself

        def encode(part: Tensor) -> Tensor:
            with_graph.extend([len(part)] if torch.is_grad_enabled() and cached else [])
            rows = [texts[i] for i in part]
            cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
            return mean_pool(encoder(torch.cat(rows), cu_seqlens, torch.full((len(rows),), 1)), cu_seqlens)

        def seeded(number: int) -> Tensor:
            distributed.seed_part(7, 0, number)
            return encode(parts[number])

        if cached:
            total = 0.0
            places = (parts, torch.arange(10))
            shares = cached_shares(
                lambda e: loss_of(e([], None) @ head), lambda *_: places, encode, [head], seed=(7,), size_of=len,
                room=room,
            )  # fmt: skip
            for number, share in enumerate(shares):
                if number == 0:  # what was kept, and the first of the others
                    assert sum(with_graph) in (room, room + 10 // num_parts)
                share.backward()
                total += share.item()
        else:
            loss = loss_of(torch.cat([seeded(number) for number in range(len(parts))]) @ head)
            loss.backward()
            total = loss.item()
        return total, [p.grad for p in (*encoder.parameters(), head) if p.grad is not None]

    (whole_loss, whole), (cached_loss, cached) = gradients(cached=False), gradients(cached=True)
    assert cached_loss == pytest.approx(whole_loss, abs=1e-6)
    assert len(whole) == len(cached) and sum(with_graph) == 10
    for one, other in zip(whole, cached, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


def test_masks_follow_from_the_step_and_the_part_alone() -> None:
    """Whatever random numbers were drawn before, as after a stop; every call and part draws its own."""
    weight = torch.nn.Parameter(torch.ones(64))
    parts = ([1.0, 1.0], torch.arange(2))
    dropped = lambda part: torch.nn.functional.dropout(weight * part, 0.5)[None]  # noqa: E731

    def drawn(step: int) -> list[list[float]]:
        seen: list[list[float]] = []

        def loss(encode: Encode) -> Tensor:
            vectors = torch.cat([encode([], None), encode([], None)])
            seen.extend(vectors.tolist())
            return vectors.sum()

        list(cached_shares(loss, lambda *_: parts, dropped, seed=(0, step)))
        return seen

    first = drawn(0)
    torch.rand(3)
    assert drawn(0) == first
    assert len({tuple(mask) for mask in first + drawn(1)}) == 8
