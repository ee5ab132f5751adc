"""Small batches as CUDA graphs: a GPU computes a short text in less time than the host takes to name its kernels.

A graph is a recording of one pass at fixed sizes. A batch is padded to the next bucket of tokens and texts: what is
left of the texts is empty, and what is left of the tokens is one more text, whose vector nobody reads. Every graph
reads the same addresses, so merging an adapter into the weights in place needs no new ones.

Shape letters: B texts, N packed tokens, D width.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.errors import MachineWarning
from polyvec.inference.batching import Batch
from polyvec.tasks import NO_ADAPTER

_TOKENS = (16, 32, 64, 128, 256, 512)  # beyond, a pass takes the device longer than the host
_TEXTS = (1, 4, 16)
_MOST_GRAPHS = 64
_FIRST_USES = 2  # of a bucket, which run as they are: recording takes as long as some hundred passes


class Bucket(NamedTuple):
    """Sizes at which a pass is recorded, and the adapters whose way through the weights it takes."""

    tokens: int
    texts: int
    adapters: tuple[int, ...]


#: A pass: (N,) ids, (B+1,) offsets, (B,) task ids, a bound of the lengths, adapters of the bucket -> (B, D) means.
Pass: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, tuple[int, ...]], Tensor]
#: Takes a function without arguments, gives one that repeats what it did, and into the same output.
Capture: TypeAlias = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def bucket_of(batch: Batch, adapters: tuple[int, ...]) -> Bucket | None:
    """Return the smallest bucket that holds the batch, or None for a large one."""
    tokens = next((size for size in _TOKENS if len(batch.input_ids) <= size), None)
    texts = next((size for size in _TEXTS if len(batch.task_ids) <= size), None)
    return None if tokens is None or texts is None else Bucket(tokens, texts, adapters)


def fill(batch: Batch, bucket: Bucket) -> NDArray[np.int64]:
    """Return ids, task ids and offsets of the batch, padded to the bucket, one after the other: one copy to a device.

    Their numbers are ``tokens``, ``texts`` + 1 and ``texts`` + 2.
    """
    num_tokens, num_texts = len(batch.input_ids), len(batch.task_ids)
    filled = np.zeros(bucket.tokens + 2 * bucket.texts + 3, dtype=np.int64)
    ids, tasks, offsets = np.split(filled, (bucket.tokens, bucket.tokens + bucket.texts + 1))
    ids[:num_tokens] = batch.input_ids
    tasks[:] = NO_ADAPTER
    tasks[:num_texts] = batch.task_ids
    offsets[: num_texts + 1] = batch.cu_seqlens
    offsets[num_texts + 1 :] = num_tokens
    offsets[-1] = bucket.tokens
    return filled


class Graphs:
    """Recorded passes, the ones used last. Its caller sees to it that one thread calls at a time."""

    def __init__(self, run: Pass, device: torch.device, capture: Capture | None = None) -> None:
        self._run, self._device = run, device
        self._capture = capture or _Recorder(device)
        self._uses: Counter[Bucket] = Counter()
        self._recorded: OrderedDict[Bucket, tuple[Tensor, Callable[[], Tensor]]] = OrderedDict()
        self._is_working = True

    def __call__(self, batch: Batch, adapters: tuple[int, ...]) -> Tensor | None:
        """Return (B, D) means, to be read before the next call, or None where the batch is to run as it is."""
        bucket = bucket_of(batch, adapters) if self._is_working else None
        if bucket is None:
            return None
        self._uses[bucket] += 1
        if self._uses[bucket] <= _FIRST_USES:
            return None
        if bucket not in self._recorded and not self._record(bucket):
            return None
        self._recorded.move_to_end(bucket)
        inputs, replay = self._recorded[bucket]
        filled = torch.from_numpy(fill(batch, bucket))
        inputs.copy_(filled.pin_memory() if self._device.type == "cuda" else filled, non_blocking=True)
        return replay()[: len(batch.task_ids)]

    def _record(self, bucket: Bucket) -> bool:
        tokens, texts, adapters = bucket
        inputs = torch.zeros(tokens + 2 * texts + 3, dtype=torch.int64, device=self._device)
        inputs[-1] = tokens
        ids, tasks, offsets = inputs.split((tokens, texts + 1, texts + 2))  # type: ignore[no-untyped-call]
        try:
            replay = self._capture(lambda: self._run(ids, offsets.int(), tasks, tokens, adapters))
        except RuntimeError as error:
            self._is_working = False
            warnings.warn(
                f"a pass of {tokens} tokens could not be recorded as a CUDA graph ({error}); small batches run "
                "kernel by kernel, which takes a short text some times as long",
                MachineWarning,
                stacklevel=2,
            )
            return False
        self._recorded[bucket] = inputs, replay
        if len(self._recorded) > _MOST_GRAPHS:
            self._recorded.popitem(last=False)
        return True


class _Recorder:
    """Records on a stream of its own, all graphs in one pool of memory: they run one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            callers = torch.cuda.current_stream()
            self._stream.wait_stream(callers)
            with torch.cuda.stream(self._stream):
                for _ in range(2):  # libraries open their handles, compilers choose their kernels
                    call()
            callers.wait_stream(self._stream)
            # Other threads go on asking for memory, which must not break the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = call()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
