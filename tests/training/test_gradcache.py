"""A batch in parts gives the gradient of the batch at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polyvec.losses import matryoshka, pair_loss
from polyvec.model.config import tiny
from polyvec.model.pooling import mean_pool
from polyvec.training.gradcache import cached_shares
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

        torch.manual_seed(7)
        if cached:
            total = 0.0
            places = (parts, torch.arange(10))
            shares = cached_shares(
                lambda e: loss_of(e([], None) @ head), lambda *_: places, encode, [head], size_of=len, room=room
            )
            for number, share in enumerate(shares):
                if number == 0:  # what was kept, and the first of the others
                    assert sum(with_graph) in (room, room + 10 // num_parts)
                share.backward()
                total += share.item()
        else:
            loss = loss_of(torch.cat([encode(part) for part in parts]) @ head)
            loss.backward()
            total = loss.item()
        return total, [p.grad for p in (*encoder.parameters(), head) if p.grad is not None]

    (whole_loss, whole), (cached_loss, cached) = gradients(cached=False), gradients(cached=True)
    assert cached_loss == pytest.approx(whole_loss, abs=1e-6)
    assert len(whole) == len(cached) and sum(with_graph) == 10
    for one, other in zip(whole, cached, strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


def test_random_numbers_go_on_after_a_step() -> None:
    """What is drawn after the step is what the straight run would draw: masks are replayed, not rewound."""
    weight = torch.nn.Parameter(torch.ones(4))
    torch.manual_seed(3)
    parts = ([1.0, 2.0], torch.arange(2))
    dropped = lambda part: torch.nn.functional.dropout(weight * part, 0.5)[None]  # noqa: E731
    list(cached_shares(lambda encode: encode([], None).sum(), lambda *_: parts, dropped))
    drawn = torch.rand(3)
    torch.manual_seed(3)
    for _ in range(2):
        torch.nn.functional.dropout(torch.ones(4), 0.5)
    assert torch.equal(drawn, torch.rand(3))
