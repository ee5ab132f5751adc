"""Tokens a second of a training step: polyvec train against the trainers that people use, same weights, same texts.

    python benchmarks/training_throughput.py [--texts 4000] [--batch 32] [--steps 8] [--repeats 3]
    python benchmarks/training_throughput.py --device cuda --shapes mini 570m

Masked words: transformers' ``Trainer`` over its own JinaEmbeddingsV3 (whole batch padded, dynamic padding). Pairs:
sentence-transformers' model and its MultipleNegativesRankingLoss in both directions under MatryoshkaLoss, and its
cached form, which like ours needs the memory of one part, in that same ``Trainer``, from which sentence-transformers'
own derives (and needs the package ``datasets``). Dropout off, AdamW, texts of log-normal length; float32 on a CPU,
bfloat16 by autocast on a GPU. A token is one that a text has: padding counts for nobody, and what is embedded twice
counts once, in tokens and in MFU, whose peak is that of square products in this run. The first steps are not timed.
Before anything is, the pair trainers must give one batch the same loss. The 570M shape has random weights.

On a CPU every run is its own process. On a GPU, where a process takes as long to start as to measure, all are one.
Repeats alternate; a GPU, which nobody shares, gets one. Needs the ``train`` extra, transformers, sentence-transformers
and accelerate.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import randomise, where

WAYS = {
    "masked words": ("polyvec", "transformers Trainer"),
    "pairs": ("polyvec", "sentence-transformers", "sentence-transformers, cached"),
}
#: Texts or pairs a step on a GPU, as many as let the peers, who keep what ours computes again, fit into 80 GB.
GPU_BATCHES = {"tiny": (64, 64), "mini": (256, 256), "570m": (32, 64)}
SKIPPED = 2  # steps before the clock starts
MAX_TOKENS = 256
TEMPERATURE = 0.05


class Stopped(Exception):
    """The steps are done; what a run does after them is not measured."""


def write_inputs(folder: Path, count: int, shape: str, device: str, seed: int = 0) -> None:
    """Write a model as polyvec and as transformers read it, texts, and pairs of texts, each of log-normal length."""
    import torch

    from polyvec.model.config import ModelConfig, tiny
    from polyvec.model.encoder import Encoder
    from polyvec.model.hub import resolve_model_folder
    from polyvec.model.weights import load_encoder, save_encoder, save_hf

    mini = resolve_model_folder(None)
    if shape == "mini":
        encoder = load_encoder(mini)
    else:
        torch.manual_seed(0)
        with torch.device("meta"):
            encoder = Encoder(ModelConfig() if shape == "570m" else tiny(vocab_size=40_000))
        encoder = encoder.to_empty(device=device)  # a GPU draws half a billion numbers at once
        randomise(encoder)
    (folder / "ours").mkdir()
    save_encoder(encoder, folder / "ours")
    (folder / "ours" / "tokenizer.json").write_bytes((mini / "tokenizer.json").read_bytes())
    save_hf(encoder, folder / "hf", mini / "tokenizer.json")
    write_texts(folder, count, seed)


def write_texts(folder: Path, count: int, seed: int = 0) -> None:
    from polyvec.samples import corpus

    rng = np.random.default_rng(seed)
    words = [word for row in corpus() for word in row["text"].split()]
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, 2 * count), 4, 240) / 2  # about two tokens a word
    texts = [" ".join(rng.choice(words, int(length) + 1)) for length in lengths]
    rows = {
        "texts": [{"text": text} for text in texts[:count]],
        "pairs": [{"query": a, "passage": b} for a, b in zip(texts[:count], texts[count:], strict=True)],
    }
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def read_rows(folder: Path) -> Any:
    return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def result(marks: list[float], tokens: list[int], flops: list[float], losses: list[float]) -> dict[str, float]:
    """Return the rates of the steps after the first ones. ``marks`` has one more time than there are steps."""
    seconds = marks[-1] - marks[SKIPPED]
    count = len(marks) - 1  # batches are fetched ahead of their steps
    return {
        "tokens_per_second": sum(tokens[SKIPPED:count]) / seconds,
        "flops_per_second": sum(flops[SKIPPED:count]) / seconds,
        "first_loss": losses[0],
    }


def polyvec_run(job: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    from polyvec.training import stages
    from polyvec.training.run import Run

    stage, name = ("mlm", "texts") if job == "masked words" else ("pairs", "pairs")
    steps = options.steps + SKIPPED
    marks: list[float] = []
    done: list[tuple[int, float]] = []
    train = stages.train

    def watched(groups: Any, shares: Any, *args: Any, work: Any, **kwargs: Any) -> Any:
        def timed(number: int) -> Any:
            marks.append(time.perf_counter())
            done.append((work.tokens, work.flops))
            return shares(number)

        losses = train(groups, timed, *args, work=work, **{**kwargs, "checkpoint": None})
        synchronize(options.device)
        marks.append(time.perf_counter())
        done.append((work.tokens, work.flops))
        raise Stopped(losses)

    stages.train = watched
    try:
        with tempfile.TemporaryDirectory() as output:
            run = Run(
                stage=stage, model=str(folder / "ours"), data=(name,), output=str(Path(output) / "out"), steps=steps,
                batch_size=options.batch, max_tokens=MAX_TOKENS, learning_rate=1e-5, save_every=steps,
                part_tokens=options.part_tokens, bf16=options.device == "cuda",
            )  # fmt: skip
            stages.run_stage(run, records=read_rows(folder))
        raise AssertionError("train was not called")
    except Stopped as stopped:
        tokens, flops = (np.diff([one[i] for one in done]).tolist() for i in (0, 1))
        return result(marks, tokens, flops, stopped.args[0])
    finally:
        stages.train = train


def synchronize(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class Watch:
    """What a peer's run does: its batches, by their lengths, and, as a callback of its trainer, its steps."""

    def __init__(self, config: Any, device: str) -> None:
        from transformers import TrainerCallback

        from polyvec.training.utilisation import Work, head_flops

        self.config, self.device, self._work, self._head_flops = config, device, Work, head_flops
        self.tokens: list[int] = []
        self.flops: list[float] = []
        self.marks: list[float] = []
        self.losses: list[float] = []
        watch = self

        class Clock(TrainerCallback):
            def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
                watch.marks.append(time.perf_counter())

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                synchronize(watch.device)
                watch.marks.append(time.perf_counter())

            def on_log(self, *args: Any, logs: dict[str, float], **kwargs: Any) -> None:
                watch.losses += [logs["loss"]] if "loss" in logs else []

        self.callback = Clock()

    def count(self, lengths: list[int], hidden: int = 0) -> None:
        work = self._work()
        work.add(self.config, lengths, trains_base=True)
        self.tokens.append(work.tokens)
        self.flops.append(work.flops + 3 * self._head_flops(self.config, hidden))

    def result(self) -> dict[str, float]:
        return result(self.marks, self.tokens, self.flops, self.losses)


