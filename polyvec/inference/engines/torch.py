"""PyTorch: any checkpoint, any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.errors import InputError
from polyvec.inference.batching import Batch, split_by_adapter
from polyvec.inference.engines.graphs import Graphs
from polyvec.inference.quantize import smallest_cosine
from polyvec.inference.threads import usable_cores
from polyvec.model import float8
from polyvec.model.encoder import Encoder
from polyvec.model.pooling import mean_pool
from polyvec.tasks import NO_ADAPTER

#: Between vectors in float8 and in bfloat16, of texts of random tokens, with each adapter and without.
SMALLEST_COSINE = 0.999
#: Of one task, from which on a pass of its own costs less than its share of a gated one: the host takes as long to
#: start a pass as an H200 to compute this many tokens of the 570M shape (17 ms, measured 2026-11-26).
_MERGED_TOKENS = 8192
_COPIES_SHARE = 1 / 8  # of a GPU's memory, up to which copies of the layers are kept unasked: 570M on 24 GB
_PROBE_TEXTS = 24
_PROBE_TOKENS = 512


#: What is on its way to the host, and what says that it is there.
_Outputs: TypeAlias = tuple[Tensor, "torch.cuda.Event | None"]


def _find_device(name: str | None) -> torch.device:
    """Return the device called ``name``; without a name CUDA, or the CPU where there is none."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the second where it was built without CUDA
        reason = str(error).partition("\n")[0]
        raise InputError(f"device must be one that torch finds here, got {name!r} ({reason}); leave it out") from error
    return device


