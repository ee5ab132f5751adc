"""PyTorch: any checkpoint, any device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.inference.batching import Batch
from polyvec.inference.threads import usable_cores
from polyvec.model.encoder import Encoder
from polyvec.model.pooling import mean_pool


class TorchEngine:
    """An encoder on a device. ``device`` defaults to CUDA where there is one.

    ``dtype`` defaults to what the hardware multiplies fast: bfloat16 on CUDA, float32 on a CPU, where half precision
    is a hundred times slower. ``compiler`` is a backend of ``torch.compile`` such as ``inductor``: each layer is then
    compiled once for all lengths and batch sizes, which takes a minute and pays on long jobs on a GPU.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        compiler: str | Callable[..., Any] | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.config = encoder.config
        self.lanes = 1
        self.batch_tokens = self.lane_tokens = 32768 if self.device.type == "cuda" else 1024
        self.name = f"torch-{str(self.dtype).removeprefix('torch.')}"
        self._encoder = encoder.to(self.device, self.dtype).eval()
        if compiler is not None:
            for layer in self._encoder.layers:
                layer.compile(backend=compiler, dynamic=True)
        if self.device.type == "cpu" and usable_cores() < torch.get_num_threads():
            torch.set_num_threads(usable_cores())  # torch knows affinity and no quota

    @property
    def lane(self) -> TorchEngine:
        """Itself: torch's threads belong to the process."""
        return self

    @torch.inference_mode()
    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors, neither truncated nor normalised."""
        with _out_of_memory():
            states, cu_seqlens = self._forward(batch)
            return np.asarray(mean_pool(states, cu_seqlens).cpu().numpy())

    @torch.inference_mode()
    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens."""
        with _out_of_memory():
            return np.asarray(self._forward(batch)[0].float().cpu().numpy())

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        cu_seqlens = self._send(batch.cu_seqlens)
        return self._encoder(self._send(batch.input_ids), cu_seqlens, self._send(batch.task_ids)), cu_seqlens

    def _send(self, array: NDArray[Any]) -> Tensor:
        """Copy to the device; from pinned memory to a GPU, which goes on while the next array is on its way."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


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