def arguments_of(output: str, options: argparse.Namespace) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=output, max_steps=options.steps + SKIPPED, per_device_train_batch_size=options.batch,
        learning_rate=1e-5, use_cpu=options.device == "cpu", bf16=options.device == "cuda", report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=options.device == "cuda",
    )  # fmt: skip


def trainer_mlm(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, JinaEmbeddingsV3ForMaskedLM, Trainer

    from polyvec.model.layouts import read_config

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    model = JinaEmbeddingsV3ForMaskedLM.from_pretrained(
        folder / "hf", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dtype=torch.float32
    )
    texts = [row["text"] for row in read_rows(folder)["texts"]]
    rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=MAX_TOKENS)["input_ids"]]
    watch = Watch(read_config(folder / "ours"), options.device)

    class Counting(DataCollatorForLanguageModeling):
        def torch_call(self, examples: Any) -> Any:
            batch = super().torch_call(examples)
            watch.count([len(e["input_ids"]) for e in examples], int((batch["labels"] != -100).sum()))
            return batch

    with tempfile.TemporaryDirectory() as output:
        Trainer(
            model, arguments_of(output, options), train_dataset=rows,
            data_collator=Counting(tokenizer, mlm_probability=0.3), callbacks=[watch.callback],
        ).train()  # fmt: skip
    return watch.result()


def trainer_pairs(folder: Path, options: argparse.Namespace, *, cached: bool) -> dict[str, float]:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import Trainer

    from polyvec.model.layouts import read_config

    config = read_config(folder / "ours")
    dims = [*config.matryoshka_dims]
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    words = Transformer(
        str(folder / "hf"), max_seq_length=MAX_TOKENS, config_kwargs=still, model_kwargs={"dtype": torch.float32}
    )
    model = SentenceTransformer(modules=[words, Pooling(config.hidden_size), Normalize()], device=options.device)
    both: dict[str, Any] = {
        "scale": 1 / TEMPERATURE,
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    }
    inner = (
        losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=options.mini_batch, **both)
        if cached
        else losses.MultipleNegativesRankingLoss(model, **both)
    )
    weight = 2 / len(dims)  # theirs is the mean of the two directions, ours their sum
    loss = losses.MatryoshkaLoss(model, inner, dims, matryoshka_weights=[weight] * len(dims))
    watch = Watch(config, options.device)

    def collate(rows: list[dict[str, str]]) -> dict[str, Any]:
        sides = {side: model.preprocess([row[side] for row in rows]) for side in ("query", "passage")}
        watch.count([int(n) for side in sides.values() for n in side["attention_mask"].sum(1)])
        return sides

    class PairTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            value = loss([inputs["query"], inputs["passage"]], None)
            return (value, {}) if return_outputs else value

    with tempfile.TemporaryDirectory() as output:
        PairTrainer(
            model, arguments_of(output, options), train_dataset=read_rows(folder)["pairs"], data_collator=collate,
            callbacks=[watch.callback],
        ).train()  # fmt: skip
    return watch.result()


