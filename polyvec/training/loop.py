"""One training loop for every stage: steps in, a loss down, a log of how it went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to ``learning_rate``, then linear decay to zero at ``steps`` (arXiv 2409.10173, table A1)."""

    steps: int
    learning_rate: float
    warmup_steps: int = 50

    def factor(self, step: int) -> float:
        return min((step + 1) / self.warmup_steps, (self.steps - step) / max(1, self.steps - self.warmup_steps), 1.0)


def train(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    shares_of: Callable[[int], Iterable[Tensor]],
    schedule: Schedule,
    *,
    log_path: Path,
    max_grad_norm: float = 1.0,
    log_every: int = 20,
    each_log: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise the sum of ``shares_of(step)`` with AdamW and return the loss of every step.

    Each share of a step's loss is sent backwards before the next is asked for, so that a batch of any size needs the
    memory of one share. ``groups`` pairs parameters with a multiple of the learning rate. Every ``log_every`` steps one
    JSON line (step, mean loss since the last, seconds) goes to ``log_path`` and ``each_log(step)`` runs. A loss that is
    not finite stops the run before it reaches the weights: raises ``FloatingPointError`` naming the step.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(p), "lr": schedule.learning_rate * m, "base": m} for p, m in groups],
        weight_decay=0.0,
        # RoBERTa's: rows of rare tokens see few steps, and at 0.999 their second moment starts from zero for long.
        betas=(0.9, 0.98),
        fused=True,
    )
    parameters = [p for group, _ in groups for p in group]
    losses: list[float] = []
    started = time.monotonic()
    with log_path.open("a", encoding="utf-8") as log:
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * group["base"] * schedule.factor(step)
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for share in shares_of(step):
                if not torch.isfinite(share):
                    raise FloatingPointError(
                        f"loss must be finite, got {share.item()} at step {step}; lower learning_rate"
                    )
                share.backward()  # type: ignore[no-untyped-call]
                total += share.item()
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            losses.append(total)
            if (step + 1) % log_every == 0 or step + 1 == schedule.steps:
                recent = losses[-log_every:]
                row = {"step": step + 1, "loss": sum(recent) / len(recent), "seconds": time.monotonic() - started}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if each_log is not None:
                    each_log(step + 1)
    return losses


@contextmanager
def fast_short_texts(*, bf16: bool) -> Iterator[None]:
    """Run what is inside with the CPU kernels that train texts of up to about 128 tokens fastest.

    ``bf16`` multiplies in bfloat16, which pays where the processor has instructions for it (AVX-512 BF16, AMX) and
    costs a hundredfold elsewhere. Attention keeps its T x T scores: the backward pass of the fused kernel takes half of
    a step at these lengths (measured 2026-11-24 on two cores: 2,200 tokens/s fused, 3,300 so).
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
        yield
