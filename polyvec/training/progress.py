"""How a run went, from its JSONL log: a picture of the loss, and the same for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def read_log(log_path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]


def draw_losses(log_path: Path, picture: Path) -> None:
    """Draw the loss over the steps as SVG."""
    rows = read_log(log_path)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], marker="." if len(rows) < 40 else "")
    axes.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": "polyvec"}):  # the same log, the same file
        figure.savefig(picture, format="svg", metadata={"Date": None})


def write_tensorboard(log_path: Path, folder: Path) -> None:
    """Write every number of the log as a TensorBoard series, in place of what the folder held of this run before."""
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for row in read_log(log_path):
            for name in row.keys() - {"step"}:
                writer.add_scalar(name, row[name], int(row["step"]))
