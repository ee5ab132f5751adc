"""Every stage of training does what its name says, on a model of a few thousand parameters."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyvec.data.sampling import GroupedSampler, LabelSampler
from polyvec.data.tokenized import TokenizedTexts
from polyvec.errors import InputError
from polyvec.losses import (
    cosent,
    distillation,
    info_nce,
    matryoshka,
    orthogonal_regularisation,
    pair_loss,
    relational_distillation,
    separation_loss,
)
from polyvec.model.config import tiny
from polyvec.model.encoder import Encoder
from polyvec.model.pooling import mean_pool, truncate
from polyvec.samples import corpus
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.adapters import TextEncoder, freeze_base
from polyvec.training.checkpoint import Checkpoint
from polyvec.training.distill import StaticStudent, co_occurrence_table, distillation_loss, grow
from polyvec.training.loop import Schedule, train
from polyvec.training.objectives import classification_step, graded_step, pair_step, separation_step
from polyvec.training.teachers import combine, extend
from polyvec.training.vocabulary import balanced_sample, fertility, train_unigram
from tests.conftest import packed

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DIMS = (8, 32)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_losses_have_their_closed_forms() -> None:
    same = torch.ones(5, 4) / 2
    assert float(info_nce(same, same, temperature=0.05)) == pytest.approx(np.log(5))
    with pytest.raises(InputError, match="passages must be one for each query or more, got 4 for 5 queries"):
        info_nce(same, same[:4], temperature=0.05)
    assert float(pair_loss(same, same, temperature=0.05)) == pytest.approx(2 * np.log(5))
    assert float(distillation(same, -same)) == pytest.approx(2.0)
    right, wrong = torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9])
    grades = torch.tensor([1.0, 0.0])
    assert float(cosent(wrong, grades, temperature=0.05)) == pytest.approx(np.log1p(np.exp(0.8 / 0.05)), rel=1e-5)
    assert float(cosent(right, grades, temperature=0.05)) == pytest.approx(np.log1p(np.exp(-0.8 / 0.05)), abs=1e-6)
    assert float(cosent(wrong, torch.ones(2), temperature=0.05)) == pytest.approx(0.0)


def test_separation_wants_labels_together() -> None:
    apart, mixed = torch.eye(4)[[0, 0, 1, 1]], torch.eye(4)[[0, 1, 0, 1]]
    labels = torch.tensor([0, 0, 1, 1])
    assert separation_loss(apart, labels, temperature=0.05) < 0.01
    assert separation_loss(mixed, labels, temperature=0.05) > 10


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 1, 2, 2, 3], [0] * 8, list(range(8))])
def test_separation_is_cosent_over_all_pairs_of_texts(labels: list[int]) -> None:
    vectors = unit(8, 16, seed=4).requires_grad_()
    first, second = torch.triu_indices(8, 8, offset=1)
    classes = torch.tensor(labels)
    grades = (classes[first] == classes[second]).float()
    by_pairs = cosent((vectors @ vectors.T)[first, second], grades, temperature=0.05)
    ours = separation_loss(vectors, classes, temperature=0.05)
    torch.testing.assert_close(ours, by_pairs)
    torch.testing.assert_close(torch.autograd.grad(ours, vectors), torch.autograd.grad(by_pairs, vectors))


def test_a_loss_keeps_little_for_its_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyvec.losses._KEPT_ROWS", 32)
    kept: list[int] = []

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    vectors, others = unit(64, 32).requires_grad_(), unit(64, 32, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        separation_loss(vectors, torch.arange(64) // 4, temperature=0.05)
        assert max(kept) <= 64 * 64  # and not the gaps between all 2,016 pairs
        kept.clear()
        matryoshka(pair_loss, vectors, others, dims=(8, 16, 32), temperature=0.05)
        assert sum(kept) < 64 * 64  # and not the scores of every width


@pytest.mark.parametrize("kept", [0, 1024])
def test_matryoshka_is_the_mean_over_cut_and_rescaled_widths(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyvec.losses._KEPT_ROWS", kept)
    first, second = unit(6, 16).requires_grad_(), unit(6, 16, seed=1)
    by_hand = torch.stack([info_nce(truncate(first, d), truncate(second, d), temperature=0.1) for d in (4, 16)]).mean()
    whole = matryoshka(info_nce, first, second, dims=(4, 16), temperature=0.1)
    torch.testing.assert_close(whole, by_hand)
    assert torch.equal(*(torch.autograd.grad(loss, first)[0] for loss in (whole, by_hand)))
    for dims in ((4, 99), (0,), ()):
        with pytest.raises(InputError, match="dims must be widths from 1 to 16, got"):
            matryoshka(info_nce, first, second, dims=dims, temperature=0.1)


def test_relational_distillation_takes_the_teachers_word_for_who_is_near() -> None:
    targets = torch.eye(4)
    self_entropy = -torch.tensor([10.0, 0, 0, 0]).softmax(0) @ torch.tensor([10.0, 0, 0, 0]).log_softmax(0)
    loss = relational_distillation(targets[:2], targets, temperature=0.1)
    assert float(loss) == pytest.approx(float(self_entropy), abs=1e-6)
    twins = torch.eye(4)[[0, 1, 0, 3]]  # row 2 is a near-duplicate of row 0: InfoNCE calls it a mistake
    student = unit(1, 4, seed=3)
    labels = torch.tensor([10.0, 0, 10.0, 0]).softmax(0)
    by_hand = -(labels * (student[0] @ twins.T * 10).log_softmax(0)).sum()
    torch.testing.assert_close(relational_distillation(student, twins, temperature=0.1), by_hand)


def test_shares_of_a_step_add_up_to_the_gradient_of_the_whole(tmp_path: Path) -> None:
    rows, targets = unit(12, 8, seed=1), unit(12, 8, seed=2)
    weights = []
    for parts in (1, 3):
        weight = torch.nn.Parameter(torch.eye(8))

        def shares(step: int, weight: torch.nn.Parameter = weight, parts: int = parts) -> Iterator[torch.Tensor]:
            for plan in torch.arange(12).chunk(parts):
                others = torch.tensor([i for i in range(12) if i not in plan.tolist()], dtype=torch.long)
                bank = targets[torch.cat((plan, others))]
                embeddings = rows[plan] @ weight
                loss = distillation_loss(embeddings, bank, dims=(4, 8), relation=0.5, temperature=0.1)
                yield loss * (len(plan) / 12)

        train([([weight], 1.0)], shares, Schedule(steps=3, learning_rate=0.1, warmup_steps=1),
              log_path=tmp_path / "log.jsonl")  # fmt: skip
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)


def test_a_grown_encoder_computes_what_its_student_did() -> None:
    torch.manual_seed(0)
    student = StaticStudent(tiny())
    student.scale.data.uniform_(0.5, 1.5), student.shift.data.normal_()
    ids, cu_seqlens = packed([4, 9, 2])
    encoder = grow(student).eval()
    with torch.no_grad():
        states = encoder(ids, cu_seqlens, torch.full((3,), -1))
        torch.testing.assert_close(mean_pool(states, cu_seqlens), student(ids, cu_seqlens), atol=1e-4, rtol=0)


def test_distillation_learns_its_targets_from_a_first_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(4, 512, 64 * 6, dtype=np.int32)
    texts = TokenizedTexts(ids, np.arange(0, len(ids) + 1, 6), bos_token_id=0, eos_token_id=2)
    targets = unit(64, 32)
    student = StaticStudent(tiny())
    student.table.data = co_occurrence_table(texts, targets, np.arange(64), 512)

    def loss(rows: np.ndarray) -> torch.Tensor:
        ids, cu_seqlens = texts.pack(np.stack((rows, rows + 1), axis=1))
        goals = targets[torch.from_numpy(rows)]
        return distillation_loss(student(ids, cu_seqlens), goals, dims=DIMS, relation=0.1, temperature=0.05)

    rng = np.random.default_rng(0)
    losses = train(
        [(list(student.parameters()), 1.0)],
        lambda step: [loss(rng.choice(64, 16, replace=False))],
        Schedule(steps=40, learning_rate=0.05, warmup_steps=2),
        log_path=tmp_path / "log.jsonl",
    )
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(
            [([weight], 1.0)], lambda step: [weight.sum() * float("nan")],
            Schedule(steps=3, learning_rate=0.1), log_path=tmp_path / "log.jsonl",
        )  # fmt: skip
    assert weight.tolist() == [1.0, 1.0]


def run_of(
    folder: Path,
    *,
    seed: int = 0,
    width: int = 4,
    stop: Callable[[int], None] | None = None,
    notice: Callable[[str], None] = lambda sentence: None,
) -> tuple[torch.Tensor, list[float]]:
    """Train 12 steps of a noisy regression with dropout, checkpoint every 4; ``stop`` is called in each step."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(width))

    def shares(step: int) -> Iterator[torch.Tensor]:
        noise = torch.randn(width, generator=torch.Generator().manual_seed(step))
        if stop is not None:
            stop(step)
        torch.manual_seed(step)
        yield (torch.nn.functional.dropout(weight, 0.5) - 1 - 0.1 * noise).square().mean()

    checkpoint = Checkpoint(folder / "run.safetensors", every=4, run={"seed": seed})
    schedule = Schedule(steps=12, learning_rate=0.1, warmup_steps=2)
    losses = train(
        [([weight], 1.0)], shares, schedule, log_path=folder / "log.jsonl", log_every=3, checkpoint=checkpoint,
        notice=notice,
    )  # fmt: skip
    return weight.detach(), losses


