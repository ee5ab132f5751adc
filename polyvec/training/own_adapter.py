"""A task of the user's own beside the five: a new adapter over the frozen base, trained on a file of examples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from polyvec.atomic import check_new_folder
from polyvec.data.sampling import GroupedSampler, LabelSampler
from polyvec.errors import InputError
from polyvec.files import Record
from polyvec.model.encoder import Encoder
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.adapters import (
    TextEncoder,
    classification_step,
    freeze_base,
    retrieval_step,
    separation_step,
    switch_dropout_off,
    text_matching_step,
)
from polyvec.training.examples import COLUMNS, read_examples
from polyvec.training.gradcache import Encode
from polyvec.training.loop import Schedule, train


@dataclass(frozen=True)
class Kind:
    """What a kind of adapter learns from: the columns of its file, and the adapters of the model that it starts from.

    ``suffixes`` name its tasks: a retrieval adapter ``legal`` is the pair ``legal.query`` and ``legal.passage``.
    """

    columns: tuple[str, ...]
    starts: tuple[str, ...]
    suffixes: tuple[str, ...] = ("",)


KINDS = {
    "retrieval": Kind(COLUMNS["retrieval"], ("retrieval.query", "retrieval.passage"), (".query", ".passage")),
    "matching": Kind(COLUMNS["text-matching"], ("text-matching",)),
    "classification": Kind(COLUMNS["classification"], ("classification",)),
    "separation": Kind(COLUMNS["separation"], ("separation",)),
}
_NAME = re.compile(r"\w[\w.-]*")  # it becomes a folder's name in the -hf layout


def train_adapter(
    model: str | Path | None,
    data: Path,
    output: Path,
    *,
    kind: str,
    name: str,
    steps: int = 100,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    max_tokens: int = 256,
    seed: int = 0,
) -> tuple[tuple[str, ...], list[float]]:
    """Write to the new folder ``output`` the model with one more task; return its task names and the loss of each step.

    ``data`` is JSONL, CSV or Parquet with the columns of ``KINDS[kind]``. The new adapter starts as a copy of the
    model's own of that kind, prompt included. The base and every other adapter stay bit for bit. Texts are cut at
    ``max_tokens`` in training alone. Raises ``InputError`` for unknown kinds, names in use, and files that do not fit.
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if steps < 1 or batch_size < 2:
        raise InputError(f"steps must be at least 1 and batch_size at least 2, got {steps} and {batch_size}")
    check_new_folder(output)
    rows = read_examples(data, KINDS[kind].columns, f"kind {kind!r}")
    folder = resolve_model_folder(model)
    torch.manual_seed(seed)
    names = tuple(name + suffix for suffix in KINDS[kind].suffixes)
    encoder = add_tasks(load_encoder(folder), dict(zip(names, KINDS[kind].starts, strict=True))).train()
    switch_dropout_off(encoder)
    config = encoder.config
    tokenizer = Tokenizer.from_file(
        folder / "tokenizer.json",
        vocab_size=config.vocab_size,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )
    encode = TextEncoder(encoder, tokenizer, max_tokens=min(max_tokens, config.max_tokens))
    step_loss = _step_of(kind, names, rows, encode, config.matryoshka_dims, batch_size=batch_size, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    losses = train(
        [(freeze_base(encoder), 1.0)],
        lambda step: [step_loss(step)],
        Schedule(steps=steps, learning_rate=learning_rate, warmup_steps=max(1, steps // 10)),
        log_path=output / "training.jsonl",
    )
    save_encoder(encoder.eval(), output)
    copy_companions(folder, output)
    return names, losses


@torch.no_grad()
def add_tasks(encoder: Encoder, starts: Mapping[str, str]) -> Encoder:
    """Return ``encoder`` with one more adapter for each new task name in ``starts``, a copy of the task named there.

    Where the model has no such task, the new adapter starts as no change at all and without a prompt.
    """
    old = encoder.config
    for name in starts:
        if name in old.tasks or not _NAME.fullmatch(name):
            raise InputError(
                f"name must be letters, digits, '.', '_' and '-' and new to the model, which has "
                f"{', '.join(old.tasks)}, got {name!r}"
            )
    prompts = {**old.prompts, **{name: old.prompts.get(start, "") for name, start in starts.items()}}
    grown = Encoder(replace(old, prompts=prompts))
    tensors = dict(encoder.state_dict())
    for key, fresh in grown.state_dict().items():
        if ".lora_" in key:
            rows = [
                tensors[key][old.tasks.index(start)] if start in old.tasks else fresh[len(old.tasks) + i]
                for i, start in enumerate(starts.values())
            ]
            tensors[key] = torch.cat((tensors[key], torch.stack(rows)))
    grown.load_state_dict(tensors)
    return grown


def _step_of(
    kind: str,
    names: tuple[str, ...],
    rows: list[Record],
    encode: Encode,
    dims: tuple[int, ...],
    *,
    batch_size: int,
    seed: int,
) -> Callable[[int], Tensor]:
    """Return the loss of a step, a function of the step's number alone."""
    if kind in ("classification", "separation"):
        per_class = 2 if kind == "classification" else 4
        labelled = [("data", str(row["label"]), row["text"]) for row in rows]
        sampler = LabelSampler(labelled, per_class=per_class, seed=seed)
        if not sampler.datasets:
            raise InputError(
                f"labels must have at least two classes of {per_class} texts, got "
                f"{len({label for _, label, _ in labelled})} labels in {len(rows)} examples; add examples"
            )
        num_classes = max(2, batch_size // per_class)
        if kind == "classification":
            return lambda step: classification_step(
                encode, sampler.draw(step, num_classes)[0], dims=dims, task=names[0]
            )
        return lambda step: separation_step(encode, *sampler.draw(step, num_classes), dims=dims, task=names[0])
    columns = KINDS[kind].columns
    pairs = GroupedSampler((("data", tuple(row[c] for c in columns)) for row in rows), smallest=1, seed=seed)
    if kind == "retrieval":
        return lambda step: retrieval_step(encode, pairs.draw(step, batch_size), dims=dims, tasks=(names[0], names[1]))
    return lambda step: text_matching_step(encode, pairs.draw(step, batch_size), dims=dims, task=names[0])
