"""What a teacher buys the base, at polyvec-mini's scale: the same start, texts and steps, with one thing changed.

    python -m recipes.base_ablations --data DATA --teacher FOLDER --work WORK

Every variant starts from one static student (``grow``), whose word table knows the teacher already, and trains the
whole encoder for a few steps on English texts and their translations. A difference is of the mean over the languages,
with a paired 95 % bootstrap interval: of the first variant from the start, of the others from the first. A variant
whose folder is there is not trained again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from polyvec.data.tokenized import TokenizedTexts
from polyvec.evaluation.intervals import compare_means
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import read_suites
from polyvec.evaluation.suites import Score, Suite, score
from polyvec.files import Record
from polyvec.inference.embedder import Embedder
from polyvec.inference.export import export_onnx
from polyvec.model.config import mini
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import save_encoder
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.distill import StaticStudent, co_occurrence_table, grow
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from polyvec.training.teachers import OnnxTeacher, combine
from recipes.mini import translations

_SUITES = {"similarity": "stsb_dev", "bitext": "tico19_bitext", "retrieval": "retrieval_qa"}


def main(
    data: Annotated[Path, typer.Option(help="Folder with train/ and dev/.")],
    teacher: Annotated[Path, typer.Option(help="Folder with tokenizer.json and onnx/model.onnx.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs.")],
    steps: int = 120,
    english: Annotated[int, typer.Option(help="English texts that the teacher embeds.")] = 12_000,
    limit: Annotated[int, typer.Option(help="Development rows of each language.")] = 100,
) -> None:
    """Train every variant, score it, print one JSON line of each."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "start").exists():
        write_inputs(data, teacher, work, english)
    targets, pairs = ((str(work / f"{name}.parquet"),) for name in ("targets", "pairs"))
    distilled = {"stage": "distillation", "data": targets, "others": 2048}
    variants: dict[str, dict[str, Any]] = {
        "distance and relation": distilled,
        "distance alone": {**distilled, "relation": 0.0, "others": 0},
        "relation of the batch alone": {**distilled, "others": 0},
        "no teacher: translations as pairs": {"stage": "pairs", "data": pairs},
    }
    suites = {name: read_suites(data / f"dev/{file}.parquet", limit=limit) for name, file in _SUITES.items()}

    first = measured(work / "start", suites)
    for number, (name, fields) in enumerate(variants.items()):
        folder = work / name.replace(": ", "-").replace(" ", "-")
        if not (folder / "model.safetensors").exists():
            run = Run(
                model=str(work / "start"), output=str(folder), steps=steps, batch_size=128, max_tokens=96,
                learning_rate=1e-3, warmup_steps=20, seed=3, **fields,
            )  # fmt: skip
            run_stage(run)
        results = measured(folder, suites)
        print(json.dumps({"variant": name, **differences(first, results)}), flush=True)
        first = results if number == 0 else first


def write_inputs(data: Path, teacher: Path, work: Path, count: int) -> None:
    """Write the start, what the teacher says of English texts, under each of their translations too, and the pairs."""
    folder = resolve_model_folder(None)
    config = mini()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", **config.tokenizer_ids)
    rows = list(translations(data))
    texts = np.random.default_rng(0).permutation(sorted({row["text_a"] for row in rows}))[:count].tolist()
    vectors = combine([OnnxTeacher(teacher, max_tokens=128).encode(texts)], width=config.hidden_size)
    place = {text: i for i, text in enumerate(texts)}
    pairs = [row for row in rows if row["text_a"] in place]
    targets: list[Record] = [{"text": text, "lang": "en", "embedding": vectors[i]} for i, text in enumerate(texts)]
    targets += [{"text": r["text_b"], "lang": r["lang"], "embedding": vectors[place[r["text_a"]]]} for r in pairs]
    for name, rows_of in (("targets", targets), ("pairs", pairs)):
        pq.write_table(pa.Table.from_pylist(rows_of), work / f"{name}.parquet")
    student = StaticStudent(config)
    known = TokenizedTexts.from_texts([row["text"] for row in targets], tokenizer, max_tokens=96)
    every = np.array([row["embedding"] for row in targets], np.float32)
    table = co_occurrence_table(known, every, np.arange(len(every)), config.vocab_size)
    with torch.no_grad():
        student.table.copy_(10 * table)
    save_encoder(grow(student).eval(), work / "start")
    copy_companions(folder, work / "start")


def measured(folder: Path, suites: Mapping[str, Sequence[Suite]]) -> dict[str, list[Score]]:
    """Return the results of every suite, by kind of suite, of the base of the model in ``folder``."""
    if not (folder / "model.onnx").exists():
        export_onnx(folder, precision="fp32")
    model = Embedder(folder, engine="onnx")

    def encode(texts: Sequence[str], task: str) -> Vectors:
        return np.asarray(model.encode(texts), np.float32)

    return {kind: [score(suite, encode) for suite in parts] for kind, parts in suites.items()}


def differences(first: dict[str, list[Score]], second: dict[str, list[Score]]) -> dict[str, list[float]]:
    """Return, x 100, the mean score of each kind of suite, its difference from ``first`` and the interval of that."""
    found = {}
    for kind, results in second.items():
        gain = compare_means(*([(r.statistic, r.observations) for r in side] for side in (first[kind], results)))
        value = float(np.mean([result.value for result in results]))
        found[kind] = [round(100 * number, 1) for number in (value, gain.value, gain.low, gain.high)]
    return found


if __name__ == "__main__":
    typer.run(main)
