"""What each choice of the recipe buys, at polyvec-mini's scale: the same run with one thing changed, side by side.

    python -m recipes.ablations --data DATA --work WORK [--rated rated.jsonl]

Every variant starts from polyvec-mini's base with fresh adapters and trains the retrieval adapters alone. A difference
is of the mean over all development queries, with a paired 95 % bootstrap interval. A variant whose folder is there is
not trained again. With ``--rated`` (recipes/rated_arguments.py) there are failure cases of quality too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer

from polyvec.data.failure_cases import Case, entity_cases, overlap_cases, polar_cases, quality_cases
from polyvec.errors import InputError
from polyvec.evaluation.intervals import Observations, compare, interval
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import read_suites
from polyvec.evaluation.suites import Encode, score
from polyvec.files import Record, read_records
from polyvec.inference.embedder import Embedder
from polyvec.inference.export import export_onnx
from polyvec.inference.quantize import unit
from polyvec.model.encoder import Encoder
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.tasks import TASK_PROMPTS
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from recipes.mini_texts import search_pairs, translations

QUERY, PASSAGE = "retrieval.query", "retrieval.passage"
_HELD_OUT = 300  # cases of each kind that no run learns from
_LEARNED = 2000


@dataclass(frozen=True)
class Variant:
    """One run: the fields in which it differs, the base that it starts from, and how its vectors are asked for."""

    fields: dict[str, Any]
    base: str = "prompts"
    stage: str = "retrieval"
    prefixed: bool = False  # the prompt is part of the training texts: one adapter with two prompts

    def encode(self, model: Embedder) -> Encode:
        def with_prompt(texts: Sequence[str], task: str) -> Vectors:
            if self.stage == "retrieval":
                return _array(model.encode(texts, task=task))
            prompt = TASK_PROMPTS[task] if self.prefixed else ""
            return _array(model.encode([prompt + text for text in texts], task=self.stage))

        return with_prompt


def main(
    data: Annotated[Path, typer.Option(help="Folder with train/ and dev/.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs.")],
    steps: int = 40,
    limit: Annotated[int, typer.Option(help="Development queries of each language.")] = 100,
    bf16: Annotated[bool, typer.Option(help="Multiply in bfloat16; for processors with instructions for it.")] = False,
    rated: Annotated[Path | None, typer.Option(help="Answers with a quality, of which cases are made too.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="A variant; repeat it. All if left out.")] = None,
) -> None:
    """Train every variant, score it, print one JSON line of each."""
    search, equals, cases, sides, prefixed = (
        str(work / f"{name}.parquet") for name in ("search", "translations", "cases", "sides", "prefixed")
    )
    mixed = {"data": (search, equals), "shares": (2.0, 1.0)}
    variants = {
        "two adapters, prompts": Variant(mixed),
        "two adapters, no prompts": Variant(mixed, base="no prompts"),
        "one adapter, prompts": Variant({**mixed, "data": (prefixed, equals)}, stage="text-matching", prefixed=True),
        "one adapter, no prompts": Variant({**mixed, "data": (sides, equals)}, stage="text-matching"),
        "orthogonality 1": Variant({**mixed, "orthogonality": 1.0}),
        "hardness 5": Variant({**mixed, "hardness": 5.0}),
        "guard 0.1": Variant({**mixed, "guard": 0.1}),
        "average 0.9": Variant({**mixed, "average": 0.9}),
        "failure cases": Variant({"data": (search, equals, cases), "shares": (2.0, 1.0, 1.0)}),
    }
    check_only(only, variants)
    work.mkdir(parents=True, exist_ok=True)
    write_bases(work)
    held_out = write_data(data, work, rated)
    suites = read_suites(data / "dev/retrieval_qa.parquet", limit=limit)

    def measure(encode: Encode) -> Observations:
        return np.concatenate([score(suite, encode).observations for suite in suites])

    def scored(encode: Encode) -> dict[str, Observations]:
        found = {kind: measure(of_kind) for kind, of_kind in forms(encode).items()}
        return found | {f"{kind} cases": won(cases, encode) for kind, cases in held_out.items()}

    base = Embedder(work / "prompts", engine="onnx")
    untrained = scored(remembering(lambda texts, task: _array(base.encode(texts))))
    print(json.dumps({"variant": "the base", **report(untrained, {})}), flush=True)
    first = next(iter(variants))
    scores: dict[str, dict[str, Observations]] = {}
    for name in [name for name in variants if name == first or not only or name in only]:
        variant = variants[name]
        model = trained(name, replace(variant, fields={**variant.fields, "bf16": bf16}), work, steps)
        scores[name] = scored(remembering(variant.encode(model)))
        baseline = untrained if name == first else scores[first]
        print(json.dumps({"variant": name, **report(scores[name], baseline)}), flush=True)


def forms(encode: Encode) -> dict[str, Encode]:
    """Return a model's vectors whole, cut to 32 numbers, and as bits."""
    return {
        "float32": encode,
        "32 dimensions": lambda texts, task: unit(encode(texts, task)[:, :32]),
        "binary": lambda texts, task: unit(np.sign(encode(texts, task) - 1e-12)),
    }