class TorchEngine:
    """An encoder on a device. ``device`` defaults to CUDA where there is one.

    ``dtype`` defaults to what the hardware multiplies fast: bfloat16 on CUDA, float32 on a CPU, where half precision
    is a hundred times slower. ``"float8"`` multiplies the layers' weights in 8 bits, on a GPU of compute capability
    8.9 or more; opening it raises ``InputError`` where vectors of these weights differ too much. ``compiler`` is a
    backend of ``torch.compile`` such as ``inductor``: each layer is then compiled once for all lengths and batch
    sizes, which takes a minute and pays on long jobs on a GPU. ``graphs`` records small batches as CUDA graphs when
    their sizes come again; it defaults to True on CUDA.

    ``merged_task`` names the one task that is to be computed, whose adapter then costs nothing. With ``"each"`` the
    layers are kept once more for every task: a pass whose texts share a task costs what one without adapters does, and
    only what is left over goes through all adapters at once. With None nothing is merged. ``"auto"`` is ``"each"`` on a
    GPU of whose memory the copies take at most an eighth, else None; in bfloat16 the two ways round differently.
    What is merged stays so, in ``encoder`` too. ``threads`` are torch's own on a CPU, a number of the whole process.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        device: str | None = None,
        dtype: torch.dtype | Literal["float8"] | None = None,
        compiler: str | Callable[..., Any] | None = None,
        graphs: bool | None = None,
        merged_task: str | None = "auto",
        threads: int | None = None,
    ) -> None:
        self.device = _find_device(device)
        is_cuda = self.device.type == "cuda"
        if dtype == "float8":
            float8.check_device(self.device)
        elif isinstance(dtype, str):
            raise InputError(f"dtype must be 'float8' or a torch.dtype, got {dtype!r}")
        self.dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16 if is_cuda or dtype else torch.float32
        self.config = encoder.config
        if graphs and not is_cuda:
            raise InputError(f"graphs=True needs a CUDA device, got {self.device}; leave it out")
        self.lanes = 2 if is_cuda else 1  # one prepares while the device computes for the other
        self.batch_tokens = self.lane_tokens = 32768 if is_cuda else 1024
        self.name = f"torch-{dtype if isinstance(dtype, str) else str(self.dtype).removeprefix('torch.')}"
        self._queue = Lock()
        if merged_task not in (None, "auto", "each", *self.config.tasks):
            names = ", ".join(self.config.tasks)
            raise InputError(f"merged_task must be 'auto', 'each', None or one of {names}, got {merged_task!r}")
        if merged_task in self.config.tasks:
            encoder.merge(self.config.tasks.index(merged_task), for_good=True)
        self._encoder = encoder.to(self.device, self.dtype).eval()
        if merged_task == "auto" and is_cuda and encoder.merged_task is None:
            memory = torch.cuda.get_device_properties(self.device).total_memory
            merged_task = "each" if bytes_of_copies(encoder) <= memory * _COPIES_SHARE else None
        self.own_pass_tokens = _MERGED_TOKENS if merged_task == "each" else None
        self.leaves_host = is_cuda
        self.pads = not is_cuda  # attention alone, and nothing where there is its packed kernel
        if merged_task == "each":
            self._encoder.merge_beside()
        if is_cuda and encoder.merged_task is None:
            self._encoder.freeze_adapters()
        self._graphs: Graphs | None = None
        if dtype == "float8":
            self._turn_to_float8()
        if compiler is not None:
            self._encoder.compile_layers(compiler)
        if is_cuda if graphs is None else graphs:
            self._graphs = Graphs(self._recordable, self.device)
        if self.device.type == "cpu" and (threads or usable_cores() < torch.get_num_threads()):
            torch.set_num_threads(threads or usable_cores())  # torch knows affinity and no quota

    @property
    def lane(self) -> TorchEngine:
        """Itself: torch's threads belong to the process, and a GPU has one queue."""
        return self

    @torch.inference_mode()
    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors, neither truncated nor normalised."""
        with _out_of_memory():
            if self._graphs is not None:
                way = self._way(batch.adapters)
                with self._queue:
                    means = self._graphs(batch, way)
                    recorded = None if means is None else self._fetch(means)
                if recorded is not None:
                    return _read(*recorded)
            if self.own_pass_tokens is None or len(batch.adapters) == 1:
                return _read(*self._start(batch, mean_pool))
            parts = split_by_adapter(batch, least_tokens=self.own_pass_tokens)
            started = [(places, self._start(part, mean_pool)) for places, part in parts]
            vectors = np.empty((len(batch.task_ids), self.config.hidden_size), np.float32)
            for places, outputs in started:
                vectors[places] = _read(*outputs)
            return vectors

    @torch.inference_mode()
    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens."""
        with _out_of_memory():
            return _read(*self._start(batch, lambda states, _: states.float()))

    def _start(self, batch: Batch, finish: Callable[[Tensor, Tensor], Tensor]) -> _Outputs:
        """Start what ``finish`` makes of (N, D) states and (B+1,) offsets; ``_read`` waits for it.

        The lock is held while work is handed to the device, not while it is waited for: of two callers one prepares
        its batch, or reads its vectors, while the device computes for the other, in one order and one stream.
        """
        arrays = [self._pin(array) for array in (batch.input_ids, batch.cu_seqlens, batch.task_ids)]
        max_seqlen, adapters = batch.max_seqlen, batch.adapters
        with self._queue:
            input_ids, cu_seqlens, task_ids = (array.to(self.device, non_blocking=True) for array in arrays)
            states = self._encoder(input_ids, cu_seqlens, task_ids, max_seqlen=max_seqlen, adapters=adapters)
            return self._fetch(finish(states, cu_seqlens))

    def _turn_to_float8(self) -> None:
        """Put the layers into 8 bits, unless that changes the vectors of random texts too much."""
        rng = np.random.default_rng(0)
        merged, longest = self._encoder.merged_task, min(_PROBE_TOKENS, self.config.max_tokens)
        adapters = range(-1, len(self.config.tasks)) if merged is None else [merged]
        rows = [
            rng.integers(0, self.config.vocab_size, length, dtype=np.int32)
            for length in np.geomspace(4, longest, _PROBE_TEXTS).astype(int)
        ]
        probe = Batch.of(rows, [adapters[i % len(adapters)] for i in range(len(rows))])
        want = self.pool(probe)
        float8.to_float8_layers(self._encoder)
        found = smallest_cosine(want, self.pool(probe))
        if not found >= SMALLEST_COSINE:
            raise InputError(
                f"dtype 'float8' must keep a cosine of {SMALLEST_COSINE} to {self.dtype}, got {found:.5f} with these "
                "weights; open the engine with torch.bfloat16"
            )

    def _way(self, adapters: Sequence[int]) -> tuple[int, ...]:
        """Return adapters that stand for all whose pass takes the same weights."""
        if not self._encoder.needs_gate(adapters):
            return (NO_ADAPTER,)
        return tuple(adapters) if self.own_pass_tokens is not None and len(adapters) == 1 else (0, NO_ADAPTER)

    def _recordable(
        self, input_ids: Tensor, cu_seqlens: Tensor, task_ids: Tensor, max_seqlen: int, way: tuple[int, ...]
    ) -> Tensor:
        merged = self._encoder.merged_task
        adapters = way if merged is None else (merged,)
        states = self._encoder(input_ids, cu_seqlens, task_ids, max_seqlen=max_seqlen, adapters=adapters)
        return mean_pool(states, cu_seqlens)

    def _pin(self, array: NDArray[Any]) -> Tensor:
        """Put a copy where a GPU can fetch it without the host."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _fetch(self, tensor: Tensor) -> _Outputs:
        """Return a copy on the host, and what to wait for before it is read."""
        if self.device.type != "cuda":
            return tensor.cpu(), None
        outputs = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        outputs.copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))
        return outputs, done


def bytes_of_copies(encoder: Encoder) -> int:
    """Return the bytes of a copy of the layers for each task."""
    layers = sum(parameter.numel() * parameter.element_size() for parameter in encoder.layers.parameters())
    return layers * len(encoder.config.tasks)


def _read(outputs: Tensor, done: torch.cuda.Event | None) -> NDArray[np.float32]:
    if done is not None:
        done.synchronize()
    return np.asarray(outputs.numpy())


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Turn torch's two ways to say that memory is out into ``MemoryError``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()  # blocks of the failed pass, too small or too scattered for what it wanted
        raise MemoryError(str(error)) from error
    except RuntimeError as error:  # of the CPU's allocator
        if "not enough memory" not in str(error):
            raise
        raise MemoryError(str(error)) from error
