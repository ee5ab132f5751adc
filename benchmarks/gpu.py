"""Packed batches on a GPU beside transformers on the same random weights: rate, tasks, memory.

    python benchmarks/gpu.py --repeats 5                 # the 570M shape, bfloat16, on CUDA
    python benchmarks/gpu.py --shape tiny --device cpu   # that it runs

Token ids are random, so nothing here measures a tokenizer. Peers get the rows sorted by length, padded to the longest
of a batch of the same budget of tokens, as their users do; polyvec packs. Outputs are compared before anything is
timed; systems alternate; medians. "Of the peak" is against the best square product of the same type in this run, with
operations counted without padding. What is not installed here (flash_attn) is left out and said.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from common import randomise, where

from polyvec.inference.batching import Batch, plan_batches
from polyvec.inference.engines.torch import TorchEngine
from polyvec.model.config import ModelConfig, mini, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.weights import save_hf
from polyvec.tasks import NO_ADAPTER
from polyvec.training.utilisation import forward_flops, measured_peak

SHAPES = {"570m": ModelConfig, "mini": mini, "tiny": tiny}
Ids = list[np.ndarray]
Embed = Callable[[Ids, list[int]], np.ndarray]


def lengths_of(mix: str, count: int, longest: int) -> list[int]:
    rng = np.random.default_rng(0)
    if mix == "log-normal":
        return np.clip(rng.lognormal(np.log(60), 0.9, count), 8, longest).astype(int).tolist()
    return [min({"short": 16, "512": 512, "long": 8192}[mix], longest)] * max(1, count // (32 if mix == "long" else 1))


def random_encoder(config: ModelConfig) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config)
    randomise(encoder)
    return encoder


def packed(engine: TorchEngine) -> Embed:
    def embed(rows: Ids, tasks: list[int]) -> np.ndarray:
        out = np.empty((len(rows), engine.config.hidden_size), np.float32)
        for plan in plan_batches([len(row) for row in rows], batch_tokens=engine.batch_tokens):
            out[plan] = engine.pool(Batch.of([rows[i] for i in plan], [tasks[i] for i in plan]))
        return out

    return embed


def padded(model: Any, pad: int, batch_tokens: int, device: torch.device) -> Embed:
    @torch.inference_mode()
    def embed(rows: Ids, _: list[int]) -> np.ndarray:
        out = np.empty((len(rows), model.config.hidden_size), np.float32)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        start = 0
        while start < len(order):
            longest = len(rows[order[start]])
            plan = order[start : start + max(1, batch_tokens // longest)]
            ids = np.full((len(plan), longest), pad, np.int64)
            for place, i in enumerate(plan):
                ids[place, : len(rows[i])] = rows[i]
            tokens = torch.from_numpy(ids).to(device)
            mask = tokens != pad
            states = model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
            sums = (states * mask.unsqueeze(-1)).sum(1, dtype=torch.float32)
            out[plan] = (sums / mask.sum(1, keepdim=True)).cpu().numpy()
            start += len(plan)
        return out

    return embed


def open_peers(encoder: Encoder, device: torch.device, dtype: torch.dtype, batch_tokens: int) -> dict[str, Embed]:
    import tempfile
    from pathlib import Path

    from transformers import JinaEmbeddingsV3Model

    from polyvec import Embedder

    with tempfile.TemporaryDirectory() as folder:
        save_hf(encoder, Path(folder) / "hf", Embedder().folder / "tokenizer.json")
        found = {}
        for attention in ("sdpa", "flash_attention_2"):
            if attention == "flash_attention_2" and (find_spec("flash_attn") is None or device.type != "cuda"):
                print("flash_attn is not installed, or there is no GPU: transformers runs with sdpa alone")
                continue
            model = JinaEmbeddingsV3Model.from_pretrained(
                Path(folder) / "hf", attn_implementation=attention, dtype=dtype
            )
            name = f"transformers, {attention}"
            found[name] = padded(model.eval().to(device), encoder.config.pad_token_id, batch_tokens, device)
        return found


def seconds(embed: Embed, rows: Ids, tasks: list[int], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    embed(rows, tasks)  # returns arrays, so the GPU is done
    return time.perf_counter() - started


def peak_mb(device: torch.device) -> str:
    if device.type != "cuda":
        return "-"
    value = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="570m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mixes", nargs="+", default=["short", "512", "log-normal", "long"])
    parser.add_argument("--compile", action="store_true", help="Also polyvec with torch.compile.")
    options = parser.parse_args()
    device = torch.device(options.device)
    config = SHAPES[options.shape]()
    encoder = random_encoder(config)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = TorchEngine(encoder, device=options.device)
    peers = open_peers(encoder, device, dtype, engine.batch_tokens)
    systems = {"polyvec": packed(engine), **peers}
    if options.compile:
        systems["polyvec, compiled"] = packed(
            TorchEngine(random_encoder(config), device=options.device, compiler="inductor")
        )
    peak = measured_peak(device, bf16=dtype == torch.bfloat16)
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
    print(f"{chip}, {where('torch', 'transformers', 'flash_attn')}")
    print(f"{options.shape} shape, random weights, {dtype}, {options.repeats} alternating repeats, medians; products ")
    print(f"{peak / 1e12:.2g} trillion operations a second\n")
    print("| lengths | system | smallest cosine | tokens/s of polyvec's | of the peak | peak MB |")
    print("|---|---|---|---|---|---|")
    rng = np.random.default_rng(1)
    for mix in options.mixes:
        lengths = lengths_of(mix, options.texts, config.max_tokens)
        rows = [rng.integers(4, config.vocab_size, n).astype(np.int32) for n in lengths]
        none = [NO_ADAPTER] * len(rows)
        flops = sum(forward_flops(config, lengths))
        vectors, memory = {}, {}
        for name, embed in systems.items():  # also the warm-up of every shape
            peak_mb(device)
            vectors[name] = embed(rows, none)
            memory[name] = peak_mb(device)
        runs: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(options.repeats):
            for name, embed in systems.items():
                runs[name].append(seconds(embed, rows, none, device))
        ours = vectors["polyvec"]
        for name, own in runs.items():
            norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(vectors[name], axis=1)
            cosine = float(((ours * vectors[name]).sum(1) / norms).min())
            middle = statistics.median(own)
            ratio = statistics.median(runs["polyvec"]) / middle
            print(f"| {mix} | {name} | {cosine:.5f} | {ratio:.2f} | {flops / middle / peak:.0%} | {memory[name]} |")
    five = len(config.tasks)
    lengths = lengths_of("log-normal", options.texts, config.max_tokens)
    rows = [rng.integers(4, config.vocab_size, n).astype(np.int32) for n in lengths]
    kinds = {"none": [NO_ADAPTER] * len(rows), "one": [0] * len(rows), "five": [i % five for i in range(len(rows))]}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(options.repeats + 1):
        for kind, tasks in kinds.items():
            value = seconds(systems["polyvec"], rows, tasks, device)
            if repeat:  # the first warms up
                times[kind].append(value)
    base = statistics.median(times["none"])
    print("\n| tasks in a batch | time, none is 1 |\n|---|---|")
    for kind, own in times.items():
        print(f"| {kind} | {statistics.median(own) / base:.2f} |")


if __name__ == "__main__":
    main()
