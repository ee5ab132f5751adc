"""Train a Unigram vocabulary on many languages without letting the largest one, or rare characters, eat it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from polyvec.errors import InputError
from polyvec.inputs import read_input
from polyvec.training.examples import language_of, left_out_of

#: XLM-RoBERTa's order: the encoder's bos, pad and eos ids are the first three.
LEADING_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"  # the last id, as in XLM-RoBERTa
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def balanced_sample(
    texts: Mapping[str, Sequence[str]], *, budget_chars: int, smoothing: float = 0.5, seed: int = 0
) -> list[str]:
    """Draw about ``budget_chars`` characters, each language in proportion to its size to the power ``smoothing``.

    XLM-R samples languages with an exponent of 0.3-0.7 for the same reason (arXiv 1911.02116, section 3.1).
    """
    rng = random.Random(seed)
    sizes = {lang: sum(map(len, rows)) for lang, rows in texts.items()}
    shares = {lang: size**smoothing for lang, size in sizes.items() if size}
    scale = budget_chars / sum(shares.values())
    sample = []
    for lang, share in sorted(shares.items()):
        rows = list(texts[lang])
        rng.shuffle(rows)
        left = share * scale
        for row in rows:
            if left <= 0:
                break
            sample.append(row)
            left -= len(row)
    rng.shuffle(sample)
    return sample


def read_texts(sources: Sequence[str], notice: Callable[[str], None]) -> dict[str, list[str]]:
    """Return the texts of all ``sources`` by language, ``all`` where a row names none; ``notice`` is told how many are
    blank. Raises ``InputError`` naming source, row and rule."""
    texts: dict[str, list[str]] = {}
    for source in sources:
        total = kept = 0
        for where, row in read_input(source, column="text"):
            total += 1
            lang = language_of(row, where)
            if row["text"].strip():
                kept += 1
                texts.setdefault(lang or "all", []).append(row["text"])
        if left_out := left_out_of(total, kept, "texts", "that are blank"):
            notice(f"{source}: {left_out}")
    if not texts:
        raise InputError(f"{', '.join(sources)} must hold texts, got none")
    return texts


def train_unigram(
    texts: Iterable[str], *, vocab_size: int, coverage: float = 0.9995, max_piece_length: int = 16
) -> Tokenizer:
    """Return a Unigram tokenizer of exactly ``vocab_size`` ids that lower-cases and never answers ``<unk>``.

    Characters beyond ``coverage`` of the running text become spaces while training and UTF-8 bytes afterwards: a
    vocabulary of 40,000 cannot spend a third of its ids on ideographs seen once. Lower case because the teachers of
    polyvec-mini are uncased and a small table has no room for each word twice.
    """
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    rows = [normalizer.normalize_str(text) for text in texts]
    counts = Counter(c for row in rows for c in row if not c.isspace())
    total, covered, kept = sum(counts.values()), 0, set()
    for char, count in counts.most_common():
        if covered >= coverage * total:
            break
        kept.add(char)
        covered += count
    rows = ["".join(c if c in kept else " " for c in row) for row in rows]

    byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
    num_extra = len(byte_pieces) + 1
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    # No "▁" before words, unlike XLM-RoBERTa: an encoder never decodes, and a word then has one row wherever it stands
    # (tried: with "▁", half of the table held twins, and words outside it cost a token more). Digits, punctuation and
    # symbols are pieces of their own, so that the table is not filled with years and "word," beside "word".
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\p{N}|\p{P}|\p{S}"), "isolated")]
    )
    least = len(kept | set(LEADING_SPECIALS)) + num_extra + 1
    if vocab_size < least:  # the trainer leaves no character out
        raise InputError(
            f"vocab_size must be at least {least} for the {len(kept)} characters of the texts, got {vocab_size}; "
            "raise it"
        )
    tokenizer.train_from_iterator(
        rows,
        trainers.UnigramTrainer(
            vocab_size=vocab_size - num_extra,
            special_tokens=list(LEADING_SPECIALS),
            unk_token="<unk>",
            max_piece_length=max_piece_length,
            show_progress=False,
        ),
    )
    tokenizer = _with_bytes_and_mask(tokenizer, byte_pieces)
    if (size := tokenizer.get_vocab_size()) != vocab_size:
        raise InputError(f"vocab_size {vocab_size} needs more text to fill it, got enough for {size} pieces")
    return tokenizer


@dataclass(frozen=True)
class Fertility:
    """How finely a tokenizer cuts a language. Words stand between spaces, so they mean little in scripts that put none;
    there, look at the characters of a token."""

    lang: str
    words: int
    tokens_per_word: float
    characters_per_token: float
    byte_tokens: float  # part of the tokens that are single bytes or unknown


def fertility(tokenizer: Tokenizer, texts: Mapping[str, Sequence[str]]) -> list[Fertility]:
    """Return for each language of ``texts`` how many tokens its words take, languages in order."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, to count no padding and cut nothing
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = []
    for lang, own in sorted(texts.items()):
        words = num_words(own)
        tokens = [token for e in tokenizer.encode_batch(list(own), add_special_tokens=False) for token in e.tokens]
        if not words or not tokens:
            raise InputError(f"texts of {lang!r} must hold words, got none in {len(own)} texts")
        lost = sum(token == "<unk>" or _BYTE.fullmatch(token) is not None for token in tokens)
        characters = sum(len("".join(text.split())) for text in own)
        rows.append(Fertility(lang, words, len(tokens) / words, characters / len(tokens), lost / len(tokens)))
    return rows


def num_words(texts: Iterable[str]) -> int:
    """Return how many runs between spaces have a letter or digit."""
    return sum(any(map(str.isalnum, word)) for text in texts for word in text.split())


def _with_bytes_and_mask(tokenizer: Tokenizer, byte_pieces: Sequence[str]) -> Tokenizer:
    """Append the byte pieces and ``<mask>``: the trainer of `tokenizers` cannot make them itself."""
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    floor = min(score for _, score in vocab) - 10
    vocab += [[piece, floor] for piece in byte_pieces] + [[MASK, 0.0]]
    state["model"]["byte_fallback"] = True
    mask = {**state["added_tokens"][0], "id": len(vocab) - 1, "content": MASK}
    state["added_tokens"].append(mask)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer
