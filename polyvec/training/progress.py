"""How a run went, from its JSONL log: a picture of the loss, and the same for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path


def read_log(log_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]


def draw_losses(log_path: Path, picture: Path) -> None:
    """Draw the loss over the steps as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = read_log(log_path)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker="." if len(rows) < 40 else "")
    axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "polyvec"}):  # the same log, the same file
        figure.savefig(picture, format="svg", metadata={"Date": None})


@contextmanager
def live_tensorboard(log_path: Path, folder: Path) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield what adds a row, the last of the log, to the TensorBoard series in ``folder``, where it is seen at once.

    With the first row come those before it in the log, in place of what ``folder`` holds of a run that was stopped:
    steps that are taken again are in no series twice.
    """
    from torch.utils.tensorboard import SummaryWriter

    with ExitStack() as stack:
        writers: list[SummaryWriter] = []

        def add(row: Mapping[str, float]) -> None:
            rows: list[Mapping[str, float]] = [row]
            if not writers:
                for old in folder.glob("events.out.tfevents.*"):
                    old.unlink()
                writers.append(stack.enter_context(SummaryWriter(str(folder))))
                rows = [*read_log(log_path)]
            for each in rows:
                for name in sorted(each.keys() - {"step"}):
                    writers[0].add_scalar(name, each[name], int(each["step"]))
            writers[0].flush()

        yield add
