"""Texts a second of systems side by side: python benchmarks/speed.py DATA OUT.json MODEL...

Each embeds the same texts once to warm up, then in turns; the figures are medians. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from common import where

from polyvec.atomic import write_json
from polyvec.evaluation.systems import System, open_system
from polyvec.files import read_records

REPEATS = 5
ROWS = 12  # of each language and file


def sample(data: Path) -> list[str]:
    """Return short and long texts in many languages: of similarity, questions and their paragraphs."""
    texts: list[str] = []
    for file, column in (("stsb_dev", "text_a"), ("retrieval_qa", "query"), ("retrieval_qa", "passage")):
        taken: dict[str, int] = {}
        for row in read_records(data / f"dev/{file}.parquet", column=column):
            if taken.setdefault(row["lang"], 0) < (ROWS if column != "passage" else 3):
                taken[row["lang"]] += 1
                texts.append(row[column])
    return texts


def seconds(system: System, texts: list[str]) -> float:
    assert system.encode is not None
    task = "text-matching" if system.prompts else None
    started = time.perf_counter()
    system.encode(texts, task, "")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    systems = [open_system(name) for name in args.models]
    texts = sample(args.data)
    runs: dict[str, list[float]] = {system.name: [] for system in systems}
    for system in systems:
        seconds(system, texts[: len(texts) // 4])
    for _ in range(REPEATS):
        for system in systems:
            runs[system.name].append(seconds(system, texts))
    write_json(
        {
            "texts": len(texts),
            "characters": sum(map(len, texts)),
            "where": where("torch", "sentence-transformers", "numpy"),
            "systems": {
                s.name: {
                    "engine": s.engine,
                    "texts_per_second": len(texts) / statistics.median(runs[s.name]),
                    "seconds": runs[s.name],
                }
                for s in systems
            },
        },
        args.out,
    )
    for name, found in runs.items():
        print(f"{name}: {len(texts) / statistics.median(found):.0f} texts/s of {len(texts)} texts")


if __name__ == "__main__":
    main()
