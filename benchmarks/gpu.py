"""Packed batches on a GPU beside what one would use instead, on the same random weights.

    python benchmarks/gpu.py                                        # the 570M shape, bfloat16, on CUDA
    python benchmarks/gpu.py --sections rate latency --seconds 60 --out run.md   # a part of it, into a file too
    python benchmarks/gpu.py --shape tiny --device cpu              # that it runs

Sections: ``rate`` (tokens/s by lengths and system), ``tasks`` (adapters in a batch), ``batch`` (rate and memory against
the tokens of a pass), ``latency`` (one short text), ``texts`` (from strings, tokenised, beside sentence-transformers),
``training`` (forward and backward), ``kernels`` (what takes the time of a pass). Each line is written as soon as it is
known; a section that fails says why, and the others go on. One that has used up its ``--seconds``, opening and
compiling apart, leaves the rest out and says so; in ``rate`` each mix has its share, and one turn in any case.

Token ids are random but in ``texts``. Peers get rows sorted by length and padded to the longest of a batch of the same
budget of tokens, as their users do; polyvec packs. Outputs are compared before anything is timed; systems alternate;
medians. "Of the peak" is against the best of some square products of the same type in this run, with operations
counted without padding; "of the roofline" against the time in which every kernel would move its bytes at the measured
rate of a copy, or do its operations at that peak, whichever is longer.

The prediction for 512 tokens, 570M shape, bfloat16, on a chip of 800 TFLOP/s and 3 TB/s, by token and layer: products
25.2 million operations, 35 ns at 90 % of the peak; attention 2.1 million, 6 ns at 350 TFLOP/s; 37 KB between fused
kernels (rotation 8, two sums with layer norm 6 each, GELU 16), 12 ns. 24 layers and the ends: 1.3 microseconds for 0.65
GFLOP, so 60 % of the peak. Uncompiled the bytes are rotation 28, sums and norms 20, GELU 16: 22 ns, so 52 %.

Of adapters, bytes by token and layer: factors as they are stored read each product's input again, and copy, read and
write its output, 88 KB, 30 ns, beside slow kernels for rows of 40 bytes: measured 48 ns, 47 % of an eager pass and 74 %
of a compiled one. Laid out for the kernels, columns beside the rows of three products and an update in place of the
fourth: 31 KB, 11 ns, 12 % and 16 %. In passes of one task with a copy of the layers for each: nothing but for what is
left over, under 8,192 tokens of each task.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import numpy as np
import torch
from common import make_texts, randomise, where

from polyvec import Embedder
from polyvec.inference.batching import Batch, plan_batches
from polyvec.inference.engines import torch as torch_engine
from polyvec.inference.engines.torch import TorchEngine
from polyvec.inference.passes import Passes, TokenRow
from polyvec.inference.quantize import smallest_cosine
from polyvec.model.config import ModelConfig, mini, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.hub import resolve_model_folder
from polyvec.model.pooling import mean_pool
from polyvec.model.weights import save_hf
from polyvec.tasks import NO_ADAPTER
from polyvec.training.adapters import freeze_base, switch_dropout_off
from polyvec.training.utilisation import Work, forward_flops, measured_peak

SHAPES = {"570m": ModelConfig, "mini": mini, "tiny": tiny}
MIXES = {"log-normal": (None, 2048), "512": (512, 512), "long": (8192, 32), "short": (16, 4096)}  # tokens, texts
Ids = list[np.ndarray]
Embed = Callable[[Ids, Sequence[int]], np.ndarray]


class Bench:
    """What the sections share: one model, its engines and peers, opened when first asked for, and the chip's limits."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.config: ModelConfig = SHAPES[options.shape]()
        torch.manual_seed(0)
        with torch.device(self.device):
            self.encoder = Encoder(self.config).eval()
        randomise(self.encoder)
        self._opened: dict[str, Any] = {}
        self._refused: set[str] = set()
        self._deadline = float("inf")
        self.peak = measured_peak(self.device, bf16=self.is_cuda)
        self.bandwidth = copy_rate(self.device)

    def engine(self, name: str) -> TorchEngine:
        """Open ``eager``, ``compiled`` or another kind of engine; each has its own copy of the weights."""
        if name not in self._opened:
            kinds: dict[str, dict[str, Any]] = {
                "eager": {"graphs": False, "merged_task": None},
                "compiled": {"compiler": "inductor", "graphs": False, "merged_task": None},
                "float8": {"compiler": "inductor", "graphs": False, "merged_task": None, "dtype": "float8"},
                "eager, a copy a task": {"graphs": False, "merged_task": "each"},
                "compiled, a copy a task": {"compiler": "inductor", "graphs": False, "merged_task": "each"},
                "recorded": {"graphs": True},
                "compiled and recorded": {"compiler": "inductor", "graphs": True},
            }
            # Random weights need not pass the gate to be timed: the smallest cosine is printed.
            with mock.patch.object(torch_engine, "SMALLEST_COSINE", -1.0):
                encoder = copy.deepcopy(self.encoder)
                self._opened[name] = TorchEngine(encoder, device=self.options.device, **kinds[name])
        return self._opened[name]

    def systems(self, names: Sequence[str]) -> dict[str, Embed]:
        """Return those systems that open here; of others the reason is printed once."""
        found: dict[str, Embed] = {}
        for name in names:
            if name in self._refused or not self.is_wanted(name):
                continue
            try:
                if name.startswith("polyvec"):
                    found[name] = packed(self.engine(name.removeprefix("polyvec, ")))
                else:
                    found[name] = self.transformers(name.removeprefix("transformers, "))
            except Exception as error:
                self._refused.add(name)
                say(f"{name} left out: {reason(error)}")
        return found

    def is_wanted(self, name: str) -> bool:
        return self.options.systems is None or name.removeprefix("polyvec, ") in self.options.systems

    @property
    def hf_folder(self) -> Path:
        """The weights as transformers and sentence-transformers load them, with a tokenizer of the right size."""
        if "folder" not in self._opened:
            self._opened["temporary"] = tempfile.TemporaryDirectory()
            folder = Path(self._opened["temporary"].name)
            path = resolve_model_folder(None) / "tokenizer.json"
            if self.options.shape == "570m":
                from large import grown_tokenizer

                path = folder / "tokenizer.json"
                path.write_text(json.dumps(grown_tokenizer(), ensure_ascii=False), encoding="utf-8")
            save_hf(copy.deepcopy(self.encoder).to(self.dtype), folder / "hf", path)
            self._opened["folder"] = folder / "hf"
        return self._opened["folder"]

    def transformers(self, attention: str) -> Embed:
        if attention not in self._opened:
            if attention == "flash_attention_2" and (find_spec("flash_attn") is None or not self.is_cuda):
                raise ImportError("flash_attn is not installed, or there is no GPU")
            from transformers import JinaEmbeddingsV3Model

            model = JinaEmbeddingsV3Model.from_pretrained(
                self.hf_folder, attn_implementation=attention, dtype=self.dtype
            )
            budget = self.engine("eager").batch_tokens
            self._opened[attention] = padded(
                model.eval().to(self.device), self.config.pad_token_id, budget, self.device
            )
        return self._opened[attention]

    def roofline(self, lengths: Sequence[int]) -> float:
        """Return the seconds of a forward pass whose kernels each reach the peak or the bandwidth, adapters left out.

        Per token and layer: four products, attention, rotation, two sums with a layer norm, GELU; weights are read
        once a pass.
        """
        config, size = self.config, torch.tensor([], dtype=self.dtype).element_size()
        width, inner, tokens = config.hidden_size, config.intermediate_size, sum(lengths)
        passes = -(-tokens // self.engine("eager").batch_tokens)
        seconds = 0.0
        for rows, columns in ((width, 3 * width), (width, width), (width, inner), (inner, width)):
            moved = size * (tokens * (rows + columns) + passes * rows * columns)
            seconds += max(2.0 * tokens * rows * columns / self.peak, moved / self.bandwidth)
        attention = 4.0 * width * sum(length * length for length in lengths)
        seconds += max(attention / self.peak, size * tokens * 4 * width / self.bandwidth)
        seconds += size * tokens * (10 * width + 2 * inner) / self.bandwidth
        return seconds * config.num_hidden_layers

    def rows(self, lengths: Sequence[int]) -> Ids:
        rng = np.random.default_rng(1)
        return [rng.integers(4, self.config.vocab_size, n).astype(np.int32) for n in lengths]

    def lengths(self, mix: str) -> list[int]:
        length, count = MIXES[mix]
        count = max(1, count * self.options.texts // MIXES["log-normal"][1])
        if length is None:
            found = np.random.default_rng(0).lognormal(np.log(60), 0.9, count)
            return np.clip(found, 8, self.config.max_tokens).astype(int).tolist()
        return [min(length, self.config.max_tokens)] * count

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Print a heading; give the section its seconds; a failure is printed and ends the section alone."""
        started = time.perf_counter()
        self.restart()
        say(f"\n## {name}\n")
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            say(f"\n{name} ended early: {reason(error)}")
        if self.is_cuda:
            torch.cuda.empty_cache()
        say(f"\n({name}: {time.perf_counter() - started:.0f} s)")

    def restart(self) -> None:
        """Give the section all its seconds from now on."""
        self._deadline = time.perf_counter() + self.options.seconds

    @contextmanager
    def share(self, number: int, of: int) -> Iterator[None]:
        """Give a part of a section an equal share of the seconds that are left."""
        whole, now = self._deadline, time.perf_counter()
        self._deadline = now + max(0.0, whole - now) / (of - number)
        yield
        self._deadline = whole

    def has_time(self, what: str) -> bool:
        """Whether the section's seconds are not used up; says what is left out otherwise."""
        if time.perf_counter() < self._deadline:
            return True
        say(f"{what} left out: no time left of the section's {self.options.seconds:.0f} s")
        return False

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any]) -> float:
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def peak_mb(self, call: Callable[[], Any]) -> tuple[Any, str]:
        """Return what ``call`` returns, and the megabytes that it took at most beyond what was there."""
        if not self.is_cuda:
            return call(), "-"
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        self.wait()
        return result, f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