def test_a_stopped_and_resumed_run_gives_the_weights_of_the_straight_one(tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir(), (tmp_path / "stopped").mkdir()
    straight, losses = run_of(tmp_path / "straight")

    def crash(step: int) -> None:
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_of(tmp_path / "stopped", stop=crash)
    with (tmp_path / "stopped" / "log.jsonl").open("a") as log:
        log.write('{"step": 12, "lo')  # the power fails
    read: list[int] = []
    resumed, all_losses = run_of(tmp_path / "stopped", stop=read.append)
    assert read == [8, 9, 10, 11]
    assert torch.equal(resumed, straight) and all_losses == losses
    rows = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path: Path) -> None:
    first, second, idle = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))

    def shares(step: int) -> list[torch.Tensor]:
        rest = (first - first.detach()).square().sum().sqrt() if step == 6 else 0.0  # 0, with the gradient 0 / 0
        return [first.square().sum() + second.square().sum() + rest]

    checkpoint = Checkpoint(tmp_path / "run.safetensors", every=4, run={})
    options: dict[str, Any] = {"log_path": tmp_path / "log.jsonl", "checkpoint": checkpoint}
    schedule, groups = Schedule(steps=12, learning_rate=0.1), [([first, second], 1.0), ([idle], 1.0)]
    with pytest.raises(FloatingPointError, match="finite, got nan as their norm at step 6, first in the first; lower"):
        train(groups, shares, schedule, **options, names={first: "the first"})
    assert first.isfinite().all() and second.isfinite().all()
    assert len(checkpoint.restore([first, second, idle], torch.optim.AdamW([first, second, idle]))) == 4
    with pytest.raises(FloatingPointError, match=r"at step 6, first in parameter 0 of shape \(2,\); lower"):
        train(groups, shares, schedule, **options)
    with pytest.raises(FloatingPointError, match="got inf as their norm at step 0, first in none alone"):
        train(groups, lambda step: [first.sum() * 1e25], schedule, log_path=tmp_path / "other.jsonl")


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits(tmp_path: Path, kind: signal.Signals) -> None:
    def own(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    def terminate(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), kind)

    def hurry(step: int) -> None:
        os.kill(os.getpid(), kind)
        os.kill(os.getpid(), kind)

    def ignored(step: int) -> None:
        os.kill(os.getpid(), kind)
        read.append(step)

    before = signal.signal(kind, own)
    try:
        told: list[str] = []
        with pytest.raises(SystemExit) as stopped:
            run_of(tmp_path, stop=terminate, notice=told.append)
        assert stopped.value.code == 128 + kind and signal.getsignal(kind) is own
        assert told == [f"stopped by {kind.name} and saved after step 6 of 12; the same run again goes on from there"]
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait for the end of the step
            run_of(tmp_path, stop=hurry)
        assert signal.getsignal(kind) is own
        signal.signal(kind, signal.SIG_IGN)  # as a shell does for what runs in its background
        read: list[int] = []
        run_of(tmp_path, stop=ignored)
        assert read == list(range(6, 12))
    finally:
        signal.signal(kind, before)


