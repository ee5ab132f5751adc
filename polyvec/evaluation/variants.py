"""Ablations: what a model loses or gains when one of its parts is left out, or used in another way.

| ablation | variants beside the whole model |
|---|---|
| task | ``no-task``: the base model without prompt |
| adapter | ``no-adapter``: the prompt alone |
| prompt | ``no-prompt``: the adapter alone |
| one-adapter | ``query-adapter``, ``passage-adapter``, ``text-matching``: both sides of a retrieval through one |
| chunking | ``late-chunks``, ``naive-chunks``: a passage is the nearest of its sentences, read in context or alone |
| rescoring | ``rescored``: nearest by a vector of few bits, then by the query in float32 |

Widths, dtypes, engines and ``rope_theta`` are options of a run of their own: they are numbers, not parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from polyvec.errors import InputError


@dataclass(frozen=True)
class Variant:
    """A way to use a model. ``adapter`` is the one of every text in place of the task's own."""

    name: str = ""
    uses_adapter: bool = True
    uses_prompt: bool = True
    adapter: str | None = None
    chunks: Literal["late", "naive"] | None = None
    rescores: bool = False

    def way(self, task: str, prompts: Mapping[str, str]) -> tuple[str | None, str]:
        """Return the adapter, or None for the base, and the prompt of a text of ``task``."""
        if not prompts:
            return None, ""
        adapter = (self.adapter or task) if self.uses_adapter else None
        prompt = prompts[task if self.adapter != "text-matching" else "text-matching"]
        return adapter, prompt if self.uses_prompt else ""

    def applies(self, kind: str, dtype: str) -> bool:
        """Whether it can differ from the whole model on suites of ``kind`` with vectors of ``dtype``."""
        if self.adapter is not None or self.chunks is not None:
            return kind == "retrieval"
        return not self.rescores or (kind == "retrieval" and dtype in ("int8", "binary", "ubinary"))

    @property
    def needs_tasks(self) -> bool:
        """Whether only a model with tasks has it."""
        return not self.rescores


WHOLE = Variant()
ABLATIONS: dict[str, tuple[Variant, ...]] = {
    "task": (Variant("no-task", uses_adapter=False, uses_prompt=False),),
    "adapter": (Variant("no-adapter", uses_adapter=False),),
    "prompt": (Variant("no-prompt", uses_prompt=False),),
    "one-adapter": (
        Variant("query-adapter", adapter="retrieval.query"),
        Variant("passage-adapter", adapter="retrieval.passage"),
        Variant("text-matching", adapter="text-matching"),
    ),
    "chunking": (Variant("late-chunks", chunks="late"), Variant("naive-chunks", chunks="naive")),
    "rescoring": (Variant("rescored", rescores=True),),
}


def variants_of(ablations: Iterable[str]) -> list[Variant]:
    """Return the whole model and the variants of every ablation named. Raises ``InputError`` for an unknown one."""
    chosen = [WHOLE]
    for name in ablations:
        if name not in ABLATIONS:
            raise InputError(f"ablation must be one of {', '.join(ABLATIONS)}, got {name!r}")
        chosen += ABLATIONS[name]
    return chosen
