"""A stream of texts in blocks: what is sorted by length together, and the next one made while one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from polyvec.tasks import Task

_T = TypeVar("_T")
_TEXTS = 1024  # sorted by length together; more gains under 2 % (padding), fewer costs streams nothing
_CHARACTERS = 2_000_000  # a block of giant texts ends early, so that a stream's memory stays bounded
_MOST_TEXTS = 65536
_PASSES = 4  # of a device, which is best filled by passes of one task each: its later blocks hold more texts
_TOKEN_CHARACTERS = 4


def blocks(rows: Iterator[tuple[str, Task]], *, device_tokens: int = 0) -> Iterator[tuple[int, list[tuple[str, Task]]]]:
    """Yield blocks of rows with the number of the first.

    ``device_tokens`` are those of a full pass of a device beside the host: blocks after the first are then worth
    several. What is no text is passed on as it is.
    """
    block: list[tuple[str, Task]] = []
    first = characters = least = 0
    for row in rows:
        block.append(row)
        characters += len(row[0]) if isinstance(row[0], str) else 0
        is_enough = len(block) >= _TEXTS and characters >= least
        if is_enough or len(block) == _MOST_TEXTS or characters > _CHARACTERS:
            yield first, block
            first += len(block)
            block, characters, least = [], 0, device_tokens * _PASSES * _TOKEN_CHARACTERS
    if block:
        yield first, block


def ahead(calls: Iterator[Callable[[], _T]]) -> Iterator[_T]:
    """Yield what each call returns; the next one runs in a thread while the caller works on this one's result.

    The calls themselves are asked for here: what they come from may belong to the caller's thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:

        def submit() -> Future[_T] | None:
            try:
                call = next(calls, None)
            except Exception as error:  # not before the results that come first
                failed: Future[_T] = Future()
                failed.set_exception(error)
                return failed
            return None if call is None else thread.submit(call)

        coming = submit()
        while coming is not None:
            result = coming.result()
            coming = submit()
            yield result