def test_a_checkpoint_of_another_run_or_shape_or_a_cut_one_is_refused(tmp_path: Path) -> None:
    run_of(tmp_path)
    with pytest.raises(InputError, match="same run, got seed 0 instead of 1"):
        run_of(tmp_path, seed=1)
    with pytest.raises(InputError, match=r"same architecture, got parameters.0 of shape \(4,\) instead of \(5,\)"):
        run_of(tmp_path, width=5)
    path = tmp_path / "run.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="must be a whole checkpoint"):
        run_of(tmp_path)


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("retrieval", {"retrieval.query", "retrieval.passage"}),
        ("text-matching", {"text-matching"}),
        ("classification", {"classification"}),
        ("separation", {"separation"}),
    ],
)
def test_an_adapter_stage_learns_and_touches_its_own_adapters_alone(
    tmp_path: Path, tokenizer: Tokenizer, stage: str, trained: set[str]
) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny(**NO_DROPOUT)).train()  # adapters that start as no change, as in every real run
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encode = TextEncoder(encoder, tokenizer, max_tokens=64)
    texts = [row["text"] for row in corpus()[:8]]
    pairs = [(a[:30], a[30:]) for a in texts]
    steps = {
        "retrieval": lambda step: pair_step(encode, pairs, tasks=("retrieval.query", "retrieval.passage"), dims=DIMS),
        "text-matching": lambda step: graded_step(
            encode, [(a, b, i / 8) for i, (a, b) in enumerate(pairs)], task="text-matching", dims=DIMS
        ),
        "classification": lambda step: classification_step(
            encode, [a for a, _ in pairs], [b for _, b in pairs], (range(8), range(8)), task="classification", dims=DIMS
        ),
        "separation": lambda step: separation_step(
            encode, texts, [0, 0, 0, 0, 1, 1, 1, 1], task="separation", dims=DIMS
        ),
    }
    losses = train(
        [(freeze_base(encoder), 1.0)], lambda step: [steps[stage](step)],
        Schedule(steps=30, learning_rate=0.01, warmup_steps=2), log_path=tmp_path / "log.jsonl",
    )  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    names = encoder.config.tasks
    for name, tensor in encoder.state_dict().items():
        if ".lora_" not in name or name.startswith("pooler"):
            assert torch.equal(tensor, before[name]), name
            continue
        for i, task in enumerate(names):
            if task not in trained:
                assert torch.equal(tensor[i], before[name][i]), (name, task)
    changed = encoder.state_dict()["layers.0.mlp.fc1.lora_A"]
    assert all(
        not torch.equal(changed[names.index(t)], before["layers.0.mlp.fc1.lora_A"][names.index(t)]) for t in trained
    )


