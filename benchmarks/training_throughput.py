"""Tokens a second of a training step: polyvec train against the trainers that people use, same weights, same texts.

    python benchmarks/training_throughput.py [--texts 4000] [--batch 32] [--steps 8] [--repeats 3] [--out FILE]
    python benchmarks/training_throughput.py --device cuda --shapes mini 570m --seconds 100 --out FILE

Masked words: transformers' ``Trainer`` over its own JinaEmbeddingsV3 (whole batch padded, dynamic padding). Pairs:
sentence-transformers' model and its MultipleNegativesRankingLoss in both directions under MatryoshkaLoss, and its
cached form, in that same ``Trainer``, from which sentence-transformers' own derives (and needs the package
``datasets``). Ours runs twice too: with the memory of the whole batch, as they do without the cache, and in parts, as
with it. Dropout off, AdamW, texts of log-normal length; float32 on a CPU, bfloat16 by autocast on a GPU. Both sides
take torch's own attention: theirs scaled-dot-product over padded rows, ours that or, on a GPU, the packed kernel. A
token is one that a text has: padding counts for nobody, and what is embedded twice counts once, in tokens and in MFU,
whose peak is that of square products in this run. The first steps are not timed. Before anything is, one batch must
have the same loss in all, of pairs and of masked words (the head copied). The 570M shape has random weights.

On a CPU every run is its own process; ``--core`` measures one thread by the time of its core, where a machine is not
quiet. On a GPU, where a process takes as long to start as to measure, all are one. Repeats alternate; a GPU, which
nobody shares, gets one. After ``--seconds`` no further run is started. Every line goes to ``--out`` as it is known.
Needs the ``train`` extra, transformers, sentence-transformers and accelerate; examples are in memory, so ``datasets``
is not read.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import randomise, where

WAYS = {
    "masked words": ("polyvec", "transformers Trainer"),
    "pairs": ("polyvec", "sentence-transformers", "polyvec, in parts", "sentence-transformers, cached"),
}
CHECK = "one batch of masked words"
#: Texts or pairs a step on a GPU, as many as let the peers, who make logits of every token and keep every padded state,
#: fit into 80 GB; and the steps that are timed.
GPU_BATCHES = {"tiny": (64, 64), "mini": (256, 256), "570m": (48, 64)}
GPU_STEPS = {"tiny": 8, "mini": 40, "570m": 8}
WHOLE = 2**17  # tokens: more than any batch here has
SKIPPED = 2  # steps before the clock starts
MAX_TOKENS = 256
TEMPERATURE = 0.05
CORE = "--core" in sys.argv


def clock() -> float:
    """Return seconds: with ``--core`` those of the processor that this process has used."""
    return time.process_time() if CORE else time.perf_counter()


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


def polyvec_run(job: str, folder: Path, options: argparse.Namespace, *, part_tokens: int) -> dict[str, float]:
    from polyvec.training import stages
    from polyvec.training.run import Run

    stage, name = ("mlm", "texts") if job == "masked words" else ("pairs", "pairs")
    steps = options.steps + SKIPPED
    marks: list[float] = []
    done: list[tuple[int, float]] = []
    train = stages.train

    def watched(groups: Any, shares: Any, *args: Any, work: Any, **kwargs: Any) -> Any:
        def timed(number: int) -> Any:
            marks.append(clock())
            done.append((work.tokens, work.flops))
            return shares(number)

        losses = train(groups, timed, *args, work=work, **{**kwargs, "checkpoint": None, "report": None})
        synchronize(options.device)
        marks.append(clock())
        done.append((work.tokens, work.flops))
        raise Stopped(losses)

    stages.train = watched
    try:
        with tempfile.TemporaryDirectory() as output:
            run = Run(
                stage=stage, model=str(folder / "ours"), data=(name,), output=str(Path(output) / "out"), steps=steps,
                batch_size=options.batch, max_tokens=MAX_TOKENS, learning_rate=1e-5, save_every=steps,
                part_tokens=part_tokens, bf16=options.device == "cuda",
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
                watch.marks.append(clock())

            def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
                if state.global_step == args.max_steps:
                    synchronize(watch.device)
                    watch.marks.append(clock())

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

    steps = options.steps + SKIPPED
    return TrainingArguments(
        output_dir=output, max_steps=steps, per_device_train_batch_size=options.batch,
        learning_rate=1e-5, use_cpu=options.device == "cpu", bf16=options.device == "cuda", report_to=[],
        save_strategy="no", logging_steps=1 if options.steps == 1 else steps, disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=options.device == "cuda",
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


def masked_losses(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return the loss of one batch of masked words in both models, under one head."""
    import torch
    from transformers import JinaEmbeddingsV3ForMaskedLM

    from polyvec.data.masking import IGNORED, mask_words, word_starts
    from polyvec.model.weights import load_encoder
    from polyvec.text.tokenizer import Tokenizer
    from polyvec.training.mlm import MaskedLanguageModel

    encoder = load_encoder(folder / "ours")
    config = encoder.config
    tokenizer = Tokenizer.from_file(folder / "ours" / "tokenizer.json", **config.tokenizer_ids)
    mask, rng = config.vocab_size - 1, np.random.default_rng(0)
    rows = []
    for text in [row["text"] for row in read_rows(folder)["texts"]][: options.batch]:
        encoding = tokenizer.encode(text, max_tokens=MAX_TOKENS)
        rows.append(mask_words(encoding.input_ids, word_starts(text, encoding), rng, rate=0.3, mask_token_id=mask))
    ids, labels = (torch.from_numpy(np.concatenate(side)).long() for side in zip(*rows, strict=True))
    offsets = torch.tensor([0, *(len(row) for row, _ in rows)]).cumsum(0).int()
    places = (labels != IGNORED).nonzero().squeeze(1)
    padded = [
        torch.nn.utils.rnn.pad_sequence([part.long() for part in side.split(offsets.diff().tolist())], True, value)
        for side, value in ((ids, config.pad_token_id), (labels, IGNORED), (torch.ones_like(ids), 0))
    ]
    ours = MaskedLanguageModel(encoder.eval()).to(options.device)
    theirs: Any = JinaEmbeddingsV3ForMaskedLM.from_pretrained(folder / "hf", dtype=torch.float32)
    theirs = theirs.eval().to(options.device)
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
        theirs.lm_head.dense.load_state_dict(ours.dense.state_dict())
        theirs.lm_head.layer_norm.load_state_dict(ours.norm.state_dict())
        theirs.lm_head.decoder.bias.copy_(ours.bias)
        own = ours(*(part.to(options.device) for part in (ids, offsets, places, labels[places]))) / len(places)
        inputs = dict(zip(("input_ids", "labels", "attention_mask"), padded, strict=True))
        peer = theirs(**{name: part.to(options.device) for name, part in inputs.items()}).loss
    return {"polyvec": float(own), "transformers": float(peer)}


