"""PyTorch: any checkpoint, any device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.inference.batching import Batch
from polyvec.model.encoder import Encoder
from polyvec.model.pooling import mean_pool


class TorchEngine:
    """An encoder on a device. ``device`` defaults to CUDA where there is one.

    ``dtype`` defaults to what the hardware multiplies fast: bfloat16 on CUDA, float32 on a CPU, where half precision
    is a hundred times slower.
    """

    def __init__(self, encoder: Encoder, *, device: str | None = None, dtype: torch.dtype | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.config = encoder.config
        self.batch_tokens = 32768 if self.device.type == "cuda" else 1024
        self.name = f"torch-{str(self.dtype).removeprefix('torch.')}"
        self._encoder = encoder.to(self.device, self.dtype).eval()

    @torch.inference_mode()
    def pool(self, batch: Batch) -> NDArray[np.float32]:
        """Return (B, D) mean-pooled vectors, neither truncated nor normalised."""
        states, cu_seqlens = self._forward(batch)
        return np.asarray(mean_pool(states, cu_seqlens).cpu().numpy())

    @torch.inference_mode()
    def token_states(self, batch: Batch) -> NDArray[np.float32]:
        """Return (N, D) states of the packed tokens."""
        return np.asarray(self._forward(batch)[0].float().cpu().numpy())

    def _forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, cu_seqlens, task_ids = (
            torch.from_numpy(x).to(self.device) for x in (batch.input_ids, batch.cu_seqlens, batch.task_ids)
        )
        return self._encoder(ids, cu_seqlens, task_ids), cu_seqlens