def test_batches_hold_one_group_and_repeat_exactly() -> None:
    keys = 50 * "a" + 20 * "b" + 3 * "c"
    sampler = GroupedSampler(keys, smallest=10, seed=1)
    seen = set()
    for step in range(30):
        batch = sampler.draw(step, 8)
        assert len({keys[number] for number in batch}) == 1 and len(set(batch)) == 8
        assert batch == sampler.draw(step, 8)
        seen.add(keys[batch[0]])
    assert seen == {"a", "b"}


def test_labelled_batches_hold_whole_classes() -> None:
    rows = [("d", f"class {c}") for c in range(5) for _ in range(c + 1)]
    numbers, labels = LabelSampler(rows, per_class=3).draw(0, 2)
    assert labels == [0, 0, 0, 1, 1, 1] and len(set(numbers)) == 6
    assert len({rows[number] for number in numbers[:3]}) == 1


def test_classmates_share_a_class_and_the_others_do_not() -> None:
    rows = [("d", f"class {c}") for c in range(3) for _ in range(9)] + [("d", "small")]
    sampler = LabelSampler(rows, per_class=2, seed=3)
    drawn = sampler.draw_classmates(5, 8, 7)
    assert drawn == sampler.draw_classmates(5, 8, 7) != sampler.draw_classmates(6, 8, 7)
    assert len(set(drawn.queries + drawn.positives)) == 16
    class_of = {text: label for label, texts in enumerate(sampler.datasets[0]) for text in texts}
    assert [class_of[t] for t in drawn.queries] == [class_of[t] for t in drawn.positives] == drawn.labels
    assert [class_of[t] for t in drawn.others] == drawn.other_labels
    assert all(o != label for i, label in enumerate(drawn.labels) for o in drawn.other_labels[7 * i : 7 * i + 7])
    assert max(drawn.labels.count(c) for c in range(3)) - min(drawn.labels.count(c) for c in range(3)) <= 1
    assert len(sampler.draw_classmates(0, 100, 0).queries) == 12  # each class gives four pairs of its nine


