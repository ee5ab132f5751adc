"""What a run needs to go on exactly where it stopped, in safetensors files that are replaced whole.

A process alone writes one file. Processes that hold a part of the model each write their part, at the same time, and
the first one's file, written last, names the others: until it is there, those before it count. Any number of processes
reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from polyvec.atomic import whole_file
from polyvec.errors import InputError
from polyvec.training import distributed


class Checkpoint:
    """Parameters, optimiser state and losses of a run, kept in the file ``path`` and those that it names.

    ``run`` is everything that decides what the run computes, as JSON values: it is recorded whole, and a file of
    another run is refused. Values under a key of ``free`` may differ all the same, and those under one of
    ``changeable`` while steps are left, which ``notice`` is told and the file keeps. ``every`` counts steps between two
    saves.
    """

    def __init__(
        self,
        path: Path,
        *,
        every: int,
        run: Mapping[str, Any],
        free: Collection[str] = (),
        changeable: Collection[str] = (),
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}")
        self.path, self.every, self.free, self.changeable, self.notice = path, every, free, changeable, notice
        self.run: dict[str, Any] = json.loads(json.dumps(dict(run)))
        self.changes: list[dict[str, Any]] = []  # what was another value up to a step

    def save(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
        averages: Sequence[Tensor] = (),
    ) -> None:
        """Write the state after ``len(losses)`` steps; until it is whole, the one before it stays. All must call it.

        Raises ``OSError`` or ``SafetensorError`` where the file cannot be written; the one before it stays then too.
        """
        named = {f"parameters.{i}": parameter.detach() for i, parameter in enumerate(parameters)}
        named |= {f"averages.{i}": mean for i, mean in enumerate(averages)}
        for i, state in optimizer.state_dict()["state"].items():
            named |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        is_first = distributed.is_first()
        parts = {name: distributed.part_of(tensor) for name, tensor in named.items()}
        own = {name: part.cpu().contiguous() for name, part in parts.items() if part is not None}
        others = [self._name(len(losses), i) for i in range(1, distributed.num_parts(parameters))]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if others:
            if not is_first:
                with whole_file(self.path.with_name(others[distributed.rank() - 1])) as partial:
                    save_file(own, partial)
            distributed.wait_for_all()
        if not is_first:
            return
        own["losses"] = torch.tensor(losses, dtype=torch.float64)
        metadata = {name: json.dumps(getattr(self, name)) for name in ("run", "changes")}
        metadata["others"] = json.dumps(others)
        with whole_file(self.path) as partial:
            save_file(own, partial, metadata=metadata)
        for file in self.path.parent.glob(self.parts_pattern):
            if file.name not in others:
                file.unlink()

    @property
    def parts_pattern(self) -> str:
        """Pattern of the names of the other processes' files, which are nothing without the first one's."""
        return self._name("*", "*")

    def _name(self, step: int | str, number: int | str) -> str:
        """Return the name of the file of one of the other processes."""
        return f"{self.path.stem}.step{step}.part{number}{self.path.suffix}"

    def restore(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        averages: Sequence[Tensor] = (),
        *,
        steps: float = math.inf,
    ) -> list[float]:
        """Load what is there, if anything, into what it was saved from; return the losses of the steps so far, of
        ``steps`` in all.

        Raises ``InputError`` for a file that is not whole, or that another run or another architecture wrote.
        """
        if not self.path.exists():
            return []
        with self._opened() as files:
            losses = [float(loss) for loss in files[0].get_tensor("losses")]
            metadata = files[0].metadata() or {}
            self.changes = json.loads(metadata.get("changes", "[]"))
            self._check_run(json.loads(metadata.get("run", "{}")), len(losses), steps)
            self._check_shapes(files, parameters)
            with torch.no_grad():
                for i, parameter in enumerate(parameters):
                    parameter.copy_(distributed.place_like(_whole(files, f"parameters.{i}"), parameter))
                for i, mean in enumerate(averages):
                    mean.copy_(distributed.place_like(_whole(files, f"averages.{i}"), mean))
            state: dict[int, dict[str, Tensor]] = {}
            for name in files[0].keys():  # noqa: SIM118 (not a mapping)
                if name.startswith("optimizer."):
                    _, i, key = name.split(".")
                    like, tensor = parameters[int(i)], _whole(files, name)
                    is_like = tensor.shape == like.shape
                    state.setdefault(int(i), {})[key] = distributed.place_like(tensor, like) if is_like else tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            return losses

    @contextmanager
    def _opened(self) -> Iterator[list[Any]]:
        """Yield the open files, the first process's first, after a check that they are whole."""
        with ExitStack() as stack:
            try:
                files = [stack.enter_context(safe_open(self.path, framework="pt"))]
                for name in json.loads((files[0].metadata() or {}).get("others", "[]")):
                    files.append(stack.enter_context(safe_open(self.path.with_name(name), framework="pt")))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{self.path} must be a whole checkpoint, got {error}; to start anew, remove it and what else the "
                    "run wrote"
                ) from error
            yield files

    def _check_run(self, run: Mapping[str, Any], done: int, steps: float) -> None:
        """Raise ``InputError`` for a ``run`` that is not this one after ``done`` of its ``steps``."""
        keys = [key for key in {**run, **self.run} if key not in self.free and run.get(key) != self.run.get(key)]
        if not set(keys).issubset(self.changeable if done < steps else ()):
            differences = ", ".join(f"{key} {run.get(key)!r} instead of {self.run.get(key)!r}" for key in keys)
            raise InputError(
                f"{self.path} must be of the same run, got {differences}; give this run a folder of its own"
            )
        for key in keys:
            self.changes.append({"until_step": done, key: run.get(key)})
            self.notice(f"{key} is {self.run.get(key)!r} from step {done} on, before it was {run.get(key)!r}")

    def _check_shapes(self, files: Sequence[Any], parameters: Sequence[nn.Parameter]) -> None:
        wanted = {f"parameters.{i}": tuple(p.shape) for i, p in enumerate(parameters)}
        found = {name: _shape(files, name) for name in files[0].keys() if name.startswith("parameters.")}  # noqa: SIM118
        if wanted != found:
            name = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
            raise InputError(
                f"{self.path} must be of the same architecture, got {name} of shape {found.get(name)} "
                f"instead of {wanted.get(name)}; give this run a folder of its own"
            )


def _whole(files: Sequence[Any], name: str) -> Tensor:
    """Return a tensor from its parts, which lie in the order of the files."""
    parts = [file.get_tensor(name) for file in files if name in file.keys()]  # noqa: SIM118
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _shape(files: Sequence[Any], name: str) -> tuple[int, ...]:
    shapes = [tuple(file.get_slice(name).get_shape()) for file in files if name in file.keys()]  # noqa: SIM118
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