def measure(job: str, way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    if CORE:
        import torch

        torch.set_num_threads(1)
    if job == CHECK:
        return masked_losses(folder, options)
    if way.startswith("polyvec"):
        in_parts = way.endswith("parts") or (job == "masked words" and options.device == "cpu")
        return polyvec_run(job, folder, options, part_tokens=options.part_tokens if in_parts else WHOLE)
    if job == "masked words":
        return trainer_mlm(folder, options)
    return trainer_pairs(folder, options, cached=way.endswith("cached"))


def run_one(job: str, way: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return what ``measure`` does: in a process of its own or, ``together``, in this one; of a GPU with the peak of
    its memory."""
    if options.together:
        import torch

        on_gpu = options.device == "cuda"
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            measured = measure(job, way, folder, options)
        except torch.OutOfMemoryError as error:
            print(f"{job}, {way}: {error}", file=sys.stderr)
            return {"tokens_per_second": 0.0, "flops_per_second": 0.0, "peak_mb": float("inf"), "first_loss": np.nan}
        return {**measured, "peak_mb": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else np.nan}
    values = {name: getattr(options, name) for name in ("batch", "steps", "part_tokens", "mini_batch", "device")}
    command = [sys.executable, __file__, "--one", json.dumps([job, way, str(folder), values])]
    command += ["--core"] if CORE else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{job}, {way}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_shape(shape: str, options: argparse.Namespace, say: Callable[[str], None], deadline: float) -> None:
    """Measure every trainer on one shape and say its rows."""
    import torch

    from polyvec.training.utilisation import measured_peak

    if time.monotonic() > deadline:
        say(f"\n{shape}: not run, the time was up")
        return
    on_gpu = options.device == "cuda"
    batches = GPU_BATCHES[shape] if on_gpu else (32, 32)
    steps = options.steps or (GPU_STEPS[shape] if on_gpu else 8)
    with tempfile.TemporaryDirectory(dir=memory_folder() if on_gpu else None) as temporary:
        folder = Path(temporary)
        write_inputs(folder, options.batch or max(batches), shape, options.device)
        options_of = {
            job: argparse.Namespace(**{**vars(options), "batch": options.batch or batch, "steps": steps})
            for job, batch in zip(WAYS, batches, strict=True)
        }
        checked = {
            "words": run_one(CHECK, "", folder, options_of["masked words"]),
            "pairs": {},
        }
        one_batch = argparse.Namespace(**{**vars(options_of["pairs"]), "steps": 1})
        write_texts(folder, one_batch.batch)
        for way in WAYS["pairs"]:
            checked["pairs"][way] = run_one("pairs", way, folder, one_batch)["first_loss"]
        for job, losses in checked.items():
            losses.pop("peak_mb", None)
            known = [loss for loss in losses.values() if loss == loss]
            say(
                f"{shape}, loss of one batch of {job}: {', '.join(f'{way} {loss:.4f}' for way, loss in losses.items())}"
            )
            if max(known) - min(known) > (0.02 if on_gpu else 1e-4) * max(known):
                sys.exit(f"the trainers must agree on one batch of {job}, got losses {losses}")
        write_texts(folder, options.texts or max(batches) * (steps + SKIPPED))
        peak = measured_peak(torch.device(options.device), bf16=on_gpu)
        say(f"\n{shape}, {steps} steps, {options.repeats} repeats; products {peak / 1e12:.3g} TFLOP/s\n")
        say("| job | a step | trainer | tokens/s | of polyvec's | slowest and fastest repeat | MFU | peak MB |")
        say("|---|---|---|---|---|---|---|---|")
        for job, ways in WAYS.items():
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for _ in range(options.repeats):
                for way in ways:
                    if time.monotonic() < deadline:
                        runs[way].append(run_one(job, way, folder, options_of[job]))
            own = median(run["tokens_per_second"] for run in runs["polyvec"]) if runs["polyvec"] else 0.0
            for way, measured in runs.items():
                if not measured:
                    say(f"| {job} | | {way} | not run: the time was up | | | | |")
                    continue
                speeds = sorted(run["tokens_per_second"] / own for run in measured)
                rates = ("tokens_per_second", "flops_per_second")
                tokens, flops = (median(run[key] for run in measured) for key in rates)
                megabytes = f"{measured[-1]['peak_mb']:,.0f}" if on_gpu else ""
                say(
                    f"| {job} | {options_of[job].batch} | {way} | {tokens:,.0f} | {median(speeds):.2f} | "
                    f"{speeds[0]:.2f} to {speeds[-1]:.2f} | {flops / peak:.1%} | {megabytes} |"
                )


def memory_folder() -> str | None:
    """Return the folder of files in memory if it holds two copies of 570M weights: every run reads them."""
    try:
        return "/dev/shm" if shutil.disk_usage("/dev/shm").free > 2**33 else None
    except OSError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=GPU_BATCHES, default=["mini"])
    parser.add_argument("--batch", type=int, default=0, help="Texts or pairs a step; 32, on a GPU by the shape.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="After them no further run is started.")
    parser.add_argument("--out", type=Path, help="File to which every line is added.")
    for name in ("texts", "steps", "repeats", "part-tokens", "mini-batch"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument(
        "--core", action="store_true", help="One thread, by the seconds of its core: where others work."
    )
    parser.add_argument("--together", action="store_true", help="All runs in one process, as on a GPU.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        job, way, folder, values = json.loads(options.one)
        print(json.dumps(measure(job, way, Path(folder), argparse.Namespace(**values))))
        return
    on_gpu = options.device == "cuda"
    deadline = time.monotonic() + options.seconds
    options.together |= on_gpu
    options.repeats = options.repeats or (1 if on_gpu else 3)
    options.part_tokens = options.part_tokens or (16_384 if on_gpu else 2048)
    options.mini_batch = options.mini_batch or (64 if on_gpu else 16)  # texts that the cached peer runs together

    def say(line: str) -> None:
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    say(where("torch", "transformers", "sentence-transformers"))
    if on_gpu:
        import torch

        say(f"{torch.cuda.get_device_name()}, bfloat16 by autocast over float32 weights")
    for shape in options.shapes:
        of_shape(shape, options, say, deadline)


if __name__ == "__main__":
    main()
