"""A task of the user's own beside the five: a new adapter over the frozen base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from polyvec.errors import InputError
from polyvec.model.encoder import Encoder

#: Stage -> adapters that it trains, of queries and of passages where they differ (arXiv 2409.10173, section 4.3).
ADAPTERS: dict[str, tuple[str, ...]] = {
    "retrieval": ("retrieval.query", "retrieval.passage"),
    "text-matching": ("text-matching",),
    "classification": ("classification",),
    "separation": ("separation",),
}
_NAME = re.compile(r"\w[\w.-]*")  # it becomes a folder's name in the -hf layout


def new_tasks(name: str, stage: str) -> dict[str, str]:
    """Return the tasks that an adapter called ``name`` gives a model, each with the task that it starts from.

    A retrieval adapter ``legal`` is the pair ``legal.query`` and ``legal.passage``.
    """
    starts = ADAPTERS[stage]
    if len(starts) == 1:
        return {name: starts[0]}
    return {f"{name}.{start.rpartition('.')[2]}": start for start in starts}


@torch.no_grad()
def add_tasks(encoder: Encoder, starts: Mapping[str, str]) -> Encoder:
    """Return ``encoder`` with one more adapter for each new task name in ``starts``, a copy of the task named there.

    Where the model has no such task, the new adapter starts as no change at all and without a prompt. Raises
    ``InputError`` for a name in use or one that is no folder's name.
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
