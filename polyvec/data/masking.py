"""Whole-word masking over any script (arXiv 1906.08101 for whole words, 1810.04805 for the 80/10/10 split).

Shape letters: n tokens of a text.
"""

from __future__ import annotations

import unicodedata

import numpy as np
from numpy.typing import NDArray

from polyvec.errors import InputError
from polyvec.text.tokenizer import Encoding

IGNORED = -100  # the label that torch's cross-entropy leaves out

# Scripts written without spaces: a run of them is a sentence, not a word, and a Unigram piece is the nearest to a word.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO")


def word_starts(text: str, encoding: Encoding) -> NDArray[np.bool_]:
    """Return (n,) whether each token opens a word of ``text``; ``<s>``, a prompt and ``</s>`` open one each.

    A token goes on with the word before it if nothing lies between them and both are letters, marks or digits of
    scripts that put spaces between words.
    """
    starts = np.ones(len(encoding), dtype=np.bool_)
    offsets = encoding.offsets
    for i in range(encoding.num_prefix_tokens + 1, len(encoding) - 1):
        start, end = offsets[i]
        if start == offsets[i - 1, 0]:  # bytes of one character
            starts[i] = False
        elif start == offsets[i - 1, 1] and start < end:
            starts[i] = not (_is_spaced(text[start - 1]) and _is_spaced(text[start]))
    return starts


def _is_spaced(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN" and not unicodedata.name(character, "").startswith(_UNSPACED)


def mask_words(
    input_ids: NDArray[np.int32],
    starts: NDArray[np.bool_],
    rng: np.random.Generator,
    *,
    rate: float,
    mask_token_id: int,
    num_leading_specials: int = 4,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return (n,) ids with whole words hidden, and (n,) labels: the hidden ids, elsewhere ``IGNORED``.

    Words are drawn until ``rate`` of the tokens between ``<s>`` and ``</s>`` is reached, one at least. Of the drawn
    words eight in ten become ``<mask>``, one random tokens, one stays: the model must not learn that only ``<mask>``
    wants an answer. Ids below ``num_leading_specials`` and the mask itself are never drawn at random.
    """
    if not 0 < rate < 1:
        raise InputError(f"rate must lie between 0 and 1, got {rate}")
    hidden = input_ids.copy()
    labels = np.full(len(input_ids), IGNORED, dtype=np.int64)
    words = np.split(np.arange(1, len(input_ids) - 1), np.flatnonzero(starts[2:-1]) + 1)
    wanted = max(1, round(rate * (len(input_ids) - 2)))
    for i in rng.permutation(len(words)):
        word = words[i]
        if wanted <= 0 or not len(word):
            break
        wanted -= len(word)
        labels[word] = input_ids[word]
        fate = rng.random()
        if fate < 0.8:
            hidden[word] = mask_token_id
        elif fate < 0.9:
            hidden[word] = rng.integers(num_leading_specials, mask_token_id, len(word))
    return hidden, labels
