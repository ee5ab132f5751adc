"""The pictures of docs/performance.md, from the tables of benchmarks/results: python benchmarks/plots.py docs/images"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
OURS, THEIRS = "#1f6feb", "#9aa4b2"


@dataclass(frozen=True)
class Table:
    head: list[str]
    rows: list[list[str]]

    def column(self, name: str) -> list[float]:
        """Return the numbers under a head that begins with ``name``."""
        i = next(i for i, head in enumerate(self.head) if head.startswith(name))
        return [float(re.sub(r"[^0-9.]", "", row[i])) for row in self.rows]

    @property
    def names(self) -> list[str]:
        return [row[0] for row in self.rows]


def tables(name: str) -> list[Table]:
    """Return the tables of a file of results, in order."""
    found: list[Table] = []
    before = ""
    for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and set("".join(cells)) <= set("-: "):
            continue
        if cells and not before.startswith("|"):
            found.append(Table(cells, []))
        elif cells:
            found[-1].rows.append(cells)
        before = line
    return found


def bars(axes: Any, names: Sequence[str], values: Sequence[float], label: str) -> None:
    colours = [OURS if "polyvec" in name else THEIRS for name in names]
    axes.barh(range(len(names)), values, color=colours)
    axes.set_yticks(range(len(names)), names)
    for i, value in enumerate(values):
        axes.text(value, i, f" {value:g}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(label)


def cpu(figure: Any) -> None:
    """Tokens a second, of polyvec's, on three instruction sets, and peak memory."""
    axes = figure.subplots(1, 4)
    amx, vnni, avx2 = (tables(f"2026-11-{day}.md")[0] for day in ("26-cpu-amx", "24-cpu-vnni", "27-cpu-avx2"))
    bars(axes[0], amx.names, amx.column("tokens/s"), "tokens/s, polyvec is 1 (AMX)")
    bars(axes[1], amx.names, amx.column("peak MB"), "peak MB (AMX)")
    bars(axes[2], vnni.names, vnni.column("tokens/s"), "tokens/s, polyvec is 1 (AVX-512 VNNI)")
    bars(axes[3], avx2.names, avx2.column("tokens/s"), "tokens/s, polyvec is 1 (AVX2)")


def large(figure: Any) -> None:
    """The 570M shape: tokens a second, peak memory, and memory against length."""
    left, middle, right = figure.subplots(1, 3)
    systems, lengths = tables("2026-11-26-large.md")
    bars(left, systems.names, systems.column("tokens/s"), "tokens/s, polyvec-int8 is 1")
    bars(middle, systems.names, systems.column("peak MB"), "peak MB")
    right.plot(lengths.column("tokens"), lengths.column("peak MB"), marker="o", color=OURS)
    right.set(xscale="log", xlabel="tokens of one text", ylabel="peak MB, int8", ylim=(0, None))


def scaling(figure: Any) -> None:
    """Time against length, batch, number of texts and adapters."""
    first, second, third, fourth = figure.subplots(1, 4)
    length, batch, _, adapters = tables("2026-11-25-scaling.md")
    texts = tables("2026-11-26-scaling.md")[0]
    for engine in ("onnx-int8", "onnx-float32", "torch-float32"):
        first.plot(length.column("n"), length.column(f"{engine} ms"), marker="o", label=engine)
    first.set(xscale="log", yscale="log", xlabel="tokens of one text", ylabel="ms a thousand tokens")
    for engine in ("onnx-int8", "onnx-float32"):
        second.plot(batch.column("B"), batch.column(engine), marker="o", label=engine)
    second.set(xscale="log", xlabel="texts of 64 tokens in a batch", ylabel="ms a text", ylim=(0, None))
    third.plot(texts.column("texts"), texts.column("CPU ms"), marker="o", label="onnx-int8")
    third.set(xscale="log", xlabel="texts of 12 tokens", ylabel="CPU ms a text", ylim=(0, None))
    for kind in ("batch names one", "names five", "names all"):
        fourth.plot(adapters.column("resident"), adapters.column(kind), marker="o", label=kind.replace("batch ", ""))
    fourth.set(xlabel="resident adapters", ylabel="time, one of five is 1", ylim=(0, None))
    for axes in (first, second, third, fourth):
        axes.legend(frameon=False)


