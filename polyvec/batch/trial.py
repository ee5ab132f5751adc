"""Texts that end their worker are found, set aside, and never end a second job.

A worker that dies says nothing, so it writes down what it is about to run, in ``_work/trials/NAME.json``.
A slice that did not end counts one loss; whoever kills workers at random must not cast suspicion on texts, so
a slice runs whole three times. Then its halves run by themselves, and halves of the half that dies, down to single
texts. What those runs compute is thrown away, and the slice runs whole again without the guilty: batches, and with them
the last bits of every vector, are those of a job in which the guilty were never tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from polyvec.batch.storage import WORK, Folder
from polyvec.errors import PolyvecError

Result = TypeVar("Result")

_LOSSES = 3  # whole runs that may be lost before the texts are suspected
_DEATHS = 2  # of a text alone before it is guilty: once may be chance
_MOST_LOSSES = 12


class WorkerError(PolyvecError):
    """What stops a job from a worker: one sentence."""


class Trial:
    """The runs of one slice, remembered across deaths. ``guilty`` maps an index to its reason and its tries."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, f"{WORK}/trials/{name}.json"
        state: dict[str, Any] = folder.read_json(self._name) or {}
        self.losses: int = state.get("losses", 0)
        self.todo: list[list[int]] = state.get("todo", [])  # ranges [start, stop, deaths] still to be tried
        self.trying: list[int] | None = state.get("trying")
        self.guilty: dict[int, tuple[str, int]] = {int(i): (r, n) for i, (r, n) in state.get("guilty", {}).items()}

    def run(self, texts: Sequence[str], encode: Callable[[list[str]], list[Result]]) -> list[Result | None]:
        """Return the result of each text, None for the guilty. ``encode`` maps texts to results, one each."""
        if self.trying is not None:
            self._failed(self.trying, f"ended its worker {_DEATHS} times")
        elif self.losses == _LOSSES:
            self.todo = [[0, len(texts), 0]]
        if self.losses >= _MOST_LOSSES:
            self.losses = 0  # the next run may have what these lacked
            self._save()
            raise WorkerError(
                f"{self._name} lost {_MOST_LOSSES} workers though no text alone ends one; "
                "run the same command with fewer --workers or on machines with more memory"
            )
        while True:
            self._search(texts, encode)
            self.losses += 1
            self._save()
            innocent = [text for i, text in enumerate(texts) if i not in self.guilty]
            try:
                results = iter(encode(innocent) if innocent else [])
            except (KeyboardInterrupt, SystemExit):
                self.losses -= 1
                self._save()
                raise
            except Exception as error:  # whatever a text does to the tokenizer or the model
                if self.losses > _LOSSES:
                    raise WorkerError(f"{self._name} fails whole though each text alone runs, got: {error}") from error
                self.losses = _LOSSES
                self.todo = [[0, len(texts), 0]]
                continue
            return [None if i in self.guilty else next(results) for i in range(len(texts))]

    def close(self) -> None:
        """Forget the trial: its slice is done."""
        self._folder.remove(self._name)

    def _search(self, texts: Sequence[str], encode: Callable[[list[str]], list[Result]]) -> None:
        while self.todo:
            self.trying = self.todo.pop(0)
            self._save()
            start, stop, _ = self.trying
            try:
                encode([texts[i] for i in range(start, stop) if i not in self.guilty])
            except Exception as error:
                self._failed(self.trying, str(error) or type(error).__name__, is_certain=True)
            self.trying = None

    def _failed(self, tried: list[int], reason: str, *, is_certain: bool = False) -> None:
        start, stop, deaths = tried
        middle = (start + stop) // 2
        if stop - start > 1:
            self.todo[:0] = [[start, middle, 0], [middle, stop, 0]]
        elif is_certain or deaths + 1 == _DEATHS:
            self.guilty[start] = (reason, deaths + 1)
        else:
            self.todo.insert(0, [start, stop, deaths + 1])
        self.trying = None

    def _save(self) -> None:
        state = {"losses": self.losses, "todo": self.todo, "trying": self.trying, "guilty": self.guilty}
        self._folder.write_json(self._name, state)
