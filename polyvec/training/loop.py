"""One training loop for every stage: batches in, a loss down, a log of how it went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Batch = TypeVar("Batch")


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
    next_batch: Callable[[int], Batch],
    loss_of: Callable[[Batch], Tensor],
    schedule: Schedule,
    *,
    log_path: Path,
    max_grad_norm: float = 1.0,
    log_every: int = 20,
    each_log: Callable[[int], None] | None = None,
) -> list[float]:
    """Minimise ``loss_of(next_batch(step))`` with AdamW and return the loss of every step.

    ``groups`` pairs parameters with a multiple of the learning rate. Every ``log_every`` steps one JSON line (step,
    mean loss since the last, seconds) goes to ``log_path`` and ``each_log(step)`` runs. A loss that is not finite
    stops the run before it reaches the weights: raises ``FloatingPointError`` naming the step.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(p), "lr": schedule.learning_rate * m, "base": m} for p, m in groups],
        weight_decay=0.0,
        # RoBERTa's: rows of rare tokens see few steps, and at 0.999 their second moment starts from zero for long.
        betas=(0.9, 0.98),
    )
    parameters = [p for group, _ in groups for p in group]
    losses: list[float] = []
    started = time.monotonic()
    with log_path.open("a", encoding="utf-8") as log:
        for step in range(schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * group["base"] * schedule.factor(step)
            loss = loss_of(next_batch(step))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss must be finite, got {loss.item()} at step {step}; lower learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % log_every == 0 or step + 1 == schedule.steps:
                recent = losses[-log_every:]
                row = {"step": step + 1, "loss": sum(recent) / len(recent), "seconds": time.monotonic() - started}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if each_log is not None:
                    each_log(step + 1)
    return losses
