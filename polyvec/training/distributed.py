"""One run on several processes, as ``torchrun`` starts them; a process alone needs nothing here.

The processes share the parts of every step and sum their gradients: the same numbers as one process, whatever the loss,
because each share of a loss is already scaled to the whole step. Under FSDP2 every process must run the model as often
as the others, so those with fewer parts run one again with weight zero.

Plain ``torch.distributed``: accelerate averages the gradients of equal batches, and batches under a token budget are
not equal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the group of processes that ``torchrun`` announces, if any, and yield the device of this one."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    device = device or torch.device("cpu")
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def seed_part(*numbers: int) -> None:
    """Make what dropout draws next a function of ``numbers`` alone, such as seed, step and part: the same on whichever
    process the part runs, and after any stop."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed writes its stack down, in 4 ms
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes the model and prints."""
    return rank() == 0


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def my_share(num_parts: int) -> list[int]:
    """Return the numbers of this process's parts: every world-size-th, as many on each, part 0 again to fill."""
    mine = list(range(rank(), num_parts, world_size()))
    return mine if len(mine) == -(-num_parts // world_size()) else [*mine, 0]


def num_own(num_parts: int) -> int:
    """Return how many of ``my_share``, from its first, are this process's own."""
    return len(range(rank(), num_parts, world_size()))


def gather_rows(mine: Sequence[Tensor], num_parts: int) -> list[Tensor]:
    """Return the rows of all ``num_parts`` parts, in order, from each process's ``my_share`` of them."""
    if not dist.is_initialized():
        return list(mine)
    size, width = dist.get_world_size(), mine[0].shape[-1]
    lengths = torch.tensor([len(m) for m in mine], device=mine[0].device)
    all_lengths = [torch.empty_like(lengths) for _ in range(size)]
    dist.all_gather(all_lengths, lengths)
    longest = max(int(part.sum()) for part in all_lengths)
    rows = torch.cat(list(mine))
    padded = rows.new_zeros(longest, width)
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(everyone, padded)
    parts = [
        torch.split(rows[: int(part.sum())], part.tolist()) for rows, part in zip(everyone, all_lengths, strict=True)
    ]
    return [parts[i % size][i // size] for i in range(num_parts)]


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add up the processes' gradients; those of sharded parameters have been, on their way back."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:  # no part of this process reached it
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients, the shards of other processes included. All must ask."""
    norms = [
        whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in _by_kind(parameters)
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip_gradients(parameters: Sequence[nn.Parameter], longest: float, norm: Tensor) -> None:
    """Scale gradients of this ``norm`` down to ``longest`` where they exceed it."""
    for kind in _by_kind(parameters):
        nn.utils.clip_grads_with_norm_(kind, longest, norm)


def _by_kind(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return sharded parameters and whole ones, which no operation takes together."""
    kinds = [[p for p in parameters if isinstance(p, DTensor) == is_sharded] for is_sharded in (True, False)]
    return [kind for kind in kinds if kind]


def sums(values: Tensor) -> list[float]:
    """Return (n,) numbers of this process's device, each summed over the processes, after one wait for the device."""
    values = values.double()
    if world_size() > 1:
        dist.all_reduce(values)
    return [float(value) for value in values.tolist()]


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Split parameters, gradients and optimiser state over the processes, layer by layer, then the rest (FSDP2)."""
    for module in (*layers, model):
        sharded = fully_shard(module)
        assert isinstance(sharded, FSDPModule)
        sharded.set_gradient_divide_factor(1.0)  # a sum: shares are scaled to the whole step already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def whole(tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the shards of all processes; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what of ``tensor`` lies in this process, a shard of it or all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_parts(tensors: Sequence[Tensor]) -> int:
    """Return over how many processes ``shard`` has split these; 1 where each process has all of them."""
    return world_size() if any(isinstance(tensor, DTensor) for tensor in tensors) else 1


def part_of(tensor: Tensor) -> Tensor | None:
    """Return what this process holds of a tensor, rows that follow those of the process before; None where the first
    process has it all."""
    return local(tensor) if isinstance(tensor, DTensor) or is_first() else None


def place_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole ``tensor`` split as ``like`` is."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor
