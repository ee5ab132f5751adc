"""Running text as windows for masked language modelling: tokenised once, mapped from disk, hidden anew at every step.

Shape letters: n tokens of a window.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.data.masking import IGNORED, mask_words, word_starts
from polyvec.data.sampling import GroupedSampler
from polyvec.errors import InputError
from polyvec.files import Record
from polyvec.inference.batching import plan_batches
from polyvec.inputs import input_state
from polyvec.text.tokenizer import Tokenizer
from polyvec.training import distributed
from polyvec.training.examples import COLUMNS, Dataset, Rows, cached, datasets_library, left_out_of, read_examples
from polyvec.training.loop import training_kernels
from polyvec.training.mlm import MaskedLanguageModel
from polyvec.training.run import Run
from polyvec.training.utilisation import Work, head_flops

KIND = "running text"


def read_windows(
    source: str,
    tokenizer_file: Path,
    tokenizer_ids: Mapping[str, int],
    max_tokens: int,
    records: list[Record] | None = None,
) -> Dataset:
    """Return the windows of the texts of a source, each of ``lang``, ``input_ids`` and ``word_starts`` (n,).

    ``records`` are its examples where they are in memory. Texts without a token are left out. Raises ``InputError``
    naming source, example and rule.
    """
    if records is not None:
        made = _window_rows(source, str(tokenizer_file), dict(tokenizer_ids), max_tokens, records=records)
        rows: Any = Rows.of(made, ("lang", "input_ids", "word_starts", "is_empty"))
    else:
        datasets = datasets_library()
        features = {
            "lang": datasets.Value("string"),
            "input_ids": datasets.List(datasets.Value("int32")),
            "word_starts": datasets.List(datasets.Value("bool")),
            "is_empty": datasets.Value("bool"),
        }
        rows = cached(
            _window_rows, features, source=source, state=input_state(source), tokenizer_file=str(tokenizer_file),
            tokenizer_hash=hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(), tokenizer_ids=dict(tokenizer_ids),
            max_tokens=max_tokens,
        )  # fmt: skip
    kept = np.flatnonzero(~rows.with_format("numpy", columns=["is_empty"])[:]["is_empty"])
    if not len(kept):
        raise InputError(f"{source} must hold texts of at least one token, got none")
    left_out = left_out_of(len(rows), len(kept), "windows", "of texts without a token")
    return Dataset(source, KIND, rows.select(kept) if left_out else rows, left_out)


def _window_rows(
    source: str,
    tokenizer_file: str,
    tokenizer_ids: dict[str, int],
    max_tokens: int,
    state: str = "",
    tokenizer_hash: str = "",
    records: list[Record] | None = None,
) -> Iterator[Record]:
    """Yield the windows of a source in its ``state``, or of its ``records``; a text without a token as an empty one."""
    tokenizer = Tokenizer.from_file(tokenizer_file, **tokenizer_ids)
    for row in read_examples(source, COLUMNS[KIND], "mlm", records):
        lang = {"lang": str(row.get("lang") or "")}
        is_empty = True
        for input_ids, starts in windows_of(row["text"], tokenizer, max_tokens):
            is_empty = False
            yield {**lang, "input_ids": input_ids, "word_starts": starts, "is_empty": False}
        if is_empty:
            yield {**lang, "input_ids": [], "word_starts": [], "is_empty": True}


def windows_of(
    text: str, tokenizer: Tokenizer, max_tokens: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Yield (n,) ids from ``<s>`` to ``</s>`` and (n,) word starts, of like length, until the text is used up."""
    encoding = tokenizer.encode(text)
    starts = word_starts(text, encoding)
    inner = len(encoding) - 2
    if inner < 1:
        return
    first, last = encoding.input_ids[:1], encoding.input_ids[-1:]
    one = np.ones(1, dtype=np.bool_)
    for part in np.array_split(np.arange(1, inner + 1), math.ceil(inner / (max_tokens - 2))):
        yield (
            np.concatenate((first, encoding.input_ids[part], last)),
            np.concatenate((one, one, starts[part][1:], one)),
        )


class MaskedWindows:
    """Batches of windows, each of one language of one source."""

    def __init__(self, run: Run, sources: Sequence[Dataset], *, mask_token_id: int) -> None:
        self.run, self.sources, self.mask_token_id, self.work = run, sources, mask_token_id, Work()
        self._first = np.cumsum([0, *map(len, sources)])  # number of the first window of each source
        langs = (lang for source in sources for (lang,) in source.walk("lang"))
        self.sampler = GroupedSampler(langs, smoothing=run.smoothing, seed=run.seed)
        self._ahead: dict[int, list[tuple[NDArray[np.int32], NDArray[np.int64]]]] = {}  # by step, the next at most

    def shares(self, step: int, model: MaskedLanguageModel) -> Iterator[Tensor]:
        """Yield shares of the mean cross-entropy of the step's hidden tokens."""
        rows = self._ahead.pop(step, None) or self._masked(step)
        hidden = sum(int((labels != IGNORED).sum()) for _, labels in rows)
        plans = plan_batches([len(ids) for ids, _ in rows], batch_tokens=self.run.part_tokens)
        mine, own = distributed.my_share(len(plans)), distributed.num_own(len(plans))
        config, device = model.encoder.config, model.bias.device
        for turn, i in enumerate(mine if self.run.sharded else mine[:own]):
            ids, labels = (np.concatenate([rows[j][side] for j in plans[i]]).astype(np.int64) for side in (0, 1))
            lengths = [len(rows[j][0]) for j in plans[i]]
            places = np.flatnonzero(labels != IGNORED)
            if turn < own:  # else it runs for the others' sake
                self.work.add(config, lengths, trains_base=True)
                self.work.flops += 3 * head_flops(config, len(places))
            cu_seqlens = np.cumsum([0, *lengths], dtype=np.int32)
            arrays = (torch.from_numpy(array).to(device) for array in (ids, cu_seqlens, places, labels[places]))
            distributed.seed_part(self.run.seed, step, i)
            with training_kernels(device, bf16=self.run.bf16, longest=max(lengths)):
                total = model(*arrays, max_seqlen=max(lengths))
            yield total * (float(turn < own) / hidden)
        if step + 1 < self.run.steps:  # a GPU is still at work on this step
            self._ahead[step + 1] = self._masked(step + 1)

    def _masked(self, step: int) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """Return (n,) ids and (n,) labels of each window of a step."""
        rng = np.random.default_rng((self.run.seed, step, 1))
        return [
            mask_words(
                np.array(row["input_ids"], np.int32), np.array(row["word_starts"]), rng, rate=self.run.mask_rate,
                mask_token_id=self.mask_token_id,
            )
            for row in self._draw(step)
        ]  # fmt: skip

    def _draw(self, step: int) -> list[dict[str, Any]]:
        numbers = np.array(self.sampler.draw(step, self.run.batch_size))
        places = np.searchsorted(self._first, numbers, side="right") - 1
        found: dict[int, Record] = {}
        for place in np.unique(places):
            own = numbers[places == place]
            rows = self.sources[place].take((own - self._first[place]).tolist())
            found.update(zip(own.tolist(), rows, strict=True))
        return [found[number] for number in numbers.tolist()]
