"""Tokens a second of a training step: polyvec train against the trainers that people use, same weights, same texts.

    python benchmarks/training_throughput.py [--texts 4000] [--batch 32] [--steps 8] [--repeats 3]

Masked words: transformers' ``Trainer`` over its own JinaEmbeddingsV3 (whole batch padded, dynamic padding). Pairs:
sentence-transformers' trainer with MultipleNegativesRankingLoss in both directions under MatryoshkaLoss, and with the
cached form of it, which like ours needs the memory of one part. All in float32, dropout off, AdamW, texts of log-normal
length. A token is one that a text has: padding counts for nobody, and what is embedded twice counts once. Every run is
its own process, repeats alternate, and the first steps are not timed. Before anything is, the pair trainers must give
one batch the same loss. Needs the ``dev`` extra, accelerate and datasets.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import where

WAYS = {
    "masked words": ("polyvec", "transformers Trainer"),
    "pairs": ("polyvec", "sentence-transformers", "sentence-transformers, cached"),
}
SKIPPED = 2  # steps before the clock starts
DIMS = (32, 64, 128, 256, 384)
TEMPERATURE = 0.05


def write_inputs(folder: Path, count: int, seed: int = 0) -> None:
    """Write polyvec-mini as transformers reads it, texts, and pairs of texts, each of log-normal length."""
    from polyvec import Embedder
    from polyvec.model.weights import load_encoder, save_hf
    from polyvec.samples import corpus

    mini = Embedder().folder
    save_hf(load_encoder(mini), folder / "hf", mini / "tokenizer.json")
    rng = np.random.default_rng(seed)
    words = [word for row in corpus() for word in row["text"].split()]
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, 2 * count), 4, 240) / 2  # about two tokens a word
    texts = [" ".join(rng.choice(words, int(length) + 1)) for length in lengths]
    for name, rows in (
        ("texts", [{"text": text} for text in texts[:count]]),
        ("pairs", [{"query": a, "passage": b} for a, b in zip(texts[:count], texts[count:], strict=True)]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def polyvec_run(stage: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from polyvec.training import stages
    from polyvec.training.run import Run

    data = str(folder / ("texts.jsonl" if stage == "mlm" else "pairs.jsonl"))
    steps = options.steps + SKIPPED
    with tempfile.TemporaryDirectory() as output:
        run = Run(
            stage=stage, data=(data,), output=str(Path(output) / "out"), steps=steps, batch_size=options.batch,
            max_tokens=256, learning_rate=1e-5, save_every=steps,
        )  # fmt: skip
        marks: list[tuple[float, int]] = []
        step = stages.train

        def watched(groups: Any, shares: Any, *args: Any, work: Any, **kwargs: Any) -> list[float]:
            def timed(number: int) -> Any:
                marks.append((time.perf_counter(), work.tokens))
                return shares(number)

            losses = step(groups, timed, *args, work=work, **{**kwargs, "checkpoint": None})
            marks.append((time.perf_counter(), work.tokens))
            return losses

        stages.train = watched
        losses = stages.run_stage(run)
    (started, before), (ended, after) = marks[SKIPPED], marks[-1]
    return {"tokens_per_second": (after - before) / (ended - started), "first_loss": losses[0]}


def clock(counts: list[int]) -> Any:
    """Return a callback of transformers' trainers that knows the tokens a second after the first steps.

    ``counts`` are the tokens of each batch so far: batches are fetched ahead of their steps.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.marks: list[float] = []
            self.losses: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
            self.losses += [logs["loss"]] if "loss" in logs else []

        def result(self) -> dict[str, float]:
            tokens = sum(counts[SKIPPED : len(self.marks) - 1])
            return {"tokens_per_second": tokens / (self.marks[-1] - self.marks[SKIPPED]), "first_loss": self.losses[0]}

    return Clock()


def arguments_of(kind: Any, output: str, options: argparse.Namespace, **more: Any) -> Any:
    return kind(
        output_dir=output, max_steps=options.steps + SKIPPED, per_device_train_batch_size=options.batch,
        learning_rate=1e-5, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, **more,
    )  # fmt: skip


