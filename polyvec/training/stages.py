"""The stages of arXiv 2409.10173, each from a ``Run``: what it reads, which parameters learn, the loss of a step.

Texts and batches of every stage are a function of the seed and the step's number alone, so that a stopped run goes on
exactly where it was, on any number of processes.
"""

from __future__ import annotations

import math
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyvec.atomic import check_new_folder
from polyvec.data.masking import IGNORED, mask_words, word_starts
from polyvec.data.sampling import GroupedSampler
from polyvec.errors import InputError
from polyvec.inference.batching import plan_batches
from polyvec.model.config import ModelConfig, mini, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.text.tokenizer import Tokenizer
from polyvec.training import distributed
from polyvec.training.adapters import TextEncoder, freeze_base, switch_dropout_off
from polyvec.training.checkpoint import Checkpoint
from polyvec.training.examples import Dataset, read_dataset
from polyvec.training.gradcache import cached_shares
from polyvec.training.loop import Schedule, train
from polyvec.training.mlm import MaskedLanguageModel
from polyvec.training.objectives import objective
from polyvec.training.own_adapter import ADAPTERS, add_tasks, new_tasks
from polyvec.training.progress import draw_losses, write_tensorboard
from polyvec.training.run import Run
from polyvec.training.utilisation import Work, head_flops, measured_peak

_SHAPES: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "mini": mini, "jina-v3": ModelConfig}
_OF_BASE = ("distillation", "pairs")  # stages with the loss of vectors that train the base
Shares = Callable[[int], Iterator[Tensor]]
Group = tuple[Sequence[nn.Parameter], float]


def run_stage(
    run: Run,
    *,
    report: Callable[[dict[str, float]], None] | None = None,
    notice: Callable[[str], None] = lambda sentence: None,
) -> list[float]:
    """Train as ``run`` says, write the model to ``run.output`` and return the loss of every step.

    The same run again goes on from its checkpoint. ``notice`` is told what of the data is left out. Raises
    ``InputError`` before any step for data that does not fit, and for an output that holds something else.
    """
    with distributed.processes() as device:
        torch.manual_seed(run.seed)
        output = Path(run.output)
        checkpoint = Checkpoint(output / "checkpoint.safetensors", every=run.save_every, run=asdict(run))
        if not checkpoint.path.exists():
            check_new_folder(output)
        datasets = [read_dataset(source, run.stage) for source in run.data]
        for dataset in datasets:
            if dataset.left_out:
                total = len(dataset) + dataset.left_out
                notice(
                    f"{dataset.source}: left out {dataset.left_out} of {total} pairs that share nearly all their words"
                )
        encoder, tokenizer, companions = _open(run)
        if not run.dropout:
            switch_dropout_off(encoder)
        encoder.gradient_checkpointing = run.gradient_checkpointing
        encoder.train().to(device)
        groups, shares, work = _prepare(run, encoder, tokenizer, datasets)
        output.mkdir(parents=True, exist_ok=True)
        losses = train(
            groups,
            shares,
            Schedule(steps=run.steps, learning_rate=run.learning_rate, warmup_steps=run.warmup_steps),
            log_path=output / "training.jsonl",
            log_every=min(20, run.steps),
            checkpoint=checkpoint,
            average=run.average,
            work=work,
            peak=measured_peak(device, bf16=run.bf16),
            report=report,
        )
        state = {name: distributed.whole(tensor).cpu() for name, tensor in encoder.state_dict().items()}
        if distributed.is_first():
            draw_losses(output / "training.jsonl", output / "training.svg")
            write_tensorboard(output / "training.jsonl", output / "tensorboard")
            trained = Encoder(encoder.config)
            trained.load_state_dict(state)
            save_encoder(trained.eval(), output)
            if companions.is_dir():
                copy_companions(companions, output)
            else:
                shutil.copyfile(companions, output / "tokenizer.json")
    return losses


def _open(run: Run) -> tuple[Encoder, Tokenizer, Path]:
    """Return the model that the run starts from, its tokenizer, and the folder or file that the tokenizer is from."""
    if run.architecture:
        encoder, companions = Encoder(_SHAPES[run.architecture]()), Path(run.tokenizer)
        path = companions
    else:
        companions = resolve_model_folder(None if run.model == "polyvec-mini" else run.model)
        encoder, path = load_encoder(companions), companions / "tokenizer.json"
    if run.adapter:
        encoder = add_tasks(encoder, new_tasks(run.adapter, run.stage))
    config = encoder.config
    if run.max_tokens > config.max_tokens:
        raise InputError(f"max_tokens must be at most the model's {config.max_tokens}, got {run.max_tokens}")
    return encoder, Tokenizer.from_file(path, **config.tokenizer_ids), companions


def _learning(run: Run) -> tuple[str | None, ...]:
    """Return the names of the adapters that learn, of queries and of passages; None is the base."""
    if run.stage in _OF_BASE:
        return (None,)
    return tuple(new_tasks(run.adapter, run.stage)) if run.adapter else ADAPTERS[run.stage]


