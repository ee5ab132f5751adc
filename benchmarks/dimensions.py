"""Curves of score against bytes a vector, from results of polyvec evaluate: the pictures of docs/dimensions.md.

    polyvec evaluate retrieval_qa.parquet stsb_dev.parquet --limit 200 --json --dimensions 384 --dimensions 256 ... \\
        --dtype float32 --dtype int8 --dtype binary > results.json
    python benchmarks/dimensions.py results.json docs/images/dimensions.svg

A point is the mean over languages, as a share of the widest float32 vector's.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TITLES = {"retrieval": "questions to passages (nDCG@10)", "sts": "similarity (Spearman)"}
COLOURS = {"float32": "#1f77b4", "int8": "#e07b00", "binary": "#2a8c2a"}
Key = tuple[str, str, int]  # kind, dtype, dimensions


def means(rows: list[dict]) -> dict[Key, tuple[int, float]]:
    """Return bytes a vector and the mean score over languages of each kind, dtype and width."""
    scores, sizes = defaultdict(list), {}
    for row in rows:
        key = (row["kind"], row["dtype"], row["dimensions"])
        scores[key].append(row["score"])
        sizes[key] = row["bytes_per_vector"]
    return {key: (sizes[key], sum(own) / len(own)) for key, own in scores.items()}


def main() -> None:
    source, picture = map(Path, sys.argv[1:])
    found = means(json.loads(source.read_text(encoding="utf-8"))["results"])
    widest = max(width for _, _, width in found)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "polyvec", "font.size": 10})
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), sharey=True)
    for panel, (kind, title) in zip(panels, TITLES.items(), strict=True):
        whole = found[kind, "float32", widest][1]
        print(f"| {title} | bytes | share |\n|---|---|---|")
        for dtype, colour in COLOURS.items():
            widths = sorted(width for k, d, width in found if (k, d) == (kind, dtype))
            points = [found[kind, dtype, width] for width in widths]
            panel.plot([p[0] for p in points], [100 * p[1] / whole for p in points], "o-", color=colour, label=dtype)
            for width, (size, score) in zip(widths, points, strict=True):
                panel.annotate(
                    str(width), (size, 100 * score / whole), xytext=(3, -11), textcoords="offset points", fontsize=8
                )
                print(f"| {dtype}, {width} | {size} | {100 * score / whole:.1f} |")
        panel.set_xscale("log", base=2)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("bytes a vector")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"% of float32, {widest} dimensions")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
