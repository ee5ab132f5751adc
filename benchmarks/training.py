"""What an adapter costs to train against the whole model, on the same batch.

    python benchmarks/training.py [--layers 6 --hidden 384] [--batch 32 --tokens 128] [--repeats 5]

Each way of training is its own process, because peak memory is a process's. Times are medians of alternating repeats.
Memory is the growth of the resident set over a process that has loaded the same model and has not trained.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

from common import where

WAYS = (
    "whole model",
    "whole model, cached gradients",
    "adapters, base frozen",
    "adapters, cached gradients (as polyvec train does)",
)


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """Return megabytes over the loaded model and seconds a step of one way of training, in this process."""
    import torch

    from polyvec.losses import matryoshka, pair_loss
    from polyvec.model.config import mini
    from polyvec.model.encoder import Encoder
    from polyvec.model.pooling import mean_pool
    from polyvec.training.adapters import freeze_base, switch_dropout_off
    from polyvec.training.gradcache import cached_shares

    torch.manual_seed(0)
    config = mini(
        num_hidden_layers=options.layers, hidden_size=options.hidden, num_attention_heads=options.hidden // 32,
        intermediate_size=4 * options.hidden, vocab_size=options.vocabulary, matryoshka_dims=(32, options.hidden),
    )  # fmt: skip
    encoder = Encoder(config).train()
    switch_dropout_off(encoder)
    frozen = way.startswith("adapters")
    learning = freeze_base(encoder) if frozen else [p for n, p in encoder.named_parameters() if ".lora_" not in n]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    rows = torch.randint(4, config.vocab_size, (options.batch, options.tokens))
    cu_seqlens = torch.arange(0, 9 * options.tokens, options.tokens).int()

    def embed(part: torch.Tensor) -> torch.Tensor:
        tasks = torch.zeros(len(part), dtype=torch.long)
        return mean_pool(encoder(part.flatten(), cu_seqlens[: len(part) + 1], tasks), cu_seqlens[: len(part) + 1])

    def loss_of(embeddings: torch.Tensor) -> torch.Tensor:
        return matryoshka(pair_loss, embeddings[0::2], embeddings[1::2], dims=config.matryoshka_dims, temperature=0.05)

    parts, places = list(rows.split(8)), torch.arange(len(rows))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for step in range(options.steps + 1):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        if "cached" in way:
            places_of = lambda *_: (parts, places)  # noqa: E731
            for share in cached_shares(lambda encode: loss_of(encode([], None)), places_of, embed, seed=(step,)):
                share.backward()
        else:
            loss_of(torch.cat([embed(part) for part in parts])).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "megabytes": (peak - before) / 1024,
        "seconds": median(seconds[1:]),  # the first allocates
        "trained": sum(p.numel() for p in learning),
        "parameters": sum(p.numel() for p in encoder.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("layers", 6), ("hidden", 384), ("vocabulary", 40_000), ("batch", 32), ("tokens", 128),
                        ("steps", 3), ("repeats", 3)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.repeats):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[way].append(json.loads(done.stdout))
    print(where("torch"))
    shape = f"{options.layers} layers x {options.hidden}, {options.batch} texts of {options.tokens} tokens"
    print(f"{shape}, float32, AdamW\n")
    whole = {key: median(run[key] for run in runs[WAYS[0]]) for key in ("megabytes", "seconds")}
    print("| | trained parameters | memory over the loaded model | of the whole model | time a step |")
    print("|---|---|---|---|---|")
    for way, measured in runs.items():
        memory, seconds = (median(run[key] for run in measured) for key in ("megabytes", "seconds"))
        print(
            f"| {way} | {measured[0]['trained'] / measured[0]['parameters']:.1%} | {memory:,.0f} MB | "
            f"{memory / whole['megabytes']:.2f} | {seconds / whole['seconds']:.2f} |"
        )


if __name__ == "__main__":
    main()