def trainer_mlm(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from datasets import load_dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        JinaEmbeddingsV3ForMaskedLM,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = JinaEmbeddingsV3ForMaskedLM.from_pretrained(
        folder / "hf", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    data = load_dataset("json", data_files=str(folder / "texts.jsonl"), split="train")
    data = data.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=256), batched=True, remove_columns=["text"]
    )
    counts: list[int] = []

    class Counting(DataCollatorForLanguageModeling):
        def torch_call(self, examples: Any) -> Any:
            counts.append(sum(len(e["input_ids"]) for e in examples))
            return super().torch_call(examples)

    watch = clock(counts)
    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model, arguments_of(TrainingArguments, output, options, dataloader_num_workers=0), train_dataset=data,
            data_collator=Counting(tokenizer, mlm_probability=0.3), callbacks=[watch],
        ).train()  # fmt: skip
    return watch.result()


def trainer_pairs(folder: Path, options: argparse.Namespace, *, cached: bool) -> dict[str, float]:
    from datasets import load_dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    words = Transformer(str(folder / "hf"), max_seq_length=256, config_kwargs=still)
    model = SentenceTransformer(modules=[words, Pooling(384), Normalize()], device="cpu")
    both: dict[str, Any] = {
        "scale": 1 / TEMPERATURE,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    inner = (
        losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=16, **both)
        if cached
        else losses.MultipleNegativesRankingLoss(model, **both)
    )
    weight = 2 / len(DIMS)  # theirs is the mean of the two directions, ours their sum
    loss = losses.MatryoshkaLoss(model, inner, list(DIMS), matryoshka_weights=[weight] * len(DIMS))
    data = load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train")
    counts: list[int] = []
    watch = clock(counts)
    with tempfile.TemporaryDirectory() as output:
        trainer = SentenceTransformerTrainer(
            model, arguments_of(SentenceTransformerTrainingArguments, output, options), train_dataset=data, loss=loss,
            callbacks=[watch],
        )  # fmt: skip
        collate = trainer.data_collator

        class Counting(type(collate)):  # type: ignore[misc]
            def __call__(self, features: Any) -> Any:
                batch = super().__call__(features)
                masks = (mask for name, mask in batch.items() if name.endswith("attention_mask"))
                counts.append(sum(int(mask.sum()) for mask in masks))
                return batch

        collate.__class__ = Counting
        trainer.train()
    return watch.result()


def measure(job: str, way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    if way == "polyvec":
        return polyvec_run("mlm" if job == "masked words" else "pairs", folder, options)
    if job == "masked words":
        return trainer_mlm(folder, options)
    return trainer_pairs(folder, options, cached=way.endswith("cached"))


def run_one(job: str, way: str, folder: str) -> dict[str, float]:
    """Return what ``measure`` does, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", job, way, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job}, {way}:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("texts", 4000), ("batch", 32), ("steps", 8), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=3, metavar=("JOB", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        job, way, folder = options.one
        print(json.dumps(measure(job, way, Path(folder), options)))
        return
    with tempfile.TemporaryDirectory() as inputs, tempfile.TemporaryDirectory() as one_batch:
        write_inputs(Path(inputs), options.texts)
        write_inputs(Path(one_batch), options.batch)
        losses = {way: run_one("pairs", way, one_batch)["first_loss"] for way in WAYS["pairs"]}
        if max(losses.values()) - min(losses.values()) > 1e-3:
            sys.exit(f"the trainers must agree on one batch, got losses {losses}")
        runs: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(options.repeats):
            for job, ways in WAYS.items():
                for way in ways:
                    runs.setdefault((job, way), []).append(run_one(job, way, inputs))
    print(where("torch", "transformers", "sentence-transformers"))
    print(f"polyvec-mini, {options.batch} texts or pairs a step, {options.steps} steps, {options.repeats} repeats\n")
    print(f"Loss of one batch of pairs: {', '.join(f'{way} {loss:.4f}' for way, loss in losses.items())}\n")
    print("| job | trainer | tokens a second, of polyvec's | slowest and fastest repeat |")
    print("|---|---|---|---|")
    for (job, way), measured in runs.items():
        ours = median(run["tokens_per_second"] for run in runs[job, "polyvec"])
        speeds = sorted(run["tokens_per_second"] / ours for run in measured)
        print(f"| {job} | {way} | {median(speeds):.2f} | {speeds[0]:.2f} to {speeds[-1]:.2f} |")


if __name__ == "__main__":
    main()
