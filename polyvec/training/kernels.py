"""What a CPU trains faster with: the attention kernel of short texts, measured once and remembered, and freed memory
that the process keeps.

The fused kernel never holds the T x T scores of a text, but in bfloat16 its backward pass over short ones was seen to
take a third of a training step (2026-11-24, AVX-512 BF16: 2,200 tokens/s fused, 3,300 with scores kept). In float32 it
was level up to 48 tokens and faster beyond (2026-11-26, AMX).

Shape letters: B texts, H heads, T tokens, K head width.
"""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvec.machine import remembered

SHORT_TOKENS = 128  # scores that are kept have been seen to pay up to here
_CHOICES = {"fused": SDPBackend.FLASH_ATTENTION, "scores kept": SDPBackend.MATH}
_GAIN = 1.1  # keeping scores must be this much faster: memory grows with it
_TOKENS, _SHAPE = 2048, (12, 64, 32)  # of the measurement: B x T, and (H, T, K) as polyvec-mini has them
_REPEATS = 5
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_OWN_MAPPING_BYTES = (2**30, 2**25)  # from here on a block is given back when freed; old glibc takes the second at most


@cache
def keep_freed_memory() -> None:
    """Let this process keep what it frees, where the C library can be told.

    Tensors of tens of megabytes, such as a gradient of the word table, are else given back to the system after every
    use and zeroed page by page at the next. A quarter of the page faults remain, 6 to 16 % of a step of masked words is
    saved, and the peak of memory is a quarter higher (2026-11-26, polyvec-mini on one AMX core).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and any(mallopt(_M_MMAP_THRESHOLD, size) for size in _OWN_MAPPING_BYTES):
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # a C int holds no more


@cache
def keeps_scores(*, bf16: bool) -> bool:
    """Whether a CPU trains texts of up to ``SHORT_TOKENS`` faster with the T x T scores kept than fused."""
    facts = [torch.__version__, torch.get_num_threads(), bf16]
    return remembered("attention", facts, _CHOICES, lambda: _faster(bf16)) == "scores kept"


def _faster(bf16: bool) -> str:
    runs: dict[str, list[float]] = {name: [] for name in _CHOICES}
    for _ in range(_REPEATS + 1):
        for name, backend in _CHOICES.items():
            runs[name].append(_seconds(backend, bf16))
    fused, kept = (median(runs[name][1:]) for name in ("fused", "scores kept"))  # the first run allocates
    return "scores kept" if kept * _GAIN < fused else "fused"


def _seconds(backend: SDPBackend, bf16: bool) -> float:
    """Return the time of one forward and backward pass over texts of nearly like length."""
    heads, longest, width = _SHAPE
    count = _TOKENS // longest
    dtype = torch.bfloat16 if bf16 else torch.float32
    query, key, value = (
        torch.ones(count, heads, longest, width, dtype=dtype, requires_grad=True, device="cpu") for _ in range(3)
    )
    lengths = torch.linspace(0.8 * longest, longest, count, device="cpu").long()
    is_real = (torch.arange(longest, device="cpu") < lengths.unsqueeze(1))[:, None, None, :]
    started = time.perf_counter()
    with sdpa_kernel(backend), torch.enable_grad():
        F.scaled_dot_product_attention(query, key, value, attn_mask=is_real).sum().backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - started
