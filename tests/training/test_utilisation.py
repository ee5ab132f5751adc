"""The FLOPs of a step are those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from polyvec.model.config import tiny
from polyvec.training.adapters import freeze_base
from polyvec.training.mlm import MaskedLanguageModel
from polyvec.training.utilisation import Work, head_flops, measured_peak
from tests.conftest import random_encoder

CONFIG = tiny(
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_size=256, intermediate_size=512, lora_rank=1
)


@pytest.mark.parametrize("trains_base", [True, False])
def test_a_step_takes_as_many_flops_as_torch_counts(trains_base: bool) -> None:
    encoder = random_encoder(CONFIG).train()
    if not trains_base:
        freeze_base(encoder)
    lengths = [50, 50, 50]
    ids, cu_seqlens = torch.arange(150) + 4, torch.tensor([0, 50, 100, 150], dtype=torch.int32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder(ids, cu_seqlens, torch.full((3,), -1 if trains_base else 2)).sum().backward()
    work = Work()
    work.add(CONFIG, lengths, trains_base=trains_base)
    assert work.tokens == 150
    assert counter.get_total_flops() == pytest.approx(work.flops, rel=0.06)  # torch counts the adapters too


def test_the_head_of_masked_words_counts() -> None:
    encoder = random_encoder(CONFIG).train()
    model = MaskedLanguageModel(encoder)
    ids, cu_seqlens = torch.arange(40) + 4, torch.tensor([0, 40], dtype=torch.int32)
    hidden = torch.arange(0, 40, 4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, cu_seqlens, hidden, ids[hidden]).backward()
    work = Work()
    work.add(CONFIG, [40], trains_base=True)
    assert counter.get_total_flops() == pytest.approx(work.flops + 3 * head_flops(CONFIG, 10), rel=0.02)


def test_the_peak_is_of_this_device() -> None:
    peak = measured_peak(torch.device("cpu"), bf16=False)
    assert peak > 1e8
    # Without instructions for bfloat16 its products take a hundred times as long, and a run would be at 200 % of them.
    assert measured_peak(torch.device("cpu"), bf16=True) > peak / 4
