"""Texts as token ids, tokenised once and kept end to end: what a training step reads.

Shape letters: B texts in a batch, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.text.tokenizer import Tokenizer


class TokenizedTexts:
    """Ids of many texts in one flat array; text i is ``ids[starts[i] : starts[i + 1]]``, from ``<s>`` to ``</s>``."""

    def __init__(self, ids: NDArray[np.int32], starts: NDArray[np.int64]) -> None:
        self.ids, self.starts = ids, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: Tokenizer, *, prompt: str = "", max_tokens: int, chunk: int = 20_000
    ) -> TokenizedTexts:
        """Tokenise with ``prompt`` before each text, cutting at ``max_tokens``: training data may be cut, and is."""
        rows = []
        for start in range(0, len(texts), chunk):
            part = list(texts[start : start + chunk])
            rows += [e.input_ids for e in tokenizer.encode_batch(part, [prompt] * len(part), max_tokens)]
        starts = np.concatenate(([0], np.cumsum([len(r) for r in rows])))
        return cls(np.concatenate(rows), starts)

    def pack(self, indices: Iterable[int], prompts: Sequence[NDArray[np.int32]] | None = None) -> tuple[Tensor, Tensor]:
        """Return (N,) ids and (B+1,) int32 offsets of the chosen texts: the encoder's packed batch.

        ``prompts`` are the ids, without ``<s>`` and ``</s>``, that stand before each text.
        """
        rows = [self.ids[self.starts[i] : self.starts[i + 1]] for i in indices]
        if prompts is not None:
            rows = [np.concatenate((row[:1], prompt, row[1:])) for row, prompt in zip(rows, prompts, strict=True)]
        cu_seqlens = np.concatenate(([0], np.cumsum([len(r) for r in rows]))).astype(np.int32)
        return torch.from_numpy(np.concatenate(rows).astype(np.int64)), torch.from_numpy(cu_seqlens)

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids, starts=self.starts)

    @classmethod
    def load(cls, path: Path) -> TokenizedTexts:
        with np.load(path) as arrays:
            return cls(arrays["ids"], arrays["starts"])