def test_a_classmate_is_no_negative_as_if_the_paper_s_id_told_them_apart() -> None:
    queries, positives, others = unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2)
    passages = torch.cat((positives, others))
    labels, other_labels = torch.tensor([0, 1, 0, 2]), torch.tensor([1, 2, 3, 3, 3, 0])
    related = labels.unsqueeze(1) == torch.cat((labels, other_labels))
    ours = pair_loss(queries, passages, temperature=0.1, related=related)
    exp = (queries @ passages.T / 0.1).exp()  # the paper's sums, written out, over what is no classmate
    back = (positives @ queries.T / 0.1).exp()
    forwards = [
        -torch.log(exp[i, i] / (exp[i, i] + sum(exp[i, j] for j in range(10) if not related[i, j]))) for i in range(4)
    ]
    backwards = [
        -torch.log(back[i, i] / (back[i, i] + sum(back[i, j] for j in range(4) if labels[i] != labels[j])))
        for i in range(4)
    ]
    torch.testing.assert_close(ours, torch.stack(forwards).mean() + torch.stack(backwards).mean())
    assert not torch.isclose(ours, pair_loss(queries, passages, temperature=0.1))


def test_the_guard_leaves_out_what_lies_well_nearer_than_the_answer() -> None:
    query = torch.tensor([[1.0, 0.0]])
    passages = torch.nn.functional.normalize(torch.tensor([[0.6, 0.8], [0.98, 0.2], [0.0, 1.0]]), dim=-1)
    expected = info_nce(query, passages[[0, 2]], temperature=0.1)
    assert torch.equal(info_nce(query, passages, temperature=0.1, guard=0.1), expected)
    assert info_nce(query, passages, temperature=0.1, guard=0.5) == info_nce(query, passages, temperature=0.1)


def test_combined_teachers_keep_the_mean_of_their_cosines_and_order_components() -> None:
    first, second = unit(40, 8).numpy(), unit(40, 6, seed=1).numpy()
    targets = combine([first, second], width=14)
    centred = [t - t.mean(0) for t in (first, second)]
    cosines = [c @ c.T / np.outer(*(np.linalg.norm(c, axis=1),) * 2) for c in centred]
    np.testing.assert_allclose(targets @ targets.T, np.mean(cosines, axis=0), atol=1e-5)
    variances = targets.var(axis=0)
    assert variances[:4].sum() > variances[-4:].sum()


def test_a_small_language_keeps_a_share_of_the_vocabulary_sample() -> None:
    texts = {"en": ["e" * 100] * 1000, "sw": ["s" * 100] * 10}
    sample = "".join(balanced_sample(texts, budget_chars=20_000))
    assert 0.05 < sample.count("s") / len(sample) < 0.2
    assert abs(len(sample) - 20_000) < 1_000


