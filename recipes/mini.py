"""polyvec-mini: the whole run, stage by stage.

The weights in the package are its second version: the first one's encoder (this file at commit 78a3a2c), gone on from
with ``--like`` and ``--start``. docs/experiments.md has what was tried and what it brought.

    python -m recipes.mini vocabulary --data DATA --work WORK
    python -m recipes.mini prepare --data DATA --teachers FOLDER --teachers FOLDER --work WORK --like MODEL
    python -m recipes.mini distil --work WORK --start MODEL --steps 1350 --learning-rate 4e-4 --bf16
    python -m recipes.mini adapters --work WORK --data DATA --bf16
    python -m recipes.mini finish --work WORK --data DATA --teacher FOLDER

MODEL is an earlier polyvec-mini to go on from, ``polyvec/weights/mini`` for one. Without one, leave out ``--like`` and
``--start``, and run stage ``static`` before ``distil``.

DATA holds ``train/parallel.parquet`` (en, text, lang, source), ``train/pairs.parquet`` and the other files that its
README describes. Each teacher folder holds ``tokenizer.json`` and ``onnx/model.onnx``. Every stage reads what the one
before left in WORK.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from polyvec.data.filters import overlaps
from polyvec.data.tokenized import TokenizedTexts
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import read_suites
from polyvec.evaluation.suites import Encode, score
from polyvec.files import Record
from polyvec.inference.batching import plan_batches
from polyvec.inference.embedder import Embedder
from polyvec.inference.export import export_onnx
from polyvec.inference.quantize import unit
from polyvec.model.config import mini
from polyvec.model.encoder import Encoder
from polyvec.model.pooling import mean_pool
from polyvec.model.weights import load_encoder, save_encoder
from polyvec.tasks import NO_ADAPTER
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.adapters import switch_dropout_off
from polyvec.training.checkpoint import Checkpoint
from polyvec.training.distill import StaticStudent, co_occurrence_table, distillation_loss, grow
from polyvec.training.loop import Schedule, fast_short_texts, train
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from polyvec.training.teachers import OnnxTeacher, combine, rotate_like
from polyvec.training.vocabulary import balanced_sample, train_unigram

app = typer.Typer(help="Train polyvec-mini.", no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Folder of this run.")]
BFloat16 = Annotated[bool, typer.Option(help="Multiply in bfloat16; for processors with instructions for it.")]
Data = Annotated[Path, typer.Option(help="Folder with train/*.parquet.")]

#: How often a source is drawn against its size: interface strings are many, short and formulaic.
SOURCE_WEIGHTS = {
    "tatoeba": 2.0, "odoo": 0.6, "libreoffice-help": 0.7, "ms-edgeai-beginners": 0.5, "ms-iot-beginners": 0.5,
}  # fmt: skip
MAX_CHARACTERS = 300  # longer paragraphs cost most of the teacher's time and are cut by its context anyway
SMOOTHING = 0.6  # a language is drawn in proportion to its texts to this power
ENGLISH_SHARE = 0.25  # of the draws; at a tenth, English similarity fell by 3.5 points (docs/experiments.md)
PROMPTED_SHARE = 0.4  # of the texts in distillation; without any, prompts move every vector (docs/experiments.md)
SMALLEST_LANGUAGE = 300_000  # characters; below it a language takes characters from the table and gives nothing
_WORD = re.compile(r"[^\W\d_]{2}")


@app.command()
def vocabulary(data: Data, work: Work) -> None:
    """Stage 0: ``tokenizer.json`` from all running text of the languages that have enough of it."""
    work.mkdir(parents=True, exist_ok=True)
    parallel = pq.read_table(data / "train/parallel.parquet").to_pydict()
    texts: dict[str, list[str]] = {"en": sorted(set(parallel["en"]))}
    sources = [(parallel["lang"], parallel["text"])]
    for name, columns in (("text", ["text"]), ("pairs", ["query", "passage"])):
        table = pq.read_table(data / f"train/{name}.parquet").to_pydict()
        sources += [(table["lang"], table[column]) for column in columns]
    for langs, rows in sources:
        for lang, row in zip(langs, rows, strict=True):
            texts.setdefault(lang, []).append(row[:2000])
    texts = {lang: rows for lang, rows in texts.items() if sum(map(len, rows)) > SMALLEST_LANGUAGE}
    tokenizer = train_unigram(balanced_sample(texts, budget_chars=16_000_000), vocab_size=mini().vocab_size)
    tokenizer.save(str(work / "tokenizer.json"))


@app.command()
def prepare(
    data: Data,
    teachers: Annotated[list[Path], typer.Option(help="Teacher folders; their cosines are averaged.")],
    work: Work,
    like: Annotated[
        Path | None, typer.Option(help="A student to go on from: the targets are turned into its space.")
    ] = None,
) -> None:
    """Stage 1: embed the English side with the teachers, tokenise every translation of it."""
    parallel = pq.read_table(data / "train/parallel.parquet").to_pydict()
    english = english_texts(data, parallel["en"])
    targets = combine([OnnxTeacher(t, max_tokens=128).encode(english, batch_tokens=2048) for t in teachers], width=384)
    if like is not None:
        some = np.random.default_rng(1).permutation(len(english))[:20_000]
        targets = rotate_like(targets, some, Embedder(like, engine="onnx").encode([english[i] for i in some]))
    np.save(work / "targets.npy", targets.astype(np.float16))
    tokenise(parallel, english, work)


def english_texts(data: Path, parallel_english: list[str]) -> list[str]:
    """Return the English texts that the teachers embed: the parallel side, and general-domain text beside it."""
    pairs = [r for r in pq.read_table(data / "train/pairs.parquet").to_pylist() if r["lang"] == "en"]
    graded = [r for r in pq.read_table(data / "train/sts.parquet").to_pylist() if r["lang"] == "en"]
    labelled = pq.read_table(data / "train/classification.parquet").to_pylist()
    spoken = pq.read_table(data / "train/text.parquet").to_pylist()
    texts = {t for t in parallel_english if len(t) <= MAX_CHARACTERS and _WORD.search(t)}
    texts |= {r[side] for r in graded for side in ("text_a", "text_b")}
    texts |= {r["text"] for r in labelled if r["lang"] == "en"}
    texts |= {r["text"] for r in spoken if r["lang"] == "en" and r["source"] == "common-voice"}
    texts |= {r["query"] for r in pairs}
    chosen = np.random.default_rng(0).permutation(len(pairs))[:12_000]
    return sorted(texts | {pairs[i]["passage"][:500] for i in chosen})


def tokenise(parallel: dict[str, list[str]], english: list[str], work: Path) -> None:
    """Write ids of every translation and of the English itself, with the row of the target that each one learns."""
    tokenizer = open_tokenizer(work)
    row_of = {text: i for i, text in enumerate(english)}
    kept = [i for i, text in enumerate(parallel["en"]) if text in row_of]
    texts = [parallel["text"][i] for i in kept] + english
    rows = [row_of[parallel["en"][i]] for i in kept] + list(range(len(english)))
    sizes = Counter(parallel["lang"][i] for i in kept)
    weights = [
        SOURCE_WEIGHTS.get(parallel["source"][i], 1.0) * sizes[parallel["lang"][i]] ** (SMOOTHING - 1) for i in kept
    ]
    weights += [sum(weights) * ENGLISH_SHARE / (1 - ENGLISH_SHARE) / len(english)] * len(english)
    TokenizedTexts.from_texts(texts, tokenizer, max_tokens=128).save(work / "texts.npz")
    np.savez(work / "rows.npz", rows=np.array(rows), weights=np.array(weights, np.float64))


def open_tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.from_file(work / "tokenizer.json", **mini().tokenizer_ids)


class Distillation:
    """Batches of texts with their teacher's targets; the texts of one batch all have different targets."""

    def __init__(self, work: Path, batch_size: int, *, num_others: int, seed: int, prompted_share: float) -> None:
        """``num_others`` targets of texts outside the batch stand beside it, to be told apart from.

        ``prompted_share`` of the texts have a task's prompt before them; their targets have none, so that the student
        learns to look past prompts.
        """
        self.texts = TokenizedTexts.load(work / "texts.npz")
        self.targets: NDArray[np.float32] = np.load(work / "targets.npy").astype(np.float32)
        with np.load(work / "rows.npz") as arrays:
            self.rows: NDArray[np.int64] = arrays["rows"]
            self.edges = np.cumsum(arrays["weights"])
        self.batch_size, self.num_others, self.seed = batch_size, num_others, seed
        self.prompted_share = prompted_share
        tokenizer = open_tokenizer(work)
        self.prompts = [np.array(tokenizer.encode(p).input_ids[1:-1]) for p in mini().prompts.values() if p]

    def parts(self, step: int, *, part_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ids (N,), offsets (B+1,) and targets (P, D), the B own ones first, of parts of like length.

        A function of the step alone, so that a run can resume.
        """
        rng = np.random.default_rng((self.seed, step))
        draws = rng.random(self.batch_size) * self.edges[-1]
        chosen = np.searchsorted(self.edges, draws, side="right")
        rows, first = np.unique(self.rows[chosen], return_index=True)
        chosen = chosen[first]
        others = np.setdiff1d(rng.integers(len(self.targets), size=self.num_others), rows)
        which = rng.integers(len(self.prompts), size=len(rows))
        none = np.empty(0, np.int32)
        prompts = [self.prompts[i] if rng.random() < self.prompted_share else none for i in which]
        lengths = self.texts.lengths[chosen] + [len(p) for p in prompts]
        for plan in plan_batches(lengths.tolist(), batch_tokens=part_tokens):
            bank = np.concatenate((rows[plan], np.delete(rows, plan), others))
            packed = self.texts.pack(chosen[plan], [prompts[i] for i in plan])
            yield (*packed, torch.from_numpy(self.targets[bank]))

    def shares(
        self, step: int, embed: Callable[[Tensor, Tensor], Tensor], *, dims: Sequence[int], part_tokens: int
    ) -> Iterator[Tensor]:
        """Yield the shares of the step's loss, where ``embed`` maps ids and offsets to (B, D)."""
        for ids, cu_seqlens, targets in self.parts(step, part_tokens=part_tokens):
            loss = distillation_loss(embed(ids, cu_seqlens), targets, dims=dims, relation=0.2, temperature=0.05)
            yield loss * ((len(cu_seqlens) - 1) / self.batch_size)


@app.command()
def static(work: Work, steps: int = 800, batch_size: int = 2048, learning_rate: float = 0.01) -> None:
    """Stage 2: the word table alone."""
    torch.manual_seed(0)
    config = mini()
    data = Distillation(work, batch_size, num_others=0, seed=1, prompted_share=0)
    student = StaticStudent(config)
    student.table.data.copy_(co_occurrence_table(data.texts, data.targets, data.rows, config.vocab_size) * 10)

    def shares(step: int) -> Iterator[Tensor]:
        return data.shares(step, student, dims=config.matryoshka_dims, part_tokens=1_000_000)

    groups = [([student.table], 1.0), ([student.scale, student.shift], 0.2)]
    train(groups, shares, Schedule(steps=steps, learning_rate=learning_rate), log_path=work / "static.jsonl")
    save_encoder(grow(student), work / "static")


@app.command()
def distil(
    work: Work,
    start: str = "static",
    steps: int = 600,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    save_every: int = 100,
    seed: int = 2,
    bf16: BFloat16 = False,
) -> None:
    """Stage 3: the whole encoder. The same command again goes on where a stopped run was."""
    torch.manual_seed(1)
    started = load_encoder(work / start)
    encoder = Encoder(started.config).train()  # adapters of an older base do not fit the one that comes out
    base = {name: tensor for name, tensor in started.state_dict().items() if ".lora_" not in name}
    encoder.load_state_dict(encoder.state_dict() | base)
    switch_dropout_off(encoder)
    data = Distillation(work, batch_size, num_others=4096, seed=seed, prompted_share=PROMPTED_SHARE)
    table = [p for n, p in encoder.named_parameters() if n.startswith("embeddings.") and "lora" not in n]
    layers = [p for n, p in encoder.named_parameters() if n.startswith("layers.") and "lora" not in n]

    def embed(ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        no_task = torch.full((len(cu_seqlens) - 1,), NO_ADAPTER)
        with fast_short_texts(bf16=bf16):
            return mean_pool(encoder(ids, cu_seqlens, no_task), cu_seqlens)

    def shares(step: int) -> Iterator[Tensor]:
        return data.shares(step, embed, dims=encoder.config.matryoshka_dims, part_tokens=2048)

    groups = [(table, 0.3), (layers, 1.0)]
    schedule = Schedule(steps=steps, learning_rate=learning_rate)
    run = {"stage": "distil", "start": start, "batch_size": batch_size, "seed": seed, "bf16": bf16, **asdict(schedule)}
    checkpoint = Checkpoint(work / "distil.safetensors", every=save_every, run=run)
    train(groups, shares, schedule, log_path=work / "distil.jsonl", checkpoint=checkpoint)
    save_encoder(encoder, work / "distil")
    print(json.dumps({"stage": "distil", "steps": steps, "start": start}))


@app.command()
def adapters(
    work: Work,
    data: Data,
    bf16: BFloat16 = False,
) -> None:
    """Stage 4: the five adapters over the frozen base, one task after the other."""
    search, equals = work / "search.parquet", work / "translations.parquet"
    pq.write_table(pa.Table.from_pylist(list(search_pairs(data))), search)
    pq.write_table(pa.Table.from_pylist(list(translations(data))), equals)
    graded, labelled = data / "train/sts.parquet", data / "train/classification.parquet"
    # Every third retrieval batch is of translations: without them the two adapters forget that languages share a space.
    # Text-matching at 80 steps or fewer translations, or at half the rate, and classification at twice its rate, were
    # worse on the development sets (docs/experiments.md).
    runs: dict[str, dict[str, Any]] = {
        "retrieval": {"data": (search, equals), "shares": (2.0, 1.0), "batch_size": 80},
        "text-matching": {"data": (graded, equals), "shares": (3.0, 1.0), "batch_size": 48},
        "classification": {
            "data": (labelled,), "batch_size": 64, "negatives": 0, "steps": 60, "learning_rate": 1e-3,
        },
        "separation": {"data": (labelled,), "batch_size": 96, "learning_rate": 1e-3},
    }  # fmt: skip
    model = work / "distil"
    (work / "distil/tokenizer.json").write_bytes((work / "tokenizer.json").read_bytes())
    for seed, (stage, fields) in enumerate(runs.items(), start=3):
        settings = {"steps": 50, "learning_rate": 2e-3, **fields, "data": tuple(map(str, fields["data"]))}
        run = Run(
            stage=stage,
            model=str(model),
            output=str(work / stage),
            max_tokens=160,
            bf16=bf16,
            seed=seed,
            **settings,
        )
        losses = run_stage(run, report=lambda row: print(json.dumps(row), flush=True))
        print(json.dumps({"stage": stage, "loss": [losses[0], losses[-1]]}), flush=True)
        model = work / stage


def search_pairs(data: Path) -> Iterator[Record]:
    """Yield pairs of groups that have 300, and a quarter of the package descriptions, which are formulaic."""
    rows = [
        r
        for i, r in enumerate(pq.read_table(data / "train/pairs.parquet").to_pylist())
        if not overlaps(r["query"], r["passage"]) and (r["source"] != "debian-descriptions" or i % 4 == 0)
    ]
    sizes = Counter((r["lang"], r["source"]) for r in rows)
    yield from (r for r in rows if sizes[r["lang"], r["source"]] >= 300)


def translations(data: Path) -> Iterator[Record]:
    """Yield English sentences with a translation, of languages that have 1,000."""
    parallel = pq.read_table(data / "train/parallel.parquet").to_pylist()
    rows = [r for r in parallel if 30 < len(r["en"]) <= MAX_CHARACTERS]
    sizes = Counter(r["lang"] for r in rows)
    yield from ({"text_a": r["en"], "text_b": r["text"], "lang": r["lang"]} for r in rows if sizes[r["lang"]] >= 1000)


@app.command()
def finish(
    work: Work,
    data: Annotated[Path, typer.Option(help="Folder with dev/*.parquet.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher to compare with.")],
    output: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("polyvec/weights/mini"),
    pairs: Annotated[int, typer.Option(help="Development rows per language; 0 is all.")] = 400,
) -> None:
    """Stage 5: half-precision weights, both ONNX graphs, int8 ranges, scores and the model card."""
    save_encoder(load_encoder(work / "separation"), output, dtype=torch.float16)
    shutil.copyfile(work / "tokenizer.json", output / "tokenizer.json")
    parity = {name: asdict(export_onnx(output, precision=name)) for name in ("fp32", "int8")}
    sample = pq.read_table(data / "train/parallel.parquet", columns=["text"]).column("text").to_pylist()
    chosen = np.random.default_rng(8).choice(len(sample), size=4096, replace=False)
    Embedder(output, engine="onnx").calibrate([sample[i] for i in chosen])
    scores = measure(output, data / "dev", teacher, pairs)
    (output / "README.md").write_text(model_card(scores, parity, pairs), encoding="utf-8")
    (work / "scores.json").write_text(json.dumps(scores, indent=2))


def measure(model: Path, dev: Path, teacher: Path, pairs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return score -> system -> language -> number, on the first ``pairs`` rows of each language; 0 is all."""
    int8, exact = (Embedder(model, engine=engine) for engine in ("onnx-int8", "onnx"))
    english = OnnxTeacher(teacher, max_tokens=256)
    embedded: dict[tuple[str, str | None, tuple[str, ...]], Vectors] = {}

    def system(engine: Embedder = int8, *, adapter: bool = True, dimensions: int | None = None) -> Encode:
        def encode(texts: Sequence[str], task: str) -> Vectors:
            key = (engine.engine.name, task if adapter else None, tuple(texts))
            if key not in embedded:  # once for every width: a narrow vector is the cut and rescaled wide one
                embedded[key] = engine.encode(texts, task=key[1])
            return unit(embedded[key][:, :dimensions])

        return encode

    def teach(texts: Sequence[str], task: str) -> Vectors:
        return english.encode(texts)

    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, file in (
        ("similarity", "stsb_dev"),
        ("bitext", "tico19_bitext"),
        ("retrieval", "retrieval_qa"),
        ("classification", "clinc150"),
    ):
        systems = {"teacher": teach, "base": system(adapter=False), "adapter": system()}
        if name in ("similarity", "retrieval"):
            systems["adapter, 128 dimensions"] = system(dimensions=128)
            systems["adapter, 64 dimensions"] = system(dimensions=64)
        if name == "similarity":
            systems["adapter, float32 weights"] = system(exact)
        suites = read_suites(dev / f"{file}.parquet", limit=pairs)
        scores[name] = {
            title: {suite.group or "en": score(suite, encode).value for suite in suites}
            for title, encode in systems.items()
        }
        print(name, {title: round(float(np.mean(list(row.values()))), 4) for title, row in scores[name].items()})
    return scores


def model_card(scores: dict[str, dict[str, dict[str, float]]], parity: dict[str, dict[str, float]], pairs: int) -> str:
    """Return the card's text: the fixed part from ``mini_card.md`` with tables of the measured numbers."""
    parts = []
    for name, systems in scores.items():
        languages = list(next(iter(systems.values())))
        parts.append(f"### {name.capitalize()}\n")
        parts.append("| | mean | " + " | ".join(languages) + " |")
        parts.append("|---|---|" + "---|" * len(languages))
        for system, row in systems.items():
            numbers = [float(np.mean(list(row.values()))), *row.values()]
            parts.append(f"| {system} | " + " | ".join(f"{100 * n:.1f}" for n in numbers) + " |")
        parts.append("")
    card = Path(__file__).with_name("mini_card.md").read_text(encoding="utf-8")
    values = {
        "rows": str(pairs),
        "tables": "\n".join(parts),
        "fp32": f"{parity['fp32']['max_abs_error']:.0e}",
        "int8": f"{parity['int8']['min_cosine']:.4f}",
    }
    for key, value in values.items():
        card = card.replace("{" + key + "}", value)
    return card


if __name__ == "__main__":
    app()
