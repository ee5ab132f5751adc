"""One training loop for every stage: steps in, a loss down, a log of how it went."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyvec.atomic import whole_file
from polyvec.training import distributed
from polyvec.training.checkpoint import Checkpoint
from polyvec.training.kernels import SHORT_TOKENS, keeps_scores
from polyvec.training.utilisation import Work


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
    checkpoint: Checkpoint | None = None,
    average: float = 0.0,
    work: Work | None = None,
    peak: float = math.inf,
    report: Callable[[dict[str, float]], None] | None = None,
    notice: Callable[[str], None] = lambda sentence: None,
    names: Mapping[nn.Parameter, str] = MappingProxyType({}),
) -> list[float]:
    """Minimise the sum of ``shares_of(step)`` with AdamW and return the loss of every step.

    Each share of a step's loss is sent backwards before the next is asked for, so that a batch of any size needs the
    memory of one share. ``groups`` pairs parameters with a multiple of the learning rate. Every ``log_every`` steps one
    JSON line (step, mean loss since the last, seconds) goes to ``log_path`` and to ``report``; where the shares count
    their ``work``, also tokens a second of all processes and ``mfu``, the part of each one's ``peak`` FLOPs a second.
    Under ``torchrun`` the gradients of all processes are summed, and the first process alone writes. A loss or a
    gradient that is not finite stops the run, on all of them, before it reaches the weights: raises
    ``FloatingPointError`` naming the step and, by ``names``, the parameter.

    With ``average`` between 0 and 1 the parameters that remain are a running mean of those after every step, each step
    weighing ``average`` times the next (Polyak averaging, as an exponential mean).

    With a ``checkpoint``, which is saved before the first step already, the run goes on from the last save, to the same
    weights as a run that never stopped, provided that ``shares_of`` depends on the step alone. SIGTERM or SIGINT
    (Ctrl-C) then ends the step, saves, tells ``notice``, and raises ``SystemExit``; a second one does not wait.
    """
    optimizer = torch.optim.AdamW(
        [{"params": list(p), "lr": schedule.learning_rate * m, "base": m} for p, m in groups],
        weight_decay=0.0,
        # RoBERTa's: rows of rare tokens see few steps, and at 0.999 their second moment starts from zero for long.
        betas=(0.9, 0.98),
        fused=not any(isinstance(p, DTensor) for group, _ in groups for p in group),
    )
    parameters = [p for group, _ in groups for p in group]
    averages = [p.detach().clone() for p in parameters] if average else []
    losses = checkpoint.restore(parameters, optimizer, averages, steps=schedule.steps) if checkpoint else []
    if checkpoint and not checkpoint.path.exists():  # before anything else is written: what has begun can go on
        checkpoint.save(parameters, optimizer, losses, averages)
    first = distributed.is_first()
    if first:
        _forget_after(log_path, len(losses))
    started = marked = time.monotonic()
    then = copy(work)
    with (
        log_path.open("a", encoding="utf-8") if first else nullcontext() as log,
        _stop_signals(catch=checkpoint is not None) as stopping,
    ):
        for step in range(len(losses), schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * group["base"] * schedule.factor(step)
            optimizer.zero_grad(set_to_none=True)
            shares = []
            for share in shares_of(step):
                share.backward()  # type: ignore[no-untyped-call]
                shares.append(share.detach())
            # A step may have fewer shares than there are processes.
            total = torch.stack(shares).sum() if shares else torch.zeros((), device=parameters[0].device)
            distributed.sum_gradients(parameters)
            norm = distributed.gradient_norm(parameters).to(total)
            # Asked once a step and of all: a signal reaches one process, and all must save together.
            asked = total.new_full((), float(stopping() > 0))
            # The one wait for the device in a step.
            loss, size, stops = distributed.sums(torch.stack((total, norm, asked)))
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss must be finite, got {loss} at step {step}; lower learning_rate")
            if not math.isfinite(size):
                where = _not_finite(parameters, names)
                raise FloatingPointError(
                    f"gradients must be finite, got {size} as their norm at step {step}, first in {where}; lower "
                    "learning_rate"
                )
            distributed.clip_gradients(parameters, max_grad_norm, norm)
            optimizer.step()
            # Early on the mean of what there is: the start would weigh on a short run for long.
            kept = min(average, len(losses) / (len(losses) + 1))
            for mean, parameter in zip(averages, parameters, strict=False):
                mean.lerp_(parameter.detach(), 1 - kept)
            losses.append(loss)
            if len(losses) % log_every == 0 or len(losses) == schedule.steps:
                recent = losses[-log_every:]
                row = {"step": step + 1, "loss": sum(recent) / len(recent), "seconds": time.monotonic() - started}
                if work and then:
                    taken = time.monotonic() - marked
                    done = [(work.tokens - then.tokens) / taken, (work.flops - then.flops) / taken]
                    of_all = distributed.sums(torch.tensor(done, dtype=torch.float64, device=total.device))
                    row["tokens_per_second"], row["mfu"] = of_all[0], of_all[1] / (peak * distributed.world_size())
                    marked, then = time.monotonic(), copy(work)
                if log is not None:
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    if report:
                        report(row)
            if checkpoint and (len(losses) % checkpoint.every == 0 or len(losses) == schedule.steps or stops):
                checkpoint.save(parameters, optimizer, losses, averages)
            if stops:
                number = signal.Signals(stopping() or signal.SIGTERM)
                if first:
                    notice(
                        f"stopped by {number.name} and saved after step {len(losses)} of {schedule.steps}; the same "
                        "run again goes on from there"
                    )
                raise SystemExit(128 + number)
    with torch.no_grad():
        for parameter, mean in zip(parameters, averages, strict=False):
            parameter.copy_(mean)
    return losses


def _not_finite(parameters: Sequence[nn.Parameter], names: Mapping[nn.Parameter, str]) -> str:
    """Return the parameter that was the first, on the way back, with a gradient that is not finite. All must ask."""
    broken = torch.stack([
        torch.zeros((), device=p.device) if p.grad is None else (~distributed.local(p.grad).isfinite()).any().float()
        for p in parameters
    ])  # fmt: skip
    found = [i for i, count in enumerate(distributed.sums(broken)) if count]
    if not found:
        return "none alone: their squares are too large to add"
    return names.get(parameters[found[-1]], f"parameter {found[-1]} of shape {tuple(parameters[found[-1]].shape)}")


def _forget_after(log_path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and a last one that a crash cut short."""
    if log_path.exists():
        lines = log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
        with whole_file(log_path) as partial:
            partial.write_text(kept, encoding="utf-8")