def test_the_report_counts_tokens_of_words() -> None:
    tokenizer = train_unigram([row["text"] for row in corpus()] * 2, vocab_size=900)
    whole, strange = fertility(tokenizer, {"en": ["the the the"], "xx": ["the \u16a0\u16a1"]})
    assert (whole.lang, whole.words, whole.tokens_per_word, whole.characters_per_token) == ("en", 3, 1.0, 3.0)
    assert whole.byte_tokens == 0.0
    assert strange.byte_tokens == pytest.approx(6 / 7)  # two runes of three bytes each beside one whole word
    with pytest.raises(InputError, match="texts of 'zz' must hold words"):
        fertility(tokenizer, {"zz": ["..."]})


def test_too_little_text_for_a_vocabulary_is_an_error() -> None:
    with pytest.raises(InputError, match="vocab_size 2000 needs more text"):
        train_unigram(["just a few words"] * 3, vocab_size=2000)
    rng = random.Random(0)
    texts = ["".join(rng.choices([chr(0x4E00 + i) for i in range(100)], k=40)) for _ in range(100)]
    with pytest.raises(InputError, match="must be at least 362 for the 100 characters of the texts, got 361; raise it"):
        train_unigram(texts, vocab_size=361)
    assert train_unigram(texts, vocab_size=362).get_vocab_size() == 362


