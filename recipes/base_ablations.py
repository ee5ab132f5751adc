"""What each choice buys the base, at polyvec-mini's scale: the same start, texts and steps, with one thing changed.

    python -m recipes.base_ablations prepare --data DATA --teacher st:FOLDER --work WORK
    python -m recipes.base_ablations run --work WORK --device cuda --seconds 40
    python -m recipes.base_ablations table --work WORK

Every variant starts from one static student (``grow``), whose word table knows the teacher already, and trains the
whole encoder on English texts and their translations. The number of steps is what the first variant does in
``--seconds``, or ``--steps``. ``prepare`` and ``table`` need no GPU; what ``run`` reads is small enough to be sent to
one, 20 MB, and what ``table`` reads is one file, ``observations.npz``. A variant that is in it is not trained again.

A difference is of the mean over the languages, with a paired 95 % bootstrap interval: of the first variant from the
start, of those with a field of the loss over pairs from pairs without it, of the others from the first.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer

from polyvec.data.tokenized import TokenizedTexts
from polyvec.errors import InputError
from polyvec.evaluation.intervals import STATISTICS, Observations, compare_means
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import read_suites
from polyvec.evaluation.suites import Encode, Suite, score
from polyvec.evaluation.systems import open_system
from polyvec.files import Record
from polyvec.inference.embedder import Embedder
from polyvec.inference.quantize import unit
from polyvec.model.config import mini
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions
from polyvec.model.weights import save_encoder
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.distill import StaticStudent, co_occurrence_table, grow
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from polyvec.training.teachers import combine
from recipes.ablations import check_only
from recipes.mini_texts import translations

app = typer.Typer(help=__doc__, no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Folder of the runs.")]
Results = dict[str, list[tuple[str, Observations]]]

_SUITES = {"similarity": "stsb_dev", "bitext": "tico19_bitext", "retrieval": "retrieval_qa"}
_FORMS: dict[str, Callable[[Vectors], Vectors]] = {
    "": lambda vectors: vectors,
    ", 64 dimensions": lambda vectors: unit(vectors[:, :64]),
    ", bits": lambda vectors: unit(np.sign(vectors - 1e-12)),
}
_START = "the start"
_TARGETS, _PAIRS = "targets", "pairs"
_DISTILLED = {"stage": "distillation", "data": (_TARGETS,), "others": 2048}
_PAIRED = {"stage": "pairs", "data": (_PAIRS,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "distance and relation": _DISTILLED,
    "distance alone": {**_DISTILLED, "relation": 0.0, "others": 0},
    "relation within the batch alone": {**_DISTILLED, "others": 0},
    "through a matrix": {**_DISTILLED, "projection": True},
    "averaged weights, 0.99": {**_DISTILLED, "average": 0.99},
    "no teacher: translations as pairs": _PAIRED,
    "the same with orthogonality 1": {**_PAIRED, "orthogonality": 1.0},
    "the same with hardness 5": {**_PAIRED, "hardness": 5.0},
    "the same with guard 0.1": {**_PAIRED, "guard": 0.1},
}
_FIRST, _PLAIN_PAIRS = "distance and relation", "no teacher: translations as pairs"
_TRIAL = 40  # steps that tell how long one takes: two reports of the loop


@app.command()
def prepare(
    data: Annotated[Path, typer.Option(help="Folder with train/ and dev/.")],
    teacher: Annotated[str, typer.Option(help="A model, as `polyvec evaluate` takes it: st:FOLDER for a peer.")],
    work: Work,
    english: Annotated[int, typer.Option(help="English texts that the teacher embeds.")] = 12_000,
) -> None:
    """Write what ``run`` reads: texts with their translations, the teacher's vectors, development sets."""
    (work / "dev").mkdir(parents=True, exist_ok=True)
    for file in _SUITES.values():
        shutil.copyfile(data / f"dev/{file}.parquet", work / f"dev/{file}.parquet")
    rows = list(translations(data))
    texts = np.random.default_rng(0).permutation(sorted({row["text_a"] for row in rows}))[:english].tolist()
    embed = open_system(teacher).encode
    if embed is None:
        raise InputError(f"teacher must be a model that gives vectors, got {teacher}")
    vectors = combine([embed(texts, None, "")], width=mini().hidden_size)
    np.save(work / "teacher.npy", vectors.astype(np.float16))
    pq.write_table(pa.table({"text": texts}), work / "english.parquet", compression="zstd")
    known = set(texts)
    pairs = [row for row in rows if row["text_a"] in known]
    pq.write_table(pa.Table.from_pylist(pairs), work / "translations.parquet", compression="zstd")


