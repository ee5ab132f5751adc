"""Words are hidden whole, in any script, and the first stage learns to fill them in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvec.data.masking import IGNORED, mask_words, word_starts
from polyvec.errors import InputError
from polyvec.model.config import tiny
from polyvec.model.encoder import Encoder
from polyvec.samples import corpus
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.loop import Schedule, train
from polyvec.training.mlm import MaskedLanguageModel

MASK = 511


def words_of(tokenizer: Tokenizer, text: str) -> list[str]:
    encoding = tokenizer.encode(text)
    starts, offsets = np.flatnonzero(word_starts(text, encoding)), encoding.offsets
    return [text[offsets[i, 0] : offsets[j - 1, 1]] for i, j in zip(starts[1:-1], starts[2:], strict=True)]


def test_words_are_runs_between_spaces_and_punctuation(tokenizer: Tokenizer) -> None:
    assert words_of(tokenizer, "The router, naïve Straße.") == ["The", "router", ",", "naïve", "Straße", "."]
    assert words_of(tokenizer, "шкаф ελληνικά") == ["шкаф", "ελληνικά"]


def test_scripts_without_spaces_are_masked_piece_by_piece(tokenizer: Tokenizer) -> None:
    text = "打印机在那里ภาษาไทย"
    words = words_of(tokenizer, text)
    assert len(words) > 5 and max(map(len, words)) < len(text) / 2


def test_bytes_of_one_character_are_one_word(tokenizer: Tokenizer) -> None:
    assert word_starts("𓀀", tokenizer.encode("𓀀")).tolist() == [True, True, False, False, False, True]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=40), seed=st.integers(0, 10_000))
def test_words_are_hidden_whole_and_labels_bring_them_back(lengths: list[int], seed: int) -> None:
    ids = np.concatenate(([0], np.arange(4, 4 + sum(lengths)), [2])).astype(np.int32)
    starts = np.zeros(len(ids), dtype=np.bool_)
    starts[np.cumsum([1, *lengths])], starts[0] = True, True
    hidden, labels = mask_words(ids, starts, np.random.default_rng(seed), rate=0.3, mask_token_id=MASK)
    drawn = labels != IGNORED
    assert drawn.any() and not drawn[0] and not drawn[-1]
    np.testing.assert_array_equal(np.where(drawn, labels, hidden), ids)
    for word in np.split(drawn[1:-1], np.cumsum(lengths)[:-1]):
        assert word.all() or not word.any()
    assert drawn.sum() <= max(1, round(0.3 * sum(lengths))) + max(lengths) - 1


def test_the_drawn_words_are_masked_replaced_or_kept_eight_to_one_to_one() -> None:
    ids = np.concatenate(([0], np.full(40_000, 7), [2])).astype(np.int32)
    starts = np.ones(len(ids), dtype=np.bool_)
    hidden, labels = mask_words(ids, starts, np.random.default_rng(0), rate=0.5, mask_token_id=MASK)
    drawn = hidden[labels != IGNORED]
    assert len(drawn) == 20_000
    assert np.mean(drawn == MASK) == pytest.approx(0.8, abs=0.02)
    assert np.mean(drawn == 7) == pytest.approx(0.1, abs=0.02)
    assert drawn.min() >= 4
    with pytest.raises(InputError, match="rate must lie between 0 and 1, got 0"):
        mask_words(ids, starts, np.random.default_rng(0), rate=0, mask_token_id=MASK)


def test_masked_language_modelling_learns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Encoder(tiny(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    model = MaskedLanguageModel(encoder)
    texts = [row["text"] for row in corpus() if row["lang"] in ("en", "de", "fr", "es")]
    rows = [(e.input_ids, word_starts(t, e)) for t, e in ((t, tokenizer.encode(t)) for t in texts)]

    def shares(step: int) -> list[torch.Tensor]:
        rng = np.random.default_rng(step)
        masked = [mask_words(ids, starts, rng, rate=0.3, mask_token_id=MASK) for ids, starts in rows]
        ids, labels = (torch.from_numpy(np.concatenate(part)).long() for part in zip(*masked, strict=True))
        cu_seqlens = torch.tensor([0, *(len(r) for r, _ in masked)]).cumsum(0).int()
        hidden = (labels != IGNORED).nonzero().squeeze(1)
        return [model(ids, cu_seqlens, hidden, labels[hidden]) / len(hidden)]

    parameters = [p for n, p in encoder.named_parameters() if "lora" not in n and p.requires_grad]
    schedule = Schedule(steps=20, learning_rate=5e-3, warmup_steps=2)
    groups = [(parameters, 1.0), (model.head_parameters, 1.0)]
    losses = train(groups, shares, schedule, log_path=tmp_path / "log.jsonl")
    assert losses[0] == pytest.approx(np.log(512), abs=0.3)  # it knows nothing yet
    assert np.mean(losses[-3:]) < losses[0] - 1