class Given(torch.nn.Module):
    """A sentence-transformers model that returns the vectors it is given."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return 16


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_losses_equal_those_of_sentence_transformers(temperature: float) -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    queries, passages, negatives = unit(7, 16), unit(7, 16, seed=1), unit(7, 16, seed=2)
    sides = [{"sentence_embedding": side} for side in (queries, passages, negatives)]
    theirs = losses.MultipleNegativesRankingLoss(Given(), scale=1 / temperature)(sides, torch.tensor([]))
    ours = info_nce(queries, torch.cat((passages, negatives)), temperature=temperature)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    grades = torch.tensor([0.0, 0.2, 0.2, 0.5, 0.6, 0.9, 1.0])
    theirs = losses.CoSENTLoss(Given(), scale=1 / temperature)(sides[:2], grades)
    ours = cosent((queries * passages).sum(dim=-1), grades, temperature=temperature)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_further_terms_equal_those_of_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.losses")
    given = Given()  # one model: MatryoshkaLoss cuts what it returns
    queries, passages = unit(7, 16), unit(7, 16, seed=1)
    sides = [{"sentence_embedding": side} for side in (queries, passages)]
    negatives, nothing = {"sentence_embedding": unit(7, 16, seed=2)}, torch.tensor([])

    def ranking(**options: Any) -> Any:
        return losses.MultipleNegativesRankingLoss(given, scale=20.0, **options)

    hard = ranking(hardness_mode="all_negatives", hardness_strength=5.0)([*sides, negatives], nothing)
    every = torch.cat((passages, negatives["sentence_embedding"]))
    torch.testing.assert_close(info_nce(queries, every, temperature=0.05, hardness=5.0), hard, atol=1e-6, rtol=1e-6)
    both = ranking(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    torch.testing.assert_close(pair_loss(queries, passages, temperature=0.05), 2 * both(sides, nothing))
    widths = losses.MatryoshkaLoss(given, both, [16, 8], matryoshka_weights=[0.5, 0.5])(sides, nothing)
    torch.testing.assert_close(matryoshka(pair_loss, queries, passages, dims=(8, 16), temperature=0.05), 2 * widths)
    terms = losses.GlobalOrthogonalRegularizationLoss(given, mean_weight=1.0, aggregation="sum")(sides)
    torch.testing.assert_close(
        sum(orthogonal_regularisation(side) for side in (queries, passages)), sum(terms.values())
    )


def test_orthogonal_regularisation_wants_random_directions() -> None:
    assert float(orthogonal_regularisation(torch.eye(16))) == 0.0
    assert float(orthogonal_regularisation(torch.eye(1))) == 0.0  # a text alone
    assert float(orthogonal_regularisation(torch.ones(5, 4) / 2)) == pytest.approx(1 + 1 - 1 / 4)
    assert float(orthogonal_regularisation(unit(400, 64))) < 1e-3


def test_hardness_weighs_the_nearest_negatives_most() -> None:
    queries, passages = unit(5, 8), unit(9, 8, seed=1)
    cosines = queries @ passages.T
    by_hand = torch.stack([
        torch.logsumexp(
            torch.stack([c / 0.1 + (3.0 * c if j != i else 0.0) for j, c in enumerate(row)]), dim=0
        ) - row[i] / 0.1
        for i, row in enumerate(cosines)
    ]).mean()  # fmt: skip
    torch.testing.assert_close(info_nce(queries, passages, temperature=0.1, hardness=3.0), by_hand)


def test_texts_of_one_teacher_get_the_targets_that_its_vectors_foretell() -> None:
    known, others = unit(400, 8, seed=1).numpy(), unit(50, 8, seed=2).numpy()
    turn = unit(8, 16, seed=3).numpy()

    def opinion(vectors: np.ndarray) -> np.ndarray:
        joint = (vectors - known.mean(axis=0)) @ turn
        return joint / np.linalg.norm(joint, axis=1, keepdims=True)

    found = extend(opinion(known), known, others)
    assert (found * opinion(others)).sum(axis=1).min() > 0.98
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_packed_batch_joins_prompts_and_neighbouring_texts(tmp_path: Path) -> None:
    ids, starts = np.array([11, 12, 13, 21, 31, 32, 91, 92], np.int32), np.array([0, 3, 4, 6, 8])
    TokenizedTexts(ids, starts, bos_token_id=0, eos_token_id=2).save(tmp_path / "texts.npz")
    texts = TokenizedTexts.load(tmp_path / "texts.npz")
    packed_ids, cu_seqlens = texts.pack(np.array([[1, 3], [0, 1], [2, 3]]), np.array([3, -1, 3]))
    rows = [packed_ids[a:b].tolist() for a, b in itertools.pairwise(cu_seqlens.tolist())]
    assert rows == [[0, 91, 92, 21, 31, 32, 2], [0, 11, 12, 13, 2], [0, 91, 92, 31, 32, 2]]
    assert texts.pack(np.array([[1, 2]]))[0].tolist() == [0, 21, 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_tokenised_texts_are_those_of_the_tokenizer(tokenizer: Tokenizer, processes: int) -> None:
    texts = [row["text"] for row in corpus()]
    kept = TokenizedTexts.from_texts(texts, tokenizer, max_tokens=16, processes=processes)
    spans = np.stack((np.arange(len(texts)), np.arange(len(texts)) + 1), axis=1)
    ids, cu_seqlens = kept.pack(spans)
    for text, start, end in zip(texts, cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        assert ids[start:end].tolist() == tokenizer.encode(text, max_tokens=16).input_ids.tolist()


def test_the_average_is_of_the_weights_after_every_step(tmp_path: Path) -> None:
    schedule = Schedule(steps=4, learning_rate=0.1, warmup_steps=1)

    def run(folder: str, stops: Sequence[int] = (), *, average: float = 0.0) -> torch.Tensor:
        """Train to the end, or to the last of ``stops``, with a new process's weights after each of them."""
        checkpoint = Checkpoint(tmp_path / folder / "c.safetensors", every=1, run={})
        for stop in stops or (4,):
            weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))

            def shares(step: int, weight: torch.nn.Parameter = weight, stop: int = stop) -> list[torch.Tensor]:
                if step == stop:
                    raise KeyboardInterrupt
                return [((weight - step) ** 2).sum()]

            with suppress(KeyboardInterrupt):
                train([([weight], 1.0)], shares, schedule, log_path=tmp_path / f"{folder}.jsonl",
                      checkpoint=checkpoint, average=average)  # fmt: skip
        return weight.detach()

    mean = run("after 1", [1])
    for i in (1, 2, 3):
        mean = mean + (run(f"after {i + 1}", [i + 1]) - mean) * (1 - min(0.6, i / (i + 1)))
    straight = run("straight", average=0.6)
    torch.testing.assert_close(straight, mean)
    assert torch.equal(run("stopped", [2, 4], average=0.6), straight)
