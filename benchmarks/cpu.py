"""polyvec against its peers on a CPU: same weights, same texts, same cores, side by side in one run.

    python benchmarks/cpu.py --texts 64 --repeats 3

Every system runs in a process of its own, so that memory and cold start are its own; repeats alternate between the
systems, so that a noisy neighbour hurts all alike. Outputs are compared: the smallest cosine of a text's vector to that
of polyvec's float32 graph stands beside each speed. "polyvec" is the engine that it chooses by itself.
"Of the matrix rate" is the time that the model's multiplications alone take at the rate of a large float32 matrix
product on these cores, over the time the system took: 100 % is the limit of the chip for float32.
Needs Linux, the ``dev`` extra and fastembed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np

from polyvec import Embedder
from polyvec.model.config import ModelConfig
from polyvec.samples import corpus

SYSTEMS = ("polyvec", "polyvec-float32", "sentence-transformers", "transformers", "fastembed")
PACKAGES = ("polyvec", "torch", "onnxruntime", "sentence-transformers", "transformers", "fastembed")
MAX_TOKENS = 8192


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of log-normal length, median 60 tokens, to 8192, of words in many languages."""
    rng = np.random.default_rng(seed)
    words = [word for row in corpus() for word in row["text"].split()]
    lengths = np.clip(rng.lognormal(np.log(60), 0.9, count), 3, MAX_TOKENS) / 2  # about two tokens a word
    return [" ".join(rng.choice(words, int(length) + 1)) for length in lengths]