def rate(bench: Bench) -> None:
    ours = [f"polyvec, {kind}" for kind in ("eager", "compiled", "float8")]
    systems = bench.systems([*ours, "transformers, sdpa", "transformers, flash_attention_2"])
    for embed in systems.values():
        embed(bench.rows([64] * 8), [NO_ADAPTER] * 8)  # compiles
    bench.restart()
    say("| lengths | system | smallest cosine | tokens/s | of transformers' | of the peak | of the roofline | MB |")
    say("|---|---|---|---|---|---|---|---|")
    for number, mix in enumerate(bench.options.mixes):
        with bench.share(number, len(bench.options.mixes)):
            rate_of(bench, mix, systems)


def rate_of(bench: Bench, mix: str, systems: dict[str, Embed]) -> None:
    lengths = bench.lengths(mix)
    rows, none = bench.rows(lengths), [NO_ADAPTER] * len(lengths)
    vectors: dict[str, np.ndarray] = {}
    memory: dict[str, str] = {}
    for name, embed in systems.items():  # also the warm-up of every shape
        try:
            vectors[name], memory[name] = bench.peak_mb(partial(embed, rows, none))
        except Exception as error:
            say(f"{name} left out of {mix}: {reason(error)}")
    runs: dict[str, list[float]] = {name: [] for name in vectors}
    for repeat in range(bench.options.repeats):
        if repeat and not bench.has_time(f"repeat {repeat + 1} of {mix}"):
            break
        for name in runs:
            runs[name].append(bench.seconds(partial(systems[name], rows, none)))
    flops, bound = sum(forward_flops(bench.config, lengths)), bench.roofline(lengths)
    middles = {name: statistics.median(own) for name, own in runs.items()}
    theirs = middles.get("transformers, sdpa", float("nan"))
    reference = vectors.get("polyvec, eager", next(iter(vectors.values())))
    for name, middle in middles.items():
        say(
            f"| {mix} | {name} | {smallest_cosine(reference, vectors[name]):.5f} | {sum(lengths) / middle:,.0f} | "
            f"{theirs / middle:.2f} | {flops / middle / bench.peak:.0%} | {bound / middle:.0%} | {memory[name]} |"
        )