def _array(vectors: Any) -> Vectors:
    return np.asarray(vectors, np.float32)


def report(scores: dict[str, Observations], baseline: dict[str, Observations]) -> dict[str, Any]:
    """Return each score x 100 with its interval, and its difference from the baseline's with the interval of that."""
    found: dict[str, Any] = {}
    for name, rows in scores.items():
        found[name] = [round(100 * v, 1) for v in (float(rows.mean()), *interval(rows, "mean"))]
        if name in baseline:
            difference = compare(baseline[name], rows, "mean")
            found[f"{name}, difference"] = [
                round(100 * v, 1) for v in (difference.value, difference.low, difference.high)
            ]
    return found


def trained(name: str, variant: Variant, work: Path, steps: int) -> Embedder:
    """Return the model of a variant, trained unless it was before."""
    output = work / name.replace(", ", "-").replace(" ", "-")
    if not (output / "model.onnx").exists():
        run = Run(
            stage=variant.stage, model=str(work / variant.base), output=str(output), steps=steps, batch_size=64,
            max_tokens=96, learning_rate=2e-3, seed=3, **variant.fields,
        )  # fmt: skip
        run_stage(run)
        export_onnx(output, precision="fp32")
    return Embedder(output, engine="onnx")


def check_only(only: Sequence[str] | None, variants: Iterable[str]) -> None:
    """Raise ``InputError`` for a name that is no variant's."""
    names = list(variants)
    if unknown := [name for name in only or () if name not in names]:
        raise InputError(f"only must be one of {', '.join(names)}, got {unknown[0]}")


def write_bases(work: Path) -> None:
    """Write polyvec-mini with adapters that change nothing yet, with the prompts of retrieval and without."""
    started = load_encoder(resolve_model_folder(None))
    for name, prompts in (
        ("prompts", started.config.prompts),
        ("no prompts", dict.fromkeys(started.config.prompts, "")),
    ):
        if (work / name).exists():
            continue
        encoder = Encoder(replace(started.config, prompts=prompts))
        base = {key: tensor for key, tensor in started.state_dict().items() if ".lora_" not in key}
        encoder.load_state_dict(encoder.state_dict() | base)
        save_encoder(encoder.eval(), work / name)
        copy_companions(resolve_model_folder(None), work / name)
        export_onnx(work / name, precision="fp32")


