"""The encoder's promises: a text's states are its own, adapters are exact, merging is undone bit for bit."""

from __future__ import annotations

import pytest
import torch

from polyvec.errors import InputError, WeightsError
from polyvec.model import lora
from polyvec.model.config import ModelConfig, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.lora import AdaptedEmbedding, AdaptedLinear, adapter_gate
from polyvec.model.pooling import mean_pool, truncate
from polyvec.model.rotary import rotary_table, rotate
from tests.conftest import packed, random_encoder

LENGTHS = [7, 31, 3, 31, 12]
TASKS = [0, -1, 4, 2, 2]


@torch.no_grad()
def test_a_mixed_batch_equals_its_texts_alone(encoder: Encoder) -> None:
    ids, cu_seqlens = packed(LENGTHS)
    together = encoder(ids, cu_seqlens, torch.tensor(TASKS))
    for row, (start, stop) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        alone = encoder(ids[start:stop], torch.tensor([0, stop - start], dtype=torch.int32), torch.tensor([TASKS[row]]))
        torch.testing.assert_close(together[start:stop], alone, atol=2e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tasks", [TASKS, [-1] * 5])
def test_a_pass_that_is_told_lengths_and_adapters_asks_the_device_for_nothing(
    monkeypatch: pytest.MonkeyPatch, tasks: list[int]
) -> None:
    monkeypatch.setattr("polyvec.model.encoder.runs_varlen", lambda *_: True)  # the path of a GPU
    encoder = random_encoder().to("meta")  # tensors without data: whoever asks for a number fails
    ids, cu_seqlens = (tensor.to("meta") for tensor in packed(LENGTHS))
    states = encoder(ids, cu_seqlens, torch.tensor(tasks, device="meta"), max_seqlen=31, adapters=set(tasks))
    assert mean_pool(states, cu_seqlens).shape == (5, 32)
    with pytest.raises((RuntimeError, NotImplementedError)):
        encoder(ids, cu_seqlens, torch.tensor(tasks, device="meta"))


@torch.no_grad()
def test_what_a_caller_knows_of_a_pass_changes_nothing(encoder: Encoder) -> None:
    ids, cu_seqlens = packed(LENGTHS)
    asked = encoder(ids, cu_seqlens, torch.tensor(TASKS))
    told = encoder(ids, cu_seqlens, torch.tensor(TASKS), max_seqlen=31, adapters=TASKS)
    assert torch.equal(asked, told)
    longer = encoder(ids, cu_seqlens, torch.tensor(TASKS), max_seqlen=64, adapters=TASKS)
    torch.testing.assert_close(longer, asked, atol=2e-6, rtol=0)


@torch.no_grad()
def test_a_low_rank_update_equals_its_full_matrix() -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(6, 8, num_adapters=3, rank=2, dropout=0.0)
    torch.nn.init.normal_(layer.weight), torch.nn.init.normal_(layer.lora_B)
    x, tasks = torch.randn(4, 6), torch.tensor([2, -1, 0, 1])
    y = layer(x, adapter_gate(tasks, 3, 2, 0.25, torch.float32))
    for row, task in enumerate(tasks.tolist()):
        weight = layer.weight + (layer.lora_B[task] @ layer.lora_A[task] * 0.25 if task >= 0 else 0)
        torch.testing.assert_close(y[row], x[row] @ weight.T + layer.bias)


@torch.no_grad()
def test_a_gathered_embedding_update_equals_its_full_table() -> None:
    torch.manual_seed(0)
    table = AdaptedEmbedding(9, 5, num_adapters=2, rank=3, dropout=0.0)
    torch.nn.init.normal_(table.weight), torch.nn.init.normal_(table.lora_A)
    ids, tasks = torch.tensor([8, 0, 3]), torch.tensor([1, -1, 0])
    rows = table(ids, adapter_gate(tasks, 2, 3, 0.5, torch.float32))
    for row, task in enumerate(tasks.tolist()):
        full = table.weight + (table.lora_A[task] @ table.lora_B[task] * 0.5 if task >= 0 else 0)
        torch.testing.assert_close(rows[row], full[ids[row]])


@torch.no_grad()
@pytest.mark.parametrize("task", range(5))
def test_merging_gives_the_same_states_and_unmerging_the_same_bits(task: int) -> None:
    encoder = random_encoder()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    ids, cu_seqlens = packed(LENGTHS)
    tasks = torch.full((len(LENGTHS),), task)
    apart = encoder(ids, cu_seqlens, tasks)
    encoder.merge(task)
    torch.testing.assert_close(encoder(ids, cu_seqlens, tasks), apart, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="unmerge"):
        encoder(ids, cu_seqlens, torch.tensor(TASKS))
    encoder.unmerge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


@torch.no_grad()
def test_frozen_adapters_give_the_same_states_and_are_no_part_of_the_model() -> None:
    encoder, plain = random_encoder(), random_encoder()
    encoder.freeze_adapters()
    ids, cu_seqlens = packed(LENGTHS)
    for tasks in (TASKS, [2] * 5, [-1] * 5):
        want = plain(ids, cu_seqlens, torch.tensor(tasks))
        torch.testing.assert_close(encoder(ids, cu_seqlens, torch.tensor(tasks)), want, atol=5e-6, rtol=0)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in encoder.parameters()) == sum(p.numel() for p in plain.parameters())
    encoder.merge(2)
    with pytest.raises(InputError, match="must be unmerged to be frozen, got adapter 2"):
        encoder.freeze_adapters()
    encoder.unmerge()
    want = plain(ids, cu_seqlens, torch.tensor(TASKS))
    torch.testing.assert_close(encoder(ids, cu_seqlens, torch.tensor(TASKS)), want, atol=5e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (7, 7)])