def tasks(bench: Bench) -> None:
    five = len(bench.config.tasks)
    lengths = bench.lengths("log-normal")
    rows = bench.rows(lengths)
    kinds = {
        "none": [NO_ADAPTER] * len(rows),
        "one": [0] * len(rows),
        "five": [i % five for i in range(len(rows))],
    }
    say("| system | tasks in a batch | smallest cosine | tokens/s | time, none is 1 |\n|---|---|---|---|---|")
    want = packed(bench.engine("eager"))(rows, kinds["five"])
    for name in ("eager", "eager, a copy a task", "compiled", "compiled, a copy a task", "float8"):
        for system, embed in bench.systems([f"polyvec, {name}"]).items():
            for ids in kinds.values():
                embed(rows, ids)  # compiles
            vectors = {kind: embed(rows, ids) for kind, ids in kinds.items()}
            times: dict[str, list[float]] = {kind: [] for kind in kinds}
            for _ in range(bench.options.repeats):
                for kind, ids in kinds.items():
                    times[kind].append(bench.seconds(partial(embed, rows, ids)))
            base = statistics.median(times["none"])
            if name in ("eager", "compiled"):  # others merge in another way, or cannot be merged
                merged = partial(embed, rows, kinds["one"])
                encoder = bench.engine(name)._encoder
                encoder.merge(0)
                try:
                    merged()
                    times["one, merged"] = [bench.seconds(merged) for _ in range(bench.options.repeats)]
                finally:
                    encoder.unmerge()
            for kind, own in times.items():
                middle = statistics.median(own)
                told = f"{smallest_cosine(want, vectors[kind]):.5f}" if kind == "five" else "-"
                say(f"| {system} | {kind} | {told} | {sum(lengths) / middle:,.0f} | {middle / base:.3f} |")