def _prepare(
    run: Run, encoder: Encoder, tokenizer: Tokenizer, datasets: Sequence[Dataset]
) -> tuple[list[Group], Shares, Work]:
    """Return what learns, the shares of a step's loss, and the count of what they did."""
    if run.stage == "mlm":
        windows = MaskedWindows(run, tokenizer, datasets, mask_token_id=encoder.config.vocab_size - 1)
        model = MaskedLanguageModel(encoder).to(encoder.embeddings.word_embeddings.weight.device)
        if run.sharded:
            distributed.shard(model, encoder.layers)
        groups: list[Group] = [(_base_parameters(encoder), 1.0), (model.head_parameters, 1.0)]
        return groups, lambda step: windows.shares(step, model), windows.work
    of_base = run.stage in _OF_BASE
    if of_base:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(".lora_" not in name)
    else:
        freeze_base(encoder)
    if run.sharded:
        distributed.shard(encoder, encoder.layers)
    learning = _base_parameters(encoder) if of_base else [p for p in encoder.parameters() if p.requires_grad]
    device = encoder.embeddings.word_embeddings.weight.device
    heads = [_projection(encoder.config.hidden_size, datasets[0], device)] if run.projection else []
    loss = objective(run, datasets, _learning(run), encoder.config.matryoshka_dims, *heads)
    texts = TextEncoder(encoder, tokenizer, max_tokens=run.max_tokens, part_tokens=run.part_tokens, bf16=run.bf16)

    def shares(step: int) -> Iterator[Tensor]:
        return cached_shares(lambda encode: loss(encode, step), texts.parts, texts.embed, heads)

    return [(learning, 1.0), (heads, 1.0)], shares, texts.work


def _projection(width: int, dataset: Dataset, device: torch.device) -> nn.Parameter:
    """Return a random (D, T) matrix from the student's width to that of the teacher's vectors in ``dataset``."""
    shape = (width, dataset.embeddings([0]).shape[1])
    return nn.Parameter(torch.randn(shape, device=device) * width**-0.5)


def _base_parameters(encoder: Encoder) -> list[nn.Parameter]:
    return [p for n, p in encoder.named_parameters() if ".lora_" not in n and not n.startswith("pooler.")]


class MaskedWindows:
    """Running text as windows of up to ``max_tokens``, one language a batch, words hidden anew at every step."""

    def __init__(self, run: Run, tokenizer: Tokenizer, datasets: Sequence[Dataset], *, mask_token_id: int) -> None:
        self.run, self.tokenizer, self.datasets = run, tokenizer, datasets
        self.mask_token_id, self.work = mask_token_id, Work()
        self._first = np.cumsum([0, *map(len, datasets)])  # number of the first text of each dataset
        texts, parts, langs = array("q"), array("i"), []
        walked = (row for dataset in datasets for row in dataset.walk("text", "lang"))
        for number, (text, lang) in enumerate(walked):
            count = _num_windows(len(tokenizer.encode(text)), run.max_tokens)
            texts.extend([number] * count)
            parts.extend(range(count))
            langs += [lang] * count
        self._texts, self._parts = texts, parts  # of each window, its text and which of that text's windows it is
        self.sampler = GroupedSampler(langs, smoothing=run.smoothing, seed=run.seed)

    def _window(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        text = self._texts[number]
        place = int(np.searchsorted(self._first, text, side="right")) - 1
        (row,) = self.datasets[place].take([text - int(self._first[place])])
        return _windows(row["text"], self.tokenizer, self.run.max_tokens)[self._parts[number]]

    def shares(self, step: int, model: MaskedLanguageModel) -> Iterator[Tensor]:
        """Yield shares of the mean cross-entropy of the step's hidden tokens."""
        rng = np.random.default_rng((self.run.seed, step, 1))
        rate = self.run.mask_rate
        rows = [
            mask_words(*self._window(number), rng, rate=rate, mask_token_id=self.mask_token_id)
            for number in self.sampler.draw(step, self.run.batch_size)
        ]
        hidden = sum(int((labels != IGNORED).sum()) for _, labels in rows)
        plans = plan_batches([len(ids) for ids, _ in rows], batch_tokens=self.run.part_tokens)
        mine, own = distributed.my_share(len(plans)), distributed.num_own(len(plans))
        config, device = model.encoder.config, model.bias.device
        for turn, i in enumerate(mine if self.run.sharded else mine[:own]):
            ids, labels = (np.concatenate([rows[j][side] for j in plans[i]]).astype(np.int64) for side in (0, 1))
            cu_seqlens = torch.tensor([0, *(len(rows[j][0]) for j in plans[i])]).cumsum(0).int()
            if turn < own:  # else it runs for the others' sake
                self.work.add(config, cu_seqlens.diff().tolist(), trains_base=True)
                self.work.flops += 3 * head_flops(config, int((labels != IGNORED).sum()))
            arrays = (torch.from_numpy(ids), cu_seqlens, torch.from_numpy(labels))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.run.bf16):
                total = model(*(array.to(device) for array in arrays))
            yield total * (float(turn < own) / hidden)


def _num_windows(num_tokens: int, max_tokens: int) -> int:
    """Return how many windows a text of ``num_tokens``, ``<s>`` and ``</s>`` among them, makes."""
    return math.ceil((num_tokens - 2) / (max_tokens - 2))


def _windows(text: str, tokenizer: Tokenizer, max_tokens: int) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Return (n,) ids from ``<s>`` to ``</s>`` and (n,) word starts of each window, all of like length."""
    encoding = tokenizer.encode(text)
    starts = word_starts(text, encoding)
    inner = np.arange(1, len(encoding) - 1)
    first, last = encoding.input_ids[:1], encoding.input_ids[-1:]
    one = np.ones(1, dtype=np.bool_)
    return [
        (
            np.concatenate((first, encoding.input_ids[part], last)),
            np.concatenate((one, one, starts[part][1:], one)),
        )
        for part in np.array_split(inner, _num_windows(len(encoding), max_tokens))
    ]
