"""What a run needs to go on exactly where it stopped, in one safetensors file that is replaced whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from polyvec.atomic import whole_file
from polyvec.errors import InputError
from polyvec.training.distributed import is_first, place_like, whole


class Checkpoint:
    """Parameters, optimiser state, random state and losses of a run, kept in the file ``path``.

    ``run`` is everything that decides what the run computes, as JSON values: it is recorded whole, and a file of
    another run is refused. ``every`` counts steps between two saves.
    """

    def __init__(self, path: Path, *, every: int, run: Mapping[str, Any]) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}")
        self.path, self.every = path, every
        self.run: dict[str, Any] = json.loads(json.dumps(dict(run)))

    def save(
        self,
        parameters: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
        averages: Sequence[Tensor] = (),
    ) -> None:
        """Write the state after ``len(losses)`` steps; until it is whole, the file before it stays."""
        tensors = {f"parameters.{i}": whole(p.detach()).contiguous() for i, p in enumerate(parameters)}
        tensors |= {f"averages.{i}": whole(mean).contiguous() for i, mean in enumerate(averages)}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": whole(value).contiguous() for key, value in state.items()}
        if not is_first():
            return
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        tensors["random"] = torch.get_rng_state()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as partial:
            save_file(tensors, partial, metadata={"run": json.dumps(self.run)})

    def restore(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, averages: Sequence[Tensor] = ()
    ) -> list[float]:
        """Load the file, if there is one, into what it was saved from; return the losses of the steps so far.

        Raises ``InputError`` for a file that is not whole, or that another run or another architecture wrote.
        """
        if not self.path.exists():
            return []
        try:
            with safe_open(self.path, framework="pt") as file:
                run = json.loads((file.metadata() or {}).get("run", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} must be a whole checkpoint, got {error}; remove it to start anew") from error
        if run != self.run:
            keys = [key for key in {**run, **self.run} if run.get(key) != self.run.get(key)]
            differences = ", ".join(f"{key} {run.get(key)!r} instead of {self.run.get(key)!r}" for key in keys)
            raise InputError(
                f"{self.path} must be of the same run, got {differences}; give this run a folder of its own"
            )
        self._check_shapes(tensors, parameters)
        with torch.no_grad():
            for i, parameter in enumerate(parameters):
                parameter.copy_(place_like(tensors[f"parameters.{i}"], parameter))
            for i, mean in enumerate(averages):
                mean.copy_(place_like(tensors[f"averages.{i}"], mean))
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                like = parameters[int(i)]
                state.setdefault(int(i), {})[key] = place_like(tensor, like) if tensor.shape == like.shape else tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        torch.set_rng_state(tensors["random"])
        return [float(loss) for loss in tensors["losses"]]

    def _check_shapes(self, tensors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
        wanted = {f"parameters.{i}": tuple(p.shape) for i, p in enumerate(parameters)}
        found = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("parameters.")}
        if wanted != found:
            name = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
            raise InputError(
                f"{self.path} must be of the same architecture, got {name} of shape {found.get(name)} "
                f"instead of {wanted.get(name)}; give this run a folder of its own"
            )
