"""A task is one object: the adapter and the prompt that were trained together.

Half a task is the most common mistake with this model family: the adapter without its prompt, or the prompt without
its adapter. Here a task resolves to both or to an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from polyvec.errors import InputError

#: Adapter order of jina-embeddings-v3 (``lora_adaptations`` of its config): a task's id is its index here.
TASK_NAMES = ("retrieval.query", "retrieval.passage", "separation", "classification", "text-matching")

#: Prompts of jina-embeddings-v3 (``task_instructions`` of its config). The trailing space is part of them.
TASK_PROMPTS = {
    "retrieval.query": "Represent the query for retrieving evidence documents: ",
    "retrieval.passage": "Represent the document for retrieval: ",
    "separation": "",
    "classification": "",
    "text-matching": "",
}

#: Tasks whose vectors meet those of another; of any other task they meet their own alone.
PARTNERS = {"retrieval.query": "retrieval.passage", "retrieval.passage": "retrieval.query"}

#: The adapter id of a row that no adapter touches: the base model.
NO_ADAPTER = -1


@dataclass(frozen=True)
class Task:
    """An adapter with its prompt. ``adapter_id`` is the adapter's index in the model, ``NO_ADAPTER`` for the base."""

    name: str | None
    adapter_id: int
    prompt: str


#: No task: base weights, no prompt.
BASE = Task(None, NO_ADAPTER, "")


def resolve_task(name: str | None, prompts: Mapping[str, str], *, prompt: str | None = None) -> Task:
    """Return the task called ``name``; ``None`` is the base model without a prompt.

    ``prompts`` maps the model's task names, in adapter order, to their prompts. ``prompt`` replaces the task's own:
    the one explicit way to part the two. Raises ``InputError`` for a name that the model does not have.
    """
    if name is None:
        task = BASE
    elif isinstance(name, str) and name in prompts:
        task = Task(name, list(prompts).index(name), prompts[name])
    else:
        raise InputError(f"task must be one of {', '.join(prompts) or '(this model has none)'} or None, got {name!r}")
    return task if prompt is None else replace(task, prompt=prompt)