def write_peers(folder: Path) -> None:
    """Write polyvec-mini's base weights as transformers reads them, and as a graph that fastembed can run."""
    import onnx

    from polyvec.model.weights import load_encoder, save_hf

    mini = Embedder().folder
    save_hf(load_encoder(mini), folder / "hf", mini / "tokenizer.json")
    model = onnx.load(mini / "model.onnx", load_external_data=False)
    keep = [i for i in model.graph.input if i.name != "task_ids"]  # fastembed knows no tasks: the base for every row
    del model.graph.input[:]
    model.graph.input.extend(keep)
    one = onnx.numpy_helper.from_array(np.array([1], np.int64), "bench.one")
    zero = onnx.numpy_helper.from_array(np.array([0], np.int64), "bench.zero")
    model.graph.initializer.extend([one, zero])
    base = onnx.helper.make_tensor("value", onnx.TensorProto.INT64, [1], [-1])
    nodes = [
        onnx.helper.make_node("Shape", ["input_ids"], ["bench.shape"]),
        onnx.helper.make_node("Slice", ["bench.shape", "bench.zero", "bench.one"], ["bench.rows"]),
        onnx.helper.make_node("ConstantOfShape", ["bench.rows"], ["task_ids"], value=base),
        *model.graph.node,
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    outputs = {o.name: o for o in model.graph.output}
    del model.graph.output[:]
    model.graph.output.extend([outputs["token_states"], outputs["pooled"]])  # fastembed takes the first one
    target = folder / "fastembed"
    target.mkdir()
    (target / "model.safetensors").write_bytes((mini / "model.safetensors").read_bytes())
    onnx.save_model(model, target / "model.onnx")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (target / name).write_bytes((folder / "hf" / name).read_bytes())
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (target / "special_tokens_map.json").write_text(json.dumps(special))


def matrix_rate(size: int = 2048, repeats: int = 5) -> float:
    """Return the float32 operations a second of a large matrix product on all cores: what no float32 model exceeds."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = time.time()
        a @ b
        seconds.append(time.time() - started)
    return 2 * size**3 / min(seconds)


def operations(lengths: list[int], config: ModelConfig) -> float:
    """Return what the base encoder must multiply and add for texts of these token counts, padding not included."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linear = 2 * layers * (4 * width**2 + 2 * width * inner) * sum(lengths)
    return linear + 4 * layers * width * sum(n * n for n in lengths)


def open_system(system: str, folder: Path):  # type: ignore[no-untyped-def]
    """Return a function from texts to (B, D) unit vectors, each library used as its documentation says."""
    if system.startswith("polyvec"):
        model = Embedder(engine="onnx" if system.endswith("float32") else "auto")
        return lambda texts: model.encode(texts)
    if system == "fastembed":
        from fastembed import TextEmbedding
        from fastembed.common.model_description import ModelSource, PoolingType

        TextEmbedding.add_custom_model(
            "bench/mini", pooling=PoolingType.MEAN, normalization=True, sources=ModelSource(hf="bench/mini"), dim=384,
            model_file="model.onnx",
        )  # fmt: skip
        fast = TextEmbedding("bench/mini", specific_model_path=str(folder / "fastembed"))
        return lambda texts: np.stack(list(fast.embed(texts, batch_size=32)))
    if system == "sentence-transformers":
        from sentence_transformers import SentenceTransformer

        st = SentenceTransformer(str(folder / "hf"), device="cpu")
        return lambda texts: st.encode(texts, batch_size=32)
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    hf = AutoModel.from_pretrained(folder / "hf").eval()

    @torch.inference_mode()
    def encode(texts: list[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), 32):
            part = texts[start : start + 32]
            inputs = tokenizer(part, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            inputs.pop("token_type_ids", None)
            mask = inputs["attention_mask"].unsqueeze(-1)
            states = hf(**inputs).last_hidden_state
            rows.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(rows).numpy()

    return encode


def work(system: str, folder: Path, texts_path: Path, output: Path) -> None:
    """One process, one system: time to the first vector, then seconds for all texts, peak memory, vectors to a file."""
    started = time.time()
    encode = open_system(system, folder)
    encode(["first"])
    first = time.time() - started
    texts = json.loads(texts_path.read_text())
    started = time.time()
    vectors = encode(texts)
    seconds = time.time() - started
    np.save(output, np.asarray(vectors, np.float32))
    # Not getrusage: its peak starts at the size of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024
    print(json.dumps({"open_seconds": first, "seconds": seconds, "peak_mb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.work:
        system, *paths = options.work
        work(system, *map(Path, paths))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_peers(folder)
        texts = make_texts(options.texts)
        (folder / "texts.json").write_text(json.dumps(texts))
        mini = Embedder()
        lengths = [len(e) for e in mini.tokenizer.encode_batch(texts, [""] * len(texts))]
        least = operations(lengths, mini.config) / matrix_rate()
        runs: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
        vectors = {}
        for _ in range(options.repeats):
            for system in SYSTEMS:
                output = folder / f"{system}.npy"
                command = [
                    sys.executable,
                    "-W",
                    "ignore",
                    __file__,
                    "--work",
                    system,
                    folder,
                    folder / "texts.json",
                    output,
                ]
                started = time.time()
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise SystemExit(f"{system} failed:\n{result.stderr[-2000:]}")
                run = json.loads(result.stdout.splitlines()[-1])
                run["cold_seconds"] = time.time() - started - run["seconds"]  # from the shell to the first vector
                runs[system].append(run)
                vectors[system] = np.load(output)
        print(f"{platform.processor() or platform.machine()}, {platform.python_version()}, ", end="")
        print(", ".join(f"{name} {version(name)}" for name in PACKAGES))
        print(f"polyvec chose {mini.engine.name}")
        print(f"{len(texts)} texts, {sum(lengths)} tokens, {options.repeats} alternating repeats, medians\n")
        columns = ("system", "smallest cosine to float32", "tokens/s of polyvec's", "of the matrix rate", "peak MB")
        print("| " + " | ".join((*columns, "cold start s")) + " |")
        print("|---|---|---|---|---|---|")
        ours = statistics.median(run["seconds"] for run in runs["polyvec"])
        for system in SYSTEMS:
            cosine = float((vectors[system] * vectors["polyvec-float32"]).sum(axis=1).min())
            seconds, peak, cold = (
                statistics.median(run[key] for run in runs[system]) for key in ("seconds", "peak_mb", "cold_seconds")
            )
            print(
                f"| {system} | {cosine:.5f} | {ours / seconds:.2f} | {least / seconds:.0%} | {peak:.0f} | {cold:.1f} |"
            )


if __name__ == "__main__":
    main()