def batch(bench: Bench) -> None:
    say("| system | tokens a text | tokens in a pass | tokens/s | of the peak | MB beside the weights |")
    say("|---|---|---|---|---|---|")
    names = [name for name in ("eager", "compiled", "float8") if bench.is_wanted(name)]
    most = 65536 if bench.is_cuda else 2048
    for name in names if bench.is_cuda else names[:2]:
        engine = bench.engine(name)
        engine.pool(Batch.of(bench.rows([64] * 8), [NO_ADAPTER] * 8))  # compiles
        bench.restart()
        for length in (bench.lengths("512")[0], bench.lengths("long")[0]):
            tokens = max(1024, length)
            while tokens <= most and bench.has_time(f"{name}, texts of {length}, {tokens} tokens"):
                count = tokens // length
                one = Batch.of(bench.rows([length] * count), [NO_ADAPTER] * count)
                try:
                    _, memory = bench.peak_mb(partial(engine.pool, one))
                    calls = max(2, most // tokens)
                    seconds = bench.seconds(partial(again, partial(engine.pool, one), calls)) / calls
                except Exception as error:
                    say(f"{name}, texts of {length}, {tokens} tokens left out: {reason(error)}")
                    break
                used = sum(forward_flops(bench.config, [length] * count)) / seconds / bench.peak
                say(f"| {name} | {length} | {tokens} | {tokens / seconds:,.0f} | {used:.0%} | {memory} |")
                tokens *= 2


def latency(bench: Bench) -> None:
    weights = sum(p.numel() for n, p in bench.encoder.layers.named_parameters() if ".lora_" not in n)
    bound = weights * (2 if bench.is_cuda else 4) / bench.bandwidth
    say(f"One text of 16 tokens; to read the layers' weights once takes {bound * 1e3:.2f} ms.\n")
    say("| system | task | median ms | 99th percentile ms | of the bound |\n|---|---|---|---|---|")
    rows = bench.rows([16])
    kinds = ("eager", "recorded", "compiled", "compiled and recorded")
    names = [*(f"polyvec, {kind}" for kind in kinds), "transformers, sdpa"]
    for name, embed in bench.systems(names).items():
        for kind, task in (("none", NO_ADAPTER), ("one", 0)):
            if (kind == "one" and name.startswith("transformers")) or not bench.has_time(name):
                continue
            for _ in range(5):
                embed(rows, [task])
            times = [bench.seconds(partial(embed, rows, [task])) for _ in range(20 * bench.options.repeats)]
            middle = statistics.median(times)
            tail = float(np.quantile(times, 0.99))
            say(f"| {name} | {kind} | {middle * 1e3:.2f} | {tail * 1e3:.2f} | {bound / middle:.0%} |")


def texts(bench: Bench) -> None:
    """From strings to vectors, tokenising included, as users call both libraries."""
    many = make_texts(bench.options.texts)
    calls: dict[str, Callable[[], np.ndarray]] = {}
    for name in (name for name in ("eager", "compiled") if bench.is_wanted(name)):
        model = Embedder(bench.hf_folder, engine=bench.engine(name))
        calls[f"polyvec, {name}"] = partial(model.encode, many)
    try:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(bench.hf_folder), device=str(bench.device), model_kwargs={"dtype": bench.dtype})
        calls["sentence-transformers"] = lambda: peer.encode(many, batch_size=64, normalize_embeddings=True)
    except Exception as error:
        say(f"sentence-transformers left out: {reason(error)}\n")
    vectors = {name: call() for name, call in calls.items()}
    ours = next(iter(vectors.values()))
    prompts = [""] * len(many)
    alone = bench.seconds(lambda: model.tokenizer.tokens_batch(many, prompts, model.max_tokens))
    say(f"Tokenising alone: {len(many) / alone:,.0f} texts/s.\n")
    say("| system | smallest cosine | texts/s |\n|---|---|---|")
    for number, (name, call) in enumerate(calls.items()):
        if not number or bench.has_time(name):
            middle = statistics.median(bench.seconds(call) for _ in range(bench.options.repeats))
            say(f"| {name} | {smallest_cosine(ours, vectors[name]):.5f} | {len(many) / middle:,.0f} |")