def test_a_frozen_layer_has_columns_of_whole_cache_lines_and_the_same_products(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = AdaptedLinear(*shape, num_adapters=17, rank=4, dropout=0.0)  # 68 columns
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x, gate = torch.randn(20, shape[0]), adapter_gate(torch.arange(20) % 18 - 1, 17, 4, 0.25, torch.float32)
    want = layer(x, gate)
    layer.freeze()
    assert layer.num_columns == 128
    got = layer(x, torch.nn.functional.pad(gate, (0, 60)))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-6)
    assert torch.equal(layer(x, None), torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_columns_filled_up_for_a_gpu_keep_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, cu_seqlens = packed(LENGTHS)
    gradients = []
    for step in (1, 64):
        monkeypatch.setattr(lora, "column_step", lambda _, step=step: step)
        encoder = random_encoder(tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        assert encoder.layers[0].mlp.fc1.num_columns == max(20, step)  # type: ignore[union-attr]
        encoder(ids, cu_seqlens, torch.tensor(TASKS)).square().mean().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_frozen_adapters_are_dropped_by_training_and_by_other_weights() -> None:
    encoder, other = random_encoder(), random_encoder(seed=1)
    ids, cu_seqlens = packed(LENGTHS)
    encoder.freeze_adapters()
    encoder.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(encoder(ids, cu_seqlens, torch.tensor(TASKS)), other(ids, cu_seqlens, torch.tensor(TASKS)))
    encoder.freeze_adapters()
    encoder.train().eval()
    with torch.no_grad():
        assert torch.equal(encoder(ids, cu_seqlens, torch.tensor(TASKS)), other(ids, cu_seqlens, torch.tensor(TASKS)))


@torch.no_grad()
def test_rotation_sees_distances_not_positions() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i: int, j: int) -> float:
        at = rotary_table(torch.tensor([i, j]), 8, 20_000.0, torch.float32)
        return float((rotate(query, at[0][:1], at[1][:1]) * rotate(key, at[0][1:], at[1][1:])).sum())

    assert score(3, 10) == pytest.approx(score(500, 507), abs=1e-4)
    assert score(3, 10) != pytest.approx(score(3, 11), abs=1e-3)


def test_pooling_averages_each_text_and_truncation_renormalises() -> None:
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    pooled = mean_pool(states, torch.tensor([0, 2, 3], dtype=torch.int32))
    assert pooled.tolist() == [[2.0, 3.0], [10.0, 20.0]]
    assert truncate(torch.tensor([[3.0, 4.0, 5.0]]), 2).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_gradient_checkpointing_keeps_the_gradients() -> None:
    ids, cu_seqlens = packed([9, 4])
    gradients = []
    for checkpointing in (False, True):
        encoder = random_encoder(tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
        encoder.gradient_checkpointing = checkpointing
        encoder(ids, cu_seqlens, torch.tensor([1, 3])).square().sum().backward()
        gradients.append(encoder.layers[0].mlp.fc1.weight.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_acts_in_training_alone() -> None:
    encoder = random_encoder()
    ids, cu_seqlens = packed([9])
    task = torch.tensor([0])
    with torch.no_grad():
        assert torch.equal(encoder(ids, cu_seqlens, task), encoder(ids, cu_seqlens, task))
        encoder.train()
        assert not torch.equal(encoder(ids, cu_seqlens, task), encoder(ids, cu_seqlens, task))


def test_a_config_comes_back_and_strange_fields_are_named() -> None:
    values = tiny().to_dict()
    assert ModelConfig.from_dict(values) == tiny()
    with pytest.raises(WeightsError, match="unknown hidden_sise, missing hidden_size"):
        ModelConfig.from_dict({**{k: v for k, v in values.items() if k != "hidden_size"}, "hidden_sise": 32})
    with pytest.raises(WeightsError, match="multiple of twice"):
        tiny(num_attention_heads=3)


def test_the_default_config_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        encoder = Encoder(ModelConfig())
    counts = {n: p.numel() for n, p in encoder.named_parameters()}
    assert sum(counts.values()) == 572_310_396
    assert sum(c for n, c in counts.items() if ".lora_" in n) == 12_946_300