def write_data(data: Path, work: Path, rated: Path | None) -> dict[str, list[Case]]:
    """Write what the variants learn from; return the failure cases that none learns from."""
    pairs = list(search_pairs(data))
    sides = [{"text_a": r["query"], "text_b": r["passage"], "lang": r["lang"], "source": r["source"]} for r in pairs]
    prefixed = [
        {**r, "text_a": TASK_PROMPTS[QUERY] + r["text_a"], "text_b": TASK_PROMPTS[PASSAGE] + r["text_b"]} for r in sides
    ]
    learned, held_out = failure_cases(data, pairs, rated)
    tables: dict[str, list[Record]] = {
        "search": pairs,
        "translations": list(translations(data)),
        "sides": sides,
        "prefixed": prefixed,
        "cases": learned,
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), work / f"{name}.parquet")
    return held_out


def failure_cases(
    data: Path, pairs: Sequence[Record], rated: Path | None
) -> tuple[list[Record], dict[str, list[Case]]]:
    """Return cases to learn from and cases held out, of each kind, from texts that no two of them share."""
    rng = np.random.default_rng(0)
    titles = [r for r in pairs if r["source"] != "debian-descriptions"]
    chosen = [(titles[i]["query"], titles[i]["passage"]) for i in rng.permutation(len(titles))[:12_000]]
    tokenizer = Embedder(engine="onnx").tokenizer
    ids = [[e.input_ids[1:-1].tolist() for e in tokenizer.tokens_batch(list(pair), ["", ""])] for pair in chosen]
    inferences = pq.read_table(data / "train/nli.parquet").to_pylist()
    premises = sorted({r["premise"] for r in inferences})
    for_test = {premises[i] for i in rng.permutation(len(premises))[: len(premises) // 5]}
    parts: dict[str, Callable[[bool], list[Case]]] = {
        "overlap": lambda test: list(overlap_cases(_half(chosen, test), [(a, b) for a, b in _half(ids, test)])),
        "entities": lambda test: list(entity_cases(_half(chosen, test))),
        "polar": lambda test: list(polar_cases(r for r in inferences if (r["premise"] in for_test) == test)),
    }
    if rated is not None:
        answers = sorted(read_records(rated, column="query"), key=lambda row: row["query"])
        questions = sorted({row["query"] for row in answers})  # so that the sides of a debate are in one part
        own = set(_half(questions, True))
        parts["quality"] = lambda test: list(quality_cases(r for r in answers if (r["query"] in own) == test))
    learned: list[Record] = []
    held_out = {}
    for kind, build in parts.items():
        held_out[kind] = _some(build(True), _HELD_OUT, rng)
        learned += [{**case.to_record(), "source": kind} for case in _some(build(False), _LEARNED, rng)]
    return learned, held_out


def _half(rows: list[Any], test: bool) -> list[Any]:
    return rows[: len(rows) // 4] if test else rows[len(rows) // 4 :]


def _some(cases: list[Case], count: int, rng: np.random.Generator) -> list[Case]:
    return [cases[i] for i in sorted(rng.permutation(len(cases))[:count].tolist())]


def won(cases: Sequence[Case], encode: Encode) -> Observations:
    """Return for each case 1 where the answer comes first, else 0. (n, 1)."""
    queries = encode([case.query for case in cases], QUERY)
    texts = [text for case in cases for text in (case.passage, *case.negatives)]
    passages = encode(texts, PASSAGE)
    edges = np.cumsum([0, *(1 + len(case.negatives) for case in cases)])
    return np.array(
        [[float((passages[a:b] @ query).argmax() == 0)] for query, a, b in zip(queries, edges, edges[1:], strict=False)]
    )


def remembering(encode: Encode) -> Encode:
    """Return ``encode`` with every text embedded once: a narrow vector is cut from the wide one."""
    known: dict[tuple[str, tuple[str, ...]], Vectors] = {}

    def remembered(texts: Sequence[str], task: str) -> Vectors:
        key = (task, tuple(texts))
        if key not in known:
            known[key] = encode(texts, task)
        return known[key]

    return remembered


if __name__ == "__main__":
    typer.run(main)