def training(bench: Bench) -> None:
    """Forward and backward, float32 weights, products in bfloat16, no dropout and no recomputation."""
    length = bench.lengths("512")[0]
    count = 32 if bench.is_cuda else 2
    config = dataclasses.replace(bench.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = bench.rows([length] * count)
    one = Batch.of(rows, [0] * count)
    ids, cu_seqlens, task_ids = (
        torch.from_numpy(a).to(bench.device) for a in (one.input_ids, one.cu_seqlens, one.task_ids)
    )

    def step_of_ours(encoder: Encoder, *, adapted: bool) -> Callable[[], None]:
        named = task_ids if adapted else torch.full_like(task_ids, NO_ADAPTER)

        def step() -> None:
            encoder.zero_grad(set_to_none=True)
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.is_cuda):
                states = encoder(ids, cu_seqlens, named, max_seqlen=length, adapters=(0,) if adapted else (NO_ADAPTER,))
                mean_pool(states, cu_seqlens).square().sum().backward()

        return step

    def ours(*, trains_base: bool, compiled: bool) -> Callable[[], None]:
        encoder = copy.deepcopy(bench.encoder).float().train()
        switch_dropout_off(encoder)
        if not trains_base:
            freeze_base(encoder)
        if compiled:
            encoder.compile_layers("inductor")
        return step_of_ours(encoder, adapted=not trains_base)

    def theirs(*, trains_base: bool) -> Callable[[], None]:
        from transformers import JinaEmbeddingsV3Model

        model = JinaEmbeddingsV3Model.from_pretrained(bench.hf_folder, attn_implementation="sdpa", dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        model = model.to(bench.device).train()
        if not trains_base:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=config.lora_rank, target_modules="all-linear"))
        padded_ids = ids.view(count, length)
        mask = torch.ones_like(padded_ids)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.is_cuda):
                states = model(input_ids=padded_ids, attention_mask=mask).last_hidden_state
                states.float().mean(1).square().sum().backward()

        return step

    say(f"{count} texts of {length} tokens a step.\n")
    say("| what learns | system | tokens/s | of the peak (MFU) | peak MB |\n|---|---|---|---|---|")
    names = ("polyvec, eager", "transformers, sdpa", "polyvec, compiled")  # last what may take the longest to open
    for name in filter(bench.is_wanted, names):
        for trains_base in (False, True):
            what = "whole model" if trains_base else "adapters"
            if name == "transformers, sdpa":
                opened = partial(theirs, trains_base=trains_base)
            else:
                opened = partial(ours, trains_base=trains_base, compiled=name.endswith("compiled"))
            if not bench.has_time(f"{what}, {name}"):
                continue
            try:
                step = opened()
                step()
                _, memory = bench.peak_mb(step)
                middle = statistics.median(bench.seconds(step) for _ in range(bench.options.repeats))
            except Exception as error:
                say(f"{what}, {name} left out: {reason(error)}")
                continue
            finally:
                step = None  # type: ignore[assignment]
                if bench.is_cuda:
                    torch.cuda.empty_cache()
            work = Work()
            work.add(config, [length] * count, trains_base=trains_base)
            used = work.flops / middle / bench.peak
            say(f"| {what} | {name} | {work.tokens / middle:,.0f} | {used:.0%} | {memory} |")