def measure(job: str, way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    if way == "polyvec":
        return polyvec_run(job, folder, options)
    if job == "masked words":
        return trainer_mlm(folder, options)
    return trainer_pairs(folder, options, cached=way.endswith("cached"))


def run_one(job: str, way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return what ``measure`` does: on a CPU in a process of its own, on a GPU here, with the peak of its memory."""
    if options.device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            measured = measure(job, way, folder, options)
        except torch.OutOfMemoryError as error:
            print(f"{job}, {way}: {error}", file=sys.stderr)
            return {"tokens_per_second": 0.0, "flops_per_second": 0.0, "peak_mb": float("inf"), "first_loss": np.nan}
        return {**measured, "peak_mb": torch.cuda.max_memory_allocated() / 2**20}
    values = {name: getattr(options, name) for name in ("batch", "steps", "part_tokens", "mini_batch", "device")}
    command = [sys.executable, __file__, "--one", json.dumps([job, way, str(folder), values])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job}, {way}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_shape(shape: str, options: argparse.Namespace) -> None:
    """Measure every trainer on one shape and print its rows."""
    import torch

    from polyvec.training.utilisation import measured_peak

    on_gpu = options.device == "cuda"
    memory = "/dev/shm" if on_gpu else None  # the weights are read by every run
    batches = GPU_BATCHES[shape] if on_gpu else (32, 32)
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        folder = Path(temporary)
        write_inputs(folder, options.batch or max(batches), shape, options.device)
        options_of = {
            job: argparse.Namespace(**{**vars(options), "batch": options.batch or batch})
            for job, batch in zip(WAYS, batches, strict=True)
        }
        one_batch = argparse.Namespace(**{**vars(options_of["pairs"]), "steps": 1})
        write_texts(folder, one_batch.batch)
        losses = {way: run_one("pairs", way, folder, one_batch)["first_loss"] for way in WAYS["pairs"]}
        known = [loss for loss in losses.values() if loss == loss]
        if max(known) - min(known) > (0.02 if on_gpu else 1e-4) * max(known):
            sys.exit(f"the trainers must agree on one batch, got losses {losses}")
        write_texts(folder, options.texts)
        runs: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(options.repeats):
            for job, ways in WAYS.items():
                for way in ways:
                    runs.setdefault((job, way), []).append(run_one(job, way, folder, options_of[job]))
    peak = measured_peak(torch.device(options.device), bf16=on_gpu)
    print(f"\n{shape}, {options.steps} steps, {options.repeats} repeats; products {peak / 1e12:.3g} TFLOP/s. ", end="")
    print(f"Loss of one batch of pairs: {', '.join(f'{way} {loss:.4f}' for way, loss in losses.items())}\n")
    print("| job | a step | trainer | tokens/s | of polyvec's | slowest and fastest repeat | MFU | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for (job, way), measured in runs.items():
        own = median(run["tokens_per_second"] for run in runs[job, "polyvec"])
        speeds = sorted(run["tokens_per_second"] / own for run in measured)
        tokens, flops = (median(run[key] for run in measured) for key in ("tokens_per_second", "flops_per_second"))
        megabytes = f"{measured[-1]['peak_mb']:,.0f}" if on_gpu else ""
        print(
            f"| {job} | {options_of[job].batch} | {way} | {tokens:,.0f} | {median(speeds):.2f} | {speeds[0]:.2f} to "
            f"{speeds[-1]:.2f} | {flops / peak:.1%} | {megabytes} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=GPU_BATCHES, default=["mini"])
    parser.add_argument("--batch", type=int, default=0, help="Texts or pairs a step; 32, on a GPU by the shape.")
    for name, value in (("texts", 4000), ("steps", 8), ("repeats", 0), ("part-tokens", 0), ("mini-batch", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        job, way, folder, values = json.loads(options.one)
        print(json.dumps(measure(job, way, Path(folder), argparse.Namespace(**values))))
        return
    on_gpu = options.device == "cuda"
    options.repeats = options.repeats or (1 if on_gpu else 3)
    options.part_tokens = options.part_tokens or (32_768 if on_gpu else 2048)
    options.mini_batch = options.mini_batch or (128 if on_gpu else 16)  # texts that the cached peer runs together
    print(where("torch", "transformers", "sentence-transformers"))
    if on_gpu:
        import torch

        print(f"{torch.cuda.get_device_name()}, bfloat16 by autocast over float32 weights")
    for shape in options.shapes:
        of_shape(shape, options)


if __name__ == "__main__":
    main()