@app.command()
def run(
    work: Work,
    device: Annotated[str, typer.Option(help="cpu, or cuda, where products are in bfloat16.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Training time of the first variant; all take as many steps.")] = 300.0,
    steps: Annotated[int, typer.Option(help="Of each variant, in place of what fits into the time.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts or pairs a step.")] = 128,
    limit: Annotated[int, typer.Option(help="Development rows of each language.")] = 100,
    only: Annotated[list[str] | None, typer.Option(help="A variant; repeat it. All if left out.")] = None,
) -> None:
    """Train and score every variant."""
    if device != ("cuda" if torch.cuda.is_available() else "cpu"):
        raise InputError(f"device must be what training takes here, got {device}")
    check_only(only, VARIANTS)
    records = read_records(work)
    if not (work / "start" / "model.safetensors").exists():
        write_start(work, records[_TARGETS])
    suites = {name: read_suites(work / f"dev/{file}.parquet", limit=limit) for name, file in _SUITES.items()}
    found = read_observations(work)

    def training(fields: Mapping[str, Any], output: Path, steps: int) -> Run:
        return Run(
            model=str(work / "start"), output=str(output), steps=steps, batch_size=batch_size, max_tokens=96,
            part_tokens=32_768 if device == "cuda" else 2048, learning_rate=1e-3, warmup_steps=max(1, steps // 20),
            seed=3, bf16=device == "cuda", save_every=steps, **fields,
        )  # fmt: skip

    if not steps:
        steps = fitting_steps(training(_DISTILLED, work / "trial", _TRIAL), records, seconds)
    if _START not in found:
        save_observations(work, found, _START, measured(work / "start", device, suites))
    for name in only or VARIANTS:
        if name in found:
            continue
        output = work / "".join(c if c.isalnum() else "-" for c in name)
        shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped, with other steps perhaps
        started = time.monotonic()
        losses = run_stage(training(VARIANTS[name], output, steps), records=records)
        taken = time.monotonic() - started
        typer.echo(f"{name}: {steps} steps, {taken:.0f} s, loss {losses[0]:.3f} to {np.mean(losses[-10:]):.3f}")
        save_observations(work, found, name, measured(output, device, suites))


@app.command()
def table(work: Work) -> None:
    """Print every score x 100 and how it differs, as a table in Markdown."""
    found = read_observations(work)
    names = [name for name in VARIANTS if name in found]
    if missing := [name for name in dict.fromkeys([_START, _FIRST, *map(baseline_of, names)]) if name not in found]:
        raise InputError(f"{work} must hold results of {' and '.join(missing)}, got none; give `run` first")
    kinds = list(found[_START])
    print("| |" + "".join(f" {kind} |" for kind in kinds) + "\n|---|" + "---|" * len(kinds))
    print(f"| {_START} |" + "".join(f" {100 * _mean(found[_START][kind]):.1f} |" for kind in kinds))
    for name in names:
        results, baseline = found[name], found[baseline_of(name)]
        cells = []
        for kind in kinds:
            gain = compare_means(baseline[kind], results[kind])
            ends = f"{100 * gain.value:+.1f}, {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
            cells.append(f"{100 * _mean(results[kind]):.1f} ({ends})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def baseline_of(name: str) -> str:
    """Return what a variant differs from in one thing, or the first for pairs alone."""
    if name == _FIRST:
        return _START
    return _PLAIN_PAIRS if VARIANTS[name].items() > _PAIRED.items() else _FIRST


def read_records(work: Path) -> dict[str, list[Record]]:
    """Return what the variants learn from: the teacher's vectors, of translations that of the English; and pairs."""
    vectors = np.load(work / "teacher.npy").astype(np.float32)
    texts = pq.read_table(work / "english.parquet").column("text").to_pylist()
    place = {text: i for i, text in enumerate(texts)}
    pairs = pq.read_table(work / "translations.parquet").to_pylist()
    targets: list[Record] = [{"text": text, "lang": "en", "embedding": vectors[i]} for i, text in enumerate(texts)]
    targets += [{"text": r["text_b"], "lang": r["lang"], "embedding": vectors[place[r["text_a"]]]} for r in pairs]
    return {_TARGETS: targets, _PAIRS: pairs}


def write_start(work: Path, targets: Sequence[Record]) -> None:
    """Write an encoder that computes what a word table of the mean targets does."""
    folder, config = resolve_model_folder(None), mini()
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", **config.tokenizer_ids)
    texts = TokenizedTexts.from_texts([row["text"] for row in targets], tokenizer, max_tokens=96)
    vectors = torch.from_numpy(np.array([row["embedding"] for row in targets], np.float32))
    student = StaticStudent(config)
    with torch.no_grad():
        # Ten times: layer norm takes the scale away, and gradients of a table this small would be huge.
        student.table.copy_(10 * co_occurrence_table(texts, vectors, np.arange(len(vectors)), config.vocab_size))
    save_encoder(grow(student).eval(), work / "start")
    copy_companions(folder, work / "start")


def fitting_steps(trial: Run, records: Mapping[str, list[Record]], seconds: float) -> int:
    """Return how many steps of ``trial`` fit into ``seconds``, by the second half of it."""
    shutil.rmtree(trial.output, ignore_errors=True)
    rows: list[dict[str, float]] = []
    run_stage(trial, records=records, report=rows.append)
    a_step = (rows[-1]["seconds"] - rows[-2]["seconds"]) / (rows[-1]["step"] - rows[-2]["step"])
    return max(20, int(seconds / a_step))


def measured(folder: Path, device: str, suites: Mapping[str, Sequence[Suite]]) -> Results:
    """Return the observations of every suite in every form, of the base of the model in ``folder``."""
    model = Embedder(folder, engine="torch", device=device)
    known: dict[tuple[str, ...], Vectors] = {}

    def encode(texts: Sequence[str], task: str) -> Vectors:
        if tuple(texts) not in known:
            known[tuple(texts)] = np.asarray(model.encode(texts), np.float32)
        return known[tuple(texts)]

    def of_form(form: Callable[[Vectors], Vectors]) -> Encode:
        return lambda texts, task: form(encode(texts, task))

    results: Results = {}
    for kind, parts in suites.items():
        for name, form in _FORMS.items():
            scores = [score(suite, of_form(form)) for suite in parts]
            results[kind + name] = [(s.statistic, s.observations) for s in scores]
    return results


def _mean(results: Sequence[tuple[str, Observations]]) -> float:
    return float(np.mean([STATISTICS[statistic](rows) for statistic, rows in results]))


def save_observations(work: Path, found: dict[str, Results], name: str, results: Results) -> None:
    """Add a variant's results to ``found`` and write all of them to ``observations.npz``."""
    found[name] = results
    arrays = {
        "|".join((variant, kind, statistic, str(i))): rows
        for variant, of_variant in found.items()
        for kind, scores in of_variant.items()
        for i, (statistic, rows) in enumerate(scores)
    }
    np.savez_compressed(work / "observations.npz", **arrays)  # type: ignore[arg-type]


def read_observations(work: Path) -> dict[str, Results]:
    path = work / "observations.npz"
    found: dict[str, Results] = {}
    if path.exists():
        with np.load(path) as arrays:
            for key in arrays.files:
                variant, kind, statistic, _ = key.split("|")
                found.setdefault(variant, {}).setdefault(kind, []).append((statistic, arrays[key]))
    return found


if __name__ == "__main__":
    app()
