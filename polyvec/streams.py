"""Results of a stream, beside what they are the results of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def paired(
    items: Iterable[Item], text_of: Callable[[Item], str], encode: Callable[[Iterator[str]], Iterable[Result]]
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of its text, where ``encode`` yields one result per text, in order.

    Only items that are read and not yet answered are kept, so memory is bounded by how far ``encode`` reads ahead.
    """
    waiting: deque[Item] = deque()

    def texts() -> Iterator[str]:
        for item in items:
            waiting.append(item)
            yield text_of(item)

    for result in encode(texts()):
        yield waiting.popleft(), result
