"""A task is adapter and prompt together, or an error."""

from __future__ import annotations

import pytest

from polyvec.errors import InputError
from polyvec.tasks import BASE, TASK_NAMES, TASK_PROMPTS, Task, resolve_task


def test_a_task_resolves_to_both_halves() -> None:
    assert resolve_task("retrieval.passage", TASK_PROMPTS) == Task(
        "retrieval.passage", 1, "Represent the document for retrieval: "
    )
    assert resolve_task(None, TASK_PROMPTS) == BASE
    assert [resolve_task(name, TASK_PROMPTS).adapter_id for name in TASK_NAMES] == [0, 1, 2, 3, 4]


def test_only_an_explicit_prompt_parts_them() -> None:
    assert resolve_task("retrieval.query", TASK_PROMPTS, prompt="") == Task("retrieval.query", 0, "")


@pytest.mark.parametrize("name", ["query", "Retrieval.query", "", 0])
def test_an_unknown_task_is_an_error_that_lists_the_known(name: object) -> None:
    with pytest.raises(InputError, match="one of retrieval.query, retrieval.passage, separation"):
        resolve_task(name, TASK_PROMPTS)  # type: ignore[arg-type]
