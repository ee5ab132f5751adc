"""Texts as token ids, tokenised once and kept end to end, on the device that trains: what a training step reads.

Shape letters: B rows of a batch, N packed tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.text.tokenizer import Tokenizer

_BLOCK = 20_000  # texts that are tokenised at a time
_tokenizer: Tokenizer  # of a process that tokenises


class TokenizedTexts:
    """Ids of many texts in one flat tensor, without ``<s>`` and ``</s>``; text i is ``ids[starts[i] : starts[i + 1]]``.

    Texts that follow each other are, together, a longer text.
    """

    def __init__(
        self, ids: NDArray[np.int32], starts: NDArray[np.int64], *, bos_token_id: int, eos_token_id: int,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        self.ids = torch.from_numpy(ids).to(device)
        self.starts = starts
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: Tokenizer, *, max_tokens: int, processes: int = 1,
        device: str | torch.device = "cpu",
    ) -> TokenizedTexts:  # fmt: skip
        """Tokenise, cutting at ``max_tokens`` with ``<s>`` and ``</s>``: training data may be cut, and is.

        Of one process's time a third is spent in Python, which more ``processes`` share.
        """
        bos, *_, eos = tokenizer.encode("").input_ids.tolist()
        blocks = [list(texts[start : start + _BLOCK]) for start in range(0, len(texts), _BLOCK)]
        tokenise = partial(_tokenise, max_tokens=max_tokens)
        if processes > 1:
            start_with: dict[str, Any] = {"initializer": _share_alone, "initargs": (tokenizer,)}
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), **start_with) as pool:
                rows = list(pool.map(tokenise, blocks))
        else:
            _share(tokenizer)
            rows = list(map(tokenise, blocks))
        lengths = np.concatenate([sizes for _, sizes in rows])
        ids = np.concatenate([part for part, _ in rows])
        return cls(
            ids, np.concatenate(([0], np.cumsum(lengths))), bos_token_id=bos, eos_token_id=eos, device=device
        )  # fmt: skip

    def pack(self, spans: NDArray[np.int64], prompts: NDArray[np.int64] | None = None) -> tuple[Tensor, Tensor]:
        """Return (N,) ids and (B+1,) int32 offsets, from ``<s>`` to ``</s>``: the encoder's packed batch.

        ``spans`` (B, 2) are the first and past-the-last text of each row. ``prompts`` (B,) are the numbers of the texts
        that stand before them, -1 for none. Assembled on the device: at millions of tokens a second a host that joins
        arrays would be what the device waits for.
        """
        before = np.zeros((2, len(spans)), np.int64)  # where each prompt begins, and its tokens
        if prompts is not None:
            has = prompts >= 0
            before[:, has] = self.starts[prompts[has]], self.lengths[prompts[has]]
        first = self.starts[spans[:, 0]]
        lengths = before[1] + self.starts[spans[:, 1]] - first + 2
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        table = np.stack((offsets[:-1], lengths, *before, first))
        begins, sizes, prompt, prompt_size, body = (
            torch.from_numpy(table)
            .to(self.ids.device)
            .repeat_interleave(torch.from_numpy(lengths).to(self.ids.device), dim=1, output_size=int(offsets[-1]))
        )
        place = torch.arange(int(offsets[-1]), device=self.ids.device) - begins - 1  # 0 is the first after <s>
        source = torch.where(place < prompt_size, prompt + place, body + place - prompt_size)
        ids = self.ids[source.clamp(0, len(self.ids) - 1)].long()
        ids = ids.masked_fill(place == -1, self.bos_token_id).masked_fill(place == sizes - 2, self.eos_token_id)
        return ids, torch.from_numpy(offsets.astype(np.int32)).to(self.ids.device)

    def save(self, path: Path) -> None:
        np.savez(path, ids=self.ids.cpu().numpy(), starts=self.starts, ends=[self.bos_token_id, self.eos_token_id])

    @classmethod
    def load(cls, path: Path, *, device: str | torch.device = "cpu") -> TokenizedTexts:
        with np.load(path) as arrays:
            bos, eos = arrays["ends"].tolist()
            return cls(arrays["ids"], arrays["starts"], bos_token_id=bos, eos_token_id=eos, device=device)


def _share(tokenizer: Tokenizer) -> None:
    """Keep the tokenizer in this process: it would be sent with every block."""
    global _tokenizer
    _tokenizer = tokenizer


def _share_alone(tokenizer: Tokenizer) -> None:
    """The same in one of many processes, each with a thread: every one would start as many as there are cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _share(tokenizer)


def _tokenise(texts: list[str], max_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the ids of all texts, end to end and without their ends, and how many each has."""
    rows = [e.input_ids[1:-1] for e in _tokenizer.tokens_batch(texts, [""] * len(texts), max_tokens)]
    return np.concatenate(rows), np.array([len(row) for row in rows])
