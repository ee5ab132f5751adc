"""How the cost of polyvec on a CPU grows: with length, batch, number of texts and adapters; and the budget of a pass.

    python benchmarks/scaling.py [--curve length batch texts adapters budget] [--texts 1000 10000 100000 1000000]

CPU seconds, of one thread but for texts and budget, which take all cores: what other processes do on the machine then
hardly matters. Each curve is fitted by least squares in logarithms, time ~ x ** exponent; the explanation under it says
what the exponent must be and why. Memory is the growth of the peak of what is resident over the loaded model. Needs
Linux and the ``export`` extra.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from common import forget_peak, make_texts, memory_mb, where

from polyvec import Embedder
from polyvec.inference.batching import Batch
from polyvec.inference.engines import Engine
from polyvec.inference.engines.onnx import GRAPH_FILES, OnnxEngine
from polyvec.inference.export import export_onnx
from polyvec.model.config import ModelConfig, mini
from polyvec.model.encoder import Encoder
from polyvec.model.weights import load_encoder, save_encoder

LENGTHS = [2**i for i in range(4, 14)]
BATCHES = [2**i for i in range(8)]
ADAPTERS = (5, 10, 20, 50, 100)
BUDGETS = (128, 192, 256, 384, 512, 768, 1024)
BUDGET_TEXTS, BUDGET_TURNS = 512, 2


def cpu_seconds(call: Callable[[], object], least: float = 1.0) -> float:
    """Return the fewest CPU seconds of a call, of as many as fit into ``least`` seconds, and of two in any case."""
    call()  # the first allocates
    runs: list[float] = []
    while len(runs) < 2 or sum(runs) < least:
        started = time.process_time()
        call()
        runs.append(time.process_time() - started)
    return min(runs)


def exponent(x: Sequence[float], seconds: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(seconds), 1)[0])


def random_batch(config: ModelConfig, count: int, length: int, num_tasks: int = 1) -> Batch:
    rng = np.random.default_rng(0)
    rows = [rng.integers(4, config.vocab_size, length, dtype=np.int32) for _ in range(count)]
    return Batch.of(rows, [i % num_tasks for i in range(count)])


def engines(folder: Path) -> dict[str, Engine]:
    import torch

    from polyvec.inference.engines.torch import TorchEngine

    torch.set_num_threads(1)
    encoder = load_encoder(folder)
    ours = {name: OnnxEngine(folder / file, encoder.config, threads=1) for name, file in GRAPH_FILES.items()}
    return {"onnx-int8": ours["int8"], "onnx-float32": ours["fp32"], "torch-float32": TorchEngine(encoder)}


def length_curve(folder: Path) -> None:
    """One text of n tokens."""
    print("\n## Length\n\nOne text of n tokens; milliseconds a thousand tokens, and MB over the loaded model.\n")
    print("| n | " + " | ".join(f"{name} ms/1000 | MB" for name in engines(folder)) + " |")
    print("|---|" + "---|---|" * 3)
    seconds: dict[str, list[float]] = {}
    for length in LENGTHS:
        cells = []
        for name, engine in engines(folder).items():
            batch = random_batch(engine.config, 1, length)
            forget_peak()
            before = memory_mb("VmRSS")
            seconds.setdefault(name, []).append(cpu_seconds(lambda e=engine, b=batch: e.pool(b)))  # type: ignore[misc]
            cells.append(f"{seconds[name][-1] * 1e6 / length:.1f} | {memory_mb() - before:.0f}")
        print(f"| {length} | " + " | ".join(cells) + " |", flush=True)
    config = mini()
    per_layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    crossing = per_layer / (2 * config.hidden_size)
    for name, values in seconds.items():
        ends = exponent(LENGTHS[:4], values[:4]), exponent(LENGTHS[-3:], values[-3:])
        print(f"\n{name}: exponent {ends[0]:.2f} from {LENGTHS[0]} to {LENGTHS[3]}, {ends[1]:.2f} from {LENGTHS[-3]}.")
    print(
        f"\nExpected: products with weights grow as n, attention as n ** 2; by operations the two are equal at "
        f"{crossing:.0f} tokens, so the exponent goes from 1 (below it, at the shortest lengths, by what a call costs "
        "however short) to 2. Memory grows as n: no engine holds n x n scores."
    )


def batch_curve(folder: Path) -> None:
    print("\n## Batch\n\nB texts of 64 tokens, five tasks in turn; milliseconds a text.\n")
    print("| B | onnx-int8 | onnx-float32 |\n|---|---|---|")
    opened = {name: engine for name, engine in engines(folder).items() if name.startswith("onnx")}
    seconds: dict[str, list[float]] = {name: [] for name in opened}
    for count in BATCHES:
        for name, engine in opened.items():
            batch = random_batch(engine.config, count, 64, 5)
            seconds[name].append(cpu_seconds(lambda e=engine, b=batch: e.pool(b)))  # type: ignore[misc]
        print(f"| {count} | " + " | ".join(f"{v[-1] * 1e3 / count:.2f}" for v in seconds.values()) + " |", flush=True)
    for name, values in seconds.items():
        print(f"\n{name}: exponent {exponent(BATCHES, values):.2f}.")
    print(
        "\nExpected 1 where products dominate; what one call costs whatever its size pulls small batches below it, "
        "buffers that leave the cache push those beyond 1,024 tokens (B = 16) above it."
    )


def texts_curve(folder: Path, counts: Sequence[int]) -> None:
    model = Embedder(folder, engine="onnx-int8")
    short = [" ".join(text.split()[:4]) for text in make_texts(1000)]
    mean = sum(found.num_tokens for found in model.encode_stream(short)) / len(short)
    print(f"\n## Number of texts\n\nTexts of {mean:.0f} tokens through `encode_stream`, whole path, all cores.\n")
    print("| texts | seconds | texts/s | CPU ms/text | MB over the loaded model |\n|---|---|---|---|---|")
    model.encode(short * 5)  # opens what stands beside
    seconds = []
    for count in counts:
        forget_peak()
        before = memory_mb("VmRSS")
        started, by_clock = time.process_time(), time.perf_counter()
        for _ in model.encode_stream(short[i % len(short)] for i in range(count)):
            pass
        by_clock = time.perf_counter() - by_clock
        seconds.append(time.process_time() - started)
        cells = (f"{by_clock:.1f}", f"{count / by_clock:,.0f}", f"{seconds[-1] * 1e3 / count:.3f}")
        print(f"| {count:,} | " + " | ".join(cells) + f" | {memory_mb() - before:.0f} |", flush=True)
    print(f"\nExponent {exponent(counts, seconds):.3f}. Expected 1: blocks of 1,024 texts know nothing of each other.")


def budget_curve(folder: Path) -> None:
    """Tokens of a pass, on the whole path: what a budget chosen on each machine could gain over a fixed one."""
    print("\n## Budget of a pass\n\nCPU ms a thousand tokens, texts of log-normal length; the least of turns.\n")
    kinds = {
        "onnx-int8": Embedder(folder, engine="onnx-int8"),
        "onnx-int8, one thread": Embedder(folder, engine="onnx-int8", threads=1),
        "onnx-float32": Embedder(folder, engine="onnx"),
    }
    texts = make_texts(BUDGET_TEXTS)
    tokens = sum(found.num_tokens for found in kinds["onnx-int8"].encode_stream(texts))
    print("| tokens of a pass | " + " | ".join(kinds) + " |\n|---|" + "---|" * len(kinds))
    least = {(kind, budget): float("inf") for kind in kinds for budget in BUDGETS}
    for _ in range(BUDGET_TURNS):
        for kind, budget in least:
            started = time.process_time()
            kinds[kind].encode(texts, batch_tokens=budget)
            least[kind, budget] = min(least[kind, budget], time.process_time() - started)
    for budget in BUDGETS:
        print(f"| {budget} | " + " | ".join(f"{least[kind, budget] * 1e6 / tokens:.1f}" for kind in kinds) + " |")
    for kind, model in kinds.items():
        fixed = model.engine.lane_tokens if model.engine.lanes > 1 else model.engine.batch_tokens
        best = min(BUDGETS, key=lambda budget: least[kind, budget])  # noqa: B023
        gain = least[kind, fixed] / least[kind, best] - 1
        print(f"\n{kind}: fixed at {fixed}; the best of these, {best}, would gain {gain:.1%}.")


def adapters_curve(folder: Path) -> None:
    """Resident adapters against those that a batch names."""
    print("\n## Adapters\n\n128 texts of 8 tokens, int8 graph; time against a batch that names one of five.\n")
    print("| resident adapters | batch names one | names five | names all |\n|---|---|---|---|")
    first = 0.0
    names: dict[str, list[float]] = {"one": [], "five": [], "all": []}
    for count in ADAPTERS:
        config = mini(prompts={f"task-{i}": "" for i in range(count)})
        encoder = Encoder(config)
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.02)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            save_encoder(encoder.eval(), temporary)
            export_onnx(temporary, precision="int8")
            engine = OnnxEngine(Path(temporary) / GRAPH_FILES["int8"], config, threads=1)
        cells = []
        for name, number in (("one", 1), ("five", 5), ("all", count)):
            batch = random_batch(config, 128, 8, number)
            value = cpu_seconds(lambda e=engine, b=batch: e.pool(b))  # type: ignore[misc]
            first = first or value
            names[name].append(value)
            cells.append(f"{value / first:.2f}")
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)
    slopes = ", ".join(f"{name} {exponent(ADAPTERS, values):.2f}" for name, values in names.items())
    print(
        f"\nExponents over 5 to 100 resident adapters: {slopes}. Expected 0 for a fixed number of named ones: "
        "the graph gathers their factors alone. A batch that names all pays rank columns more in every product for "
        "each, beside the base's own work: far below 1 until the columns outnumber the hidden size."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", nargs="+", choices=("length", "batch", "texts", "adapters", "budget"), default=[])
    parser.add_argument("--texts", nargs="+", type=int, default=[1000, 10_000, 100_000], help="Numbers of texts.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    curves = options.curve or ["length", "batch", "texts", "adapters", "budget"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mini"
        shutil.copytree(Embedder().folder, folder, ignore=shutil.ignore_patterns("*.onnx", "*.bin"))
        for precision in GRAPH_FILES:
            export_onnx(folder, precision=precision)
        print(where("torch"), flush=True)
        if "length" in curves:
            length_curve(folder)
        if "batch" in curves:
            batch_curve(folder)
        if "texts" in curves:
            texts_curve(folder, options.texts)
        if "adapters" in curves:
            adapters_curve(folder)
        if "budget" in curves:
            budget_curve(folder)


if __name__ == "__main__":
    main()
