"""Which pairs are worth a training step."""

from __future__ import annotations

_FEWEST_WORDS = 4
_OVERLAP = 0.8


def overlaps(first: str, second: str) -> bool:
    """Whether the shorter text is as good as part of the longer: such a pair teaches to compare letters.

    True when at least 80 % of the shorter text's words, of which there must be four, occur in the longer as substrings,
    in any case (arXiv 2409.10173, section 4.2). A text without spaces between words has too few words to be judged so.
    """
    shorter, longer = sorted((first.casefold(), second.casefold()), key=len)
    words = shorter.split()
    if len(words) < _FEWEST_WORDS:
        return False
    return sum(word in longer for word in words) >= _OVERLAP * len(words)