def mixed_tasks(figure: Any) -> None:
    """Time of a batch over that without adapters."""
    axes = figure.subplots()
    table = tables("2026-11-26-cpu-amx.md")[1]
    kinds = table.head[1:]
    for i, row in enumerate(table.rows):
        places = [j + 0.2 * i for j in range(len(kinds))]
        axes.bar(places, [float(cell) for cell in row[1:]], width=0.18, label=row[0])
    axes.set_xticks([j + 0.3 for j in range(len(kinds))], kinds)
    axes.set(ylabel="time, no adapters is 1")
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def training(figure: Any) -> None:
    """Memory and time of a step, of training the whole model."""
    for axes, table, shape in zip(
        figure.subplots(1, 2), tables("2026-11-25-training.md"), ("6 x 384", "12 x 768"), strict=True
    ):
        for i, name in enumerate(("of the whole model", "time a step")):
            places = [j + 0.4 * i for j in range(len(table.rows))]
            axes.barh(places, table.column(name), height=0.35, label=("memory", "time")[i])
        axes.set_yticks([j + 0.2 for j in range(len(table.rows))], table.names)
        axes.invert_yaxis()
        axes.set(xlabel=f"{shape}, whole model is 1")
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def gpu(figure: Any) -> None:
    """An H200: tokens a second by lengths, what five tasks cost, and where the time of a pass goes."""
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
    rate, tasks, job, _, kernels, *_ = tables("2026-11-26-gpu.md")
    mixes = list(dict.fromkeys(rate.names))
    for i, system in enumerate(("polyvec, compiled", "polyvec, eager")):
        values = [float(row[4]) for row in rate.rows if row[1] == system]
        left.barh([j + 0.4 * i for j in range(len(mixes))], values, height=0.35, label=system)
    left.set_yticks([j + 0.2 for j in range(len(mixes))], mixes)
    left.invert_yaxis()
    left.axvline(1, color=THEIRS)
    left.set_xlabel("tokens/s, transformers is 1")
    left.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    named = [
        (f"{row[0]}, {texts} texts", row[4])
        for table, texts in ((tasks, 1024), (job, 8192))
        for row in table.rows
        if row[1] == "five"
    ]
    bars(middle, [name for name, _ in named], [float(value) for _, value in named], "time of five tasks, none is 1")
    columns = kernels.head[1:]
    starts = [0.0] * len(columns)
    for row in kernels.rows[:-1]:
        values = [0.0 if cell == "-" else float(cell) for cell in row[1:]]
        right.barh(range(len(columns)), values, left=starts, label=row[0])
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    right.set_yticks(range(len(columns)), columns)
    right.invert_yaxis()
    right.set_xlabel("ms of 16,384 tokens")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def serving(figure: Any) -> None:
    """Throughput beside peers, by length of text, and of the engine alone."""
    axes = figure.subplots(1, 4)
    found = tables("2026-11-26-serving.md")
    compared, alone = found[0], found[3]  # the last run beside the engine
    for i, mix in enumerate(("short", "mixed", "long")):
        rows = [row[2:] for row in compared.rows if row[:2] == [mix, "16"]]
        own = Table(compared.head[2:], rows)
        names = [
            name.replace(" + ", "\n").replace("polyvec, five tasks and none in turn", "polyvec, all tasks")
            for name in own.names
        ]
        bars(axes[i], names, own.column("tokens/s"), f"tokens/s, polyvec is 1 ({mix}, 16 clients)")
    one = Table(alone.head, [row for row in alone.rows if row[1:3] == ["1", "none"]])
    for i, kind in enumerate(("same cores", "a core for the engine")):
        places = [j + 0.4 * i for j in range(len(one.rows))]
        axes[3].barh(places, one.column(kind), height=0.35, label=kind)
    axes[3].set_yticks([j + 0.2 for j in range(len(one.rows))], one.names)
    axes[3].invert_yaxis()
    axes[3].set_xlabel("% of encode alone (64 clients)")
    axes[3].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)


def batch(figure: Any) -> None:
    """A job in one process and on Ray, and beside Ray Data with sentence-transformers."""
    left, right = figure.subplots(1, 2)
    alone, beside = tables("2026-11-25-batch.md")
    bars(left, [f"polyvec, {name}" for name in alone.names], alone.column("rows/s"), "texts/s, 13 tokens each, 100,000")
    bars(right, beside.names, beside.column("rows/s"), "texts/s, with the start, 20,000")


#: Width and height in inches.
PICTURES: dict[Callable[[Any], None], tuple[float, float]] = {
    cpu: (19, 2.6), large: (15, 2.6), gpu: (19, 3), scaling: (19, 3.6), mixed_tasks: (7, 3), training: (13, 2.6),
    serving: (19, 2.6), batch: (14, 2.4),
}  # fmt: skip


def main(folder: Path) -> None:
    plt.rcParams.update(
        {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "polyvec", "svg.fonttype": "none"}
    )
    for draw, size in PICTURES.items():
        figure = plt.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / f"{draw.__name__.replace('_', '-')}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
