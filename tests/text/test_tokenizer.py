"""Text is only text, every token knows its characters, and a cut prefix equals the cut whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvec.errors import InputError, WeightsError
from polyvec.text.tokenizer import Encoding, Tokenizer

TEXTS = st.text(
    alphabet=st.one_of(st.characters(), st.sampled_from("ab the ß中国。<s> é\u0301\u200d\n0x4")), max_size=60
)
SETTINGS = settings(max_examples=150, deadline=None)


@pytest.mark.parametrize("literal", ["<s>", "</s>", "<pad>", "<mask>", "<unk>", "<0x41>", "a<s>b", "<s><mask>"])
def test_a_literal_special_token_stays_text(tokenizer: Tokenizer, literal: str) -> None:
    encoding = tokenizer.encode(literal)
    inner = encoding.input_ids[1:-1]
    assert not set(inner.tolist()) & {0, 1, 2, 3, tokenizer.vocab_size - 1}
    assert inner.tolist() != tokenizer.encode("A").input_ids[1:-1].tolist()
    covered = "".join(literal[a:b] for a, b in encoding.offsets[1:-1])
    assert covered == literal


@SETTINGS
@given(text=TEXTS)
def test_offsets_lie_in_order_inside_the_text(tokenizer: Tokenizer, text: str) -> None:
    encoding = tokenizer.encode(text, prompt="Represent: ")
    offsets = encoding.offsets[encoding.num_prefix_tokens : -1]
    assert (offsets[:, 0] <= offsets[:, 1]).all() and (np.diff(offsets[:, 0]) >= 0).all()
    assert len(offsets) == 0 or (offsets.min() >= 0 and offsets.max() <= len(text))
    assert encoding.cut_characters == 0


@SETTINGS
@given(text=TEXTS, repeats=st.integers(1, 60), keep=st.integers(2, 40))
def test_a_cut_text_has_the_first_tokens_of_the_whole(tokenizer: Tokenizer, text: str, repeats: int, keep: int) -> None:
    text = text * repeats
    whole, cut = tokenizer.encode(text), tokenizer.encode(text, max_tokens=keep)
    assert cut.input_ids[:-1].tolist() == whole.input_ids[: len(cut) - 1].tolist()
    assert cut.truncated == (len(whole) > keep)
    np.testing.assert_array_equal(cut.offsets[:-1], whole.offsets[: len(cut) - 1])


def test_a_giant_text_is_read_by_its_prefix_alone(tokenizer: Tokenizer) -> None:
    text = "the router " * 1_000_000
    read: list[int] = []
    inner = tokenizer._tokenise

    def spy(strings: list[str]) -> object:
        read.extend(map(len, strings))
        return inner(strings)

    tokenizer._tokenise = spy  # type: ignore[method-assign, assignment]
    try:
        encoding = tokenizer.encode(text, max_tokens=100)
    finally:
        del tokenizer._tokenise  # type: ignore[method-assign]
    assert max(read) < 5_000
    assert len(encoding) == 100 and encoding.cut_characters == len(text) - encoding.offsets[-2, 1]


@SETTINGS
@given(texts=st.lists(TEXTS, max_size=4), size=st.integers(1, 30))
def test_a_text_read_in_parts_has_the_tokens_of_the_whole(tokenizer: Tokenizer, texts: list[str], size: int) -> None:
    texts = [*texts, " ".join(texts) * 5]
    whole = tokenizer.encode_batch(texts, ["the "] * len(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyvec.text.tokenizer._PART_CHARACTERS", size)
        patch.setattr("polyvec.text.tokenizer._GROUP_CHARACTERS", 3 * size)
        parts = tokenizer.encode_batch(texts, ["the "] * len(texts))
    for one, other in zip(whole, parts, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.offsets.tolist() == other.offsets.tolist()


@SETTINGS
@given(texts=st.lists(TEXTS, max_size=4), max_tokens=st.one_of(st.none(), st.integers(8, 40)), size=st.integers(1, 30))
def test_tokens_without_places_are_those_with_them(
    tokenizer: Tokenizer, texts: list[str], max_tokens: int | None, size: int
) -> None:
    texts = [*texts, "the " * 30, "\ud800 alone"]
    prompts = ["the "] * len(texts)
    want = tokenizer.encode_batch(texts, prompts, max_tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyvec.text.tokenizer._PART_CHARACTERS", 10 * size)
        patch.setattr("polyvec.text.tokenizer._GROUP_CHARACTERS", 3 * size)
        found = tokenizer.tokens_batch(texts, prompts, max_tokens)
    assert [(t.input_ids.tolist(), t.cut_characters) for t in found] == [
        (e.input_ids.tolist(), e.cut_characters) for e in want
    ]
    assert all(type(t) is Encoding for t in found if t.truncated)


def test_a_giant_text_is_tokenised_in_parts(tokenizer: Tokenizer) -> None:
    text = "the router " * 100_000
    edges = tokenizer._boundaries.part_edges(text, 100_000)
    assert max(np.diff(edges)) <= 100_000
    assert (
        tokenizer.encode(text).input_ids[1:-1].tolist()
        == tokenizer.encode("the router").input_ids[1:-1].tolist() * 100_000
    )


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_empty_text_is_its_frame_alone(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text).input_ids.tolist() == [0, 2]


def test_nul_and_lone_surrogates_are_characters(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("a\x00b")) > len(tokenizer.encode("ab"))
    surrogate, replacement = tokenizer.encode("a\ud800b"), tokenizer.encode("a\ufffdb")
    assert surrogate.input_ids.tolist() == replacement.input_ids.tolist()


def test_byte_pieces_know_their_own_character(tokenizer: Tokenizer) -> None:
    text = "𓀀𓀁"
    offsets = tokenizer.encode(text).offsets[1:-1].tolist()
    assert offsets == [[0, 1]] * 4 + [[1, 2]] * 4


def test_a_prompt_counts_as_prefix_and_must_fit(tokenizer: Tokenizer) -> None:
    encoding = tokenizer.encode("router", prompt="the the ")
    assert encoding.num_prefix_tokens == 1 + len(tokenizer.encode("the the")) - 2
    assert encoding.offsets[encoding.num_prefix_tokens].tolist()[0] == 0
    with pytest.raises(InputError, match="leave room"):
        tokenizer.encode("router", prompt="the the the ", max_tokens=3)


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["list"]])
def test_what_is_no_string_is_an_error(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(InputError, match=r"texts\[0\] must be a str"):
        tokenizer.encode(text)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_an_error(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    state = json.loads((model_folder / "tokenizer.json").read_text())
    path.write_text(json.dumps(state))
    with pytest.raises(WeightsError, match="vocab_size of config.json, 40000, got 512"):
        Tokenizer.from_file(path, vocab_size=40_000, bos_token_id=0, eos_token_id=2)
    with pytest.raises(WeightsError, match="id 5 must be '</s>'"):
        Tokenizer.from_file(path, vocab_size=512, bos_token_id=0, eos_token_id=5)
    path.write_text("{")
    with pytest.raises(WeightsError, match="readable"):
        Tokenizer.from_file(path, vocab_size=512, bos_token_id=0, eos_token_id=2)


@pytest.mark.parametrize("run", ["\ufdfa", "a", "\U0001f600", "e\u0301"])
def test_of_a_run_without_end_a_prefix_is_read(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    """One character may become 18, of each of which `tokenizers` keeps a hundred bytes and more."""
    read: list[int] = []
    tokenise = Tokenizer._tokenise

    def counting(self: Tokenizer, strings: list[str]) -> Any:
        read.extend(map(len, strings))
        return tokenise(self, strings)

    monkeypatch.setattr(Tokenizer, "_tokenise", counting)
    encoding = tokenizer.encode(run * 200_000, max_tokens=512)
    assert max(read) <= 16_384
    short = tokenizer.encode(run * 2_000, max_tokens=512)
    np.testing.assert_array_equal(encoding.input_ids, short.input_ids)
    assert encoding.cut_characters - short.cut_characters == 198_000 * len(run)