def kernels(bench: Bench) -> None:
    """The dozen kernels that take the most of the device's time, by torch's profiler."""
    length = bench.lengths("512")[0]
    count = 32 if bench.is_cuda else 2
    activity = torch.profiler.ProfilerActivity.CUDA if bench.is_cuda else torch.profiler.ProfilerActivity.CPU
    five = len(bench.config.tasks)
    for name in (name for name in ("eager", "compiled") if bench.is_wanted(name)):
        for kind, ids in (("none", [NO_ADAPTER] * count), ("five", [i % five for i in range(count)])):
            one = Batch.of(bench.rows([length] * count), ids)
            engine = bench.engine(name)
            for _ in range(2):
                engine.pool(one)
            with torch.profiler.profile(activities=[activity]) as profiler:
                engine.pool(one)
            found = profiler.key_averages()
            spent = {e.key: (e.self_device_time_total if bench.is_cuda else e.self_cpu_time_total) for e in found}
            calls, total = {e.key: e.count for e in found}, sum(spent.values())
            say(f"\n{name}, tasks: {kind}, {count * length} tokens, {total / 1e3:.1f} ms in kernels\n")
            say("| kernel | calls | ms | share |\n|---|---|---|---|")
            for key in sorted(spent, key=lambda key: -spent[key])[:12]:
                say(f"| {key[:90]} | {calls[key]} | {spent[key] / 1e3:.2f} | {spent[key] / total:.0%} |")


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "rate": rate,
    "tasks": tasks,
    "batch": batch,
    "latency": latency,
    "texts": texts,
    "training": training,
    "kernels": kernels,
}


def packed(engine: TorchEngine) -> Embed:
    """As ``Embedder`` runs its rows: the next pass is prepared while one runs."""

    def embed(rows: Ids, task_ids: Sequence[int]) -> np.ndarray:
        out = np.empty((len(rows), engine.config.hidden_size), np.float32)
        tokens = [TokenRow(row, task) for row, task in zip(rows, task_ids, strict=True)]
        for plan, vectors in Passes().run(engine, tokens, batch_tokens=None, states=False):
            out[plan] = vectors
        return out

    return embed


def padded(model: Any, pad: int, batch_tokens: int, device: torch.device) -> Embed:
    @torch.inference_mode()
    def embed(rows: Ids, _: Sequence[int]) -> np.ndarray:
        out = np.empty((len(rows), model.config.hidden_size), np.float32)
        for plan in plan_batches([len(row) for row in rows], batch_tokens=batch_tokens):
            ids = np.full((len(plan), len(rows[plan[0]])), pad, np.int64)
            for place, i in enumerate(plan):
                ids[place, : len(rows[i])] = rows[i]
            tokens = torch.from_numpy(ids).to(device)
            mask = tokens != pad
            states = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            sums = (states * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)
            out[plan] = (sums / mask.sum(1, keepdim=True)).cpu().numpy()
        return out

    return embed


def again(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def copy_rate(device: torch.device) -> float:
    """Return the bytes a second, read and written, of the best of a few copies that no cache holds."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        target[0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2.0 * size / best


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_written: list[TextIO] = []


def say(line: str) -> None:
    for stream in (sys.stdout, *_written):
        print(line, file=stream, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="570m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=40, help="Of a section, after which the rest is left out.")
    parser.add_argument("--texts", type=int, default=MIXES["log-normal"][1], help="Of the log-normal mix.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--systems", nargs="+", help="Names as the tables have them, without 'polyvec, '; else all.")
    parser.add_argument("--out", type=Path, help="A file that gets each line as soon as it is known.")
    options = parser.parse_args()
    if options.out is not None:
        _written.append(options.out.open("a", encoding="utf-8"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    started = time.perf_counter()
    bench = Bench(options)
    chip = torch.cuda.get_device_name() if bench.is_cuda else "no GPU"
    say(f"{chip}, {where('torch', 'transformers', 'sentence-transformers', 'flash_attn')}")
    say(f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}")
    say(
        f"{options.shape} shape, random weights, {bench.dtype}, {options.repeats} alternating repeats, medians; a "
        f"square product does {bench.peak / 1e12:.3g} trillion operations a second, a copy moves "
        f"{bench.bandwidth / 1e9:,.0f} GB/s"
    )
    for name in options.sections:
        with bench.section(name):
            SECTIONS[name](bench)
    say(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