@contextmanager
def _stop_signals(*, catch: bool) -> Iterator[Callable[[], int]]:
    """Yield what says which of SIGTERM and SIGINT has come, 0 for none, instead of dying of the first. Signals reach
    the main thread alone."""
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT) if catch and is_main}
    before = {kind: handler for kind, handler in before.items() if handler is not signal.SIG_IGN}  # as of nohup, or &

    def restore() -> None:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    def receive(number: int, _: object) -> None:
        received.append(number)
        restore()  # the second one does not wait for the step

    for kind in before:
        signal.signal(kind, receive)
    try:
        yield lambda: received[0] if received else 0
    finally:
        restore()


@contextmanager
def training_kernels(device: torch.device, *, bf16: bool, longest: float = math.inf) -> Iterator[None]:
    """Run what is inside with the kernels that train texts of up to ``longest`` tokens fastest on ``device``.

    ``bf16`` multiplies in bfloat16, which pays on a GPU and on a processor with instructions for it (AVX-512 BF16,
    AMX), and costs a hundredfold on others. Attention is fused, but for short texts on a CPU that was measured to train
    them faster otherwise (``kernels``).
    """
    kept = device.type == "cpu" and longest <= SHORT_TOKENS and keeps_scores(bf16=bf16)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        sdpa_kernel(SDPBackend.MATH) if kept else nullcontext(),
    ):
        yield
