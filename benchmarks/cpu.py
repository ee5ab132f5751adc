"""polyvec against its peers on a CPU: same weights, same texts, same cores, side by side in one run.

    python benchmarks/cpu.py --infinity INFINITY/bin/python [--parts short log-normal long tasks]

Every system runs in a process of its own, so that memory and cold start are its own; repeats alternate between the
systems, so that a noisy neighbour hurts all alike. Outputs are compared: the smallest cosine of a text's vector to that
of polyvec's float32 graph stands beside each speed. "polyvec" is the engine that it chooses by itself.
The roofline is the time that the model's multiplications alone take at the rate of a large matrix product on these
cores, of the type that the system multiplies in, float32 or 8 bits, over the time that it took: 100 % is the limit of
the chip. Five tasks in turn, one task and none are compared with a graph of the same weights that holds no adapters.
Needs Linux, the ``dev`` extra, fastembed and openvino; infinity in an environment of its own, whose Python is named,
reads the weights as a RoFormer (see serving.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
from common import MAX_TOKENS, make_texts, matrix_rate, memory_mb, operations, where

from polyvec import Embedder
from polyvec.inference.engines.onnx import GRAPH_FILES
from polyvec.model.layouts import copy_companions, read_config

SYSTEMS = ("polyvec", "polyvec-float32", "sentence-transformers", "transformers", "fastembed", "openvino", "infinity")
MIXES = ("short", "log-normal", "long")


def texts_of(mix: str, count: int) -> list[str]:
    """Return texts with about as many tokens together as ``count`` of log-normal length: of 10 tokens, or of 1,500."""
    if mix == "log-normal":
        return make_texts(count)
    words = " ".join(make_texts(64, seed=1)).split()
    length, number = (4, 8 * count) if mix == "short" else (700, max(2, count // 14))
    rng = np.random.default_rng(2)
    return [" ".join(rng.choice(words, length)) for _ in range(number)]


def byte_rate(folder: Path, size: int = 2048, repeats: int = 5) -> float:
    """Return the operations a second of a large product of bytes, by the kernel that the int8 graph uses."""
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    left = rng.integers(0, 255, (size, size), dtype=np.uint8)
    constants = {
        "right": rng.integers(-63, 63, (size, size), dtype=np.int8), "zero": np.array(128, np.uint8),
        "step": np.array(1 / 127, np.float32), "scales": np.full(size, 0.01, np.float32),
    }  # fmt: skip
    node = helper.make_node(
        "MatMulIntegerToFloat", ["left", "right", "step", "scales", "zero"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node], "product", [helper.make_tensor_value_info("left", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size, size])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "product.onnx")
    session = ort.InferenceSession(folder / "product.onnx", providers=["CPUExecutionProvider"])
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        session.run(None, {"left": left})
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


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


def write_with_and_without_adapters(folder: Path) -> None:
    """Write polyvec-mini as ``full`` and, as ``bare``, with one adapter of rank 1 whose gate stays closed."""
    from polyvec.inference.export import export_onnx
    from polyvec.model.encoder import Encoder
    from polyvec.model.weights import load_encoder, save_encoder

    mini = load_encoder(Embedder().folder)
    bare = Encoder(dataclasses.replace(mini.config, prompts={"none": ""}, lora_rank=1))
    base = {name: tensor for name, tensor in mini.state_dict().items() if ".lora_" not in name}
    bare.load_state_dict(base, strict=False)
    for encoder, name in ((mini, "full"), (bare.eval(), "bare")):
        save_encoder(encoder, folder / name)
        copy_companions(Embedder().folder, folder / name)
        for precision in GRAPH_FILES:
            export_onnx(folder / name, precision=precision)


def mixed_tasks(folder: Path, texts: list[str], repeats: int) -> None:
    """Print the time of five tasks in turn, of one task and of none, over that of a graph without adapters."""
    write_with_and_without_adapters(folder)
    tasks = read_config(folder / "full").tasks
    print("\n| engine | no adapters in the graph | no task | one task | five tasks in turn |")
    print("|---|---|---|---|---|")
    for engine in ("onnx-int8", "onnx"):
        for threads, clock, how in (
            (1, time.process_time, "one thread, CPU time"),
            (None, time.perf_counter, "all cores"),
        ):
            bare = Embedder(folder / "bare", engine=engine, threads=threads)
            full = Embedder(folder / "full", engine=engine, threads=threads)
            ways = {
                "bare": lambda m=bare: m.encode(texts),
                "none": lambda m=full: m.encode(texts),
                "one": lambda m=full: m.encode(texts, task=tasks[0], prompt=""),
                "five": lambda m=full: m.encode(texts, task=[tasks[i % 5] for i in range(len(texts))], prompt=""),
            }  # no prompts: they are tokens more, not adapters
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats + 1):
                for way, call in ways.items():
                    started = clock()
                    call()
                    seconds[way].append(clock() - started)
            middle = {way: statistics.median(values[1:]) for way, values in seconds.items()}
            cells = " | ".join(f"{value / middle['bare']:.2f}" for value in middle.values())
            print(f"| {engine}, {how} | {cells} |", flush=True)


def write_openvino(folder: Path) -> None:
    """Convert the peers' weights, as transformers computes them, with OpenVINO's own converter."""
    import openvino as ov
    import torch
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder / "hf", attn_implementation="eager").eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = {"input_ids": torch.ones(2, 9, dtype=torch.long), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    ov.save_model(ov.convert_model(States(), example_input=example), folder / "openvino.xml", compress_to_fp16=False)


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
    if system == "openvino":
        import openvino as ov
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
        compiled = ov.Core().compile_model(folder / "openvino.xml", "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})

        def encode_openvino(texts: list[str]) -> np.ndarray:
            rows = []
            for start in range(0, len(texts), 32):
                inputs = tokenizer(texts[start : start + 32], padding=True, truncation=True, max_length=MAX_TOKENS,
                                   return_tensors="np")  # fmt: skip
                mask = inputs["attention_mask"]
                states = compiled({"input_ids": inputs["input_ids"], "attention_mask": mask})[0]
                means = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
                rows.append(means / np.linalg.norm(means, axis=1, keepdims=True))
            return np.concatenate(rows)

        return encode_openvino
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
    print(json.dumps({"open_seconds": first, "seconds": seconds, "peak_mb": memory_mb()}))


def run(system: str, folder: Path, infinity: str | None) -> dict[str, float]:
    """Return what ``work`` does, in a process of its own, and the seconds from the shell to the first vector."""
    paths = [str(folder / "texts.json"), str(folder / f"{system}.npy")]
    if system == "infinity":
        command = [str(infinity), "-W", "ignore", str(Path(__file__).parent / "infinity_peer.py")]
        command += [str(folder / "roformer"), *paths]
    else:
        command = [sys.executable, "-W", "ignore", __file__, "--work", system, str(folder), *paths]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{system} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "cold_seconds": time.time() - started - found["seconds"]}


def of_mix(mix: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure every system on texts of one mix and print its rows."""
    systems = [system for system in SYSTEMS if system != "infinity" or options.infinity]
    texts = texts_of(mix, options.texts)
    (folder / "texts.json").write_text(json.dumps(texts))
    mini = Embedder()
    lengths = [len(e) for e in mini.tokenizer.tokens_batch(texts, [""] * len(texts))]
    floats, bytes_ = matrix_rate(time.perf_counter), byte_rate(folder)
    runs: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for _ in range(options.repeats):
        for system in systems:
            runs[system].append(run(system, folder, options.infinity))
    vectors = {system: np.load(folder / f"{system}.npy") for system in systems}
    print(
        f"\n{mix}: {len(texts)} texts, {sum(lengths)} tokens, {options.repeats} alternating repeats, medians; products "
        f"of float32 {floats / 1e9:.0f} and of bytes {bytes_ / 1e9:.0f} billion operations a second\n"
    )
    columns = ("system", "smallest cosine to float32", "tokens/s of polyvec's", "roofline", "peak MB", "cold start s")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    ours = statistics.median(run["seconds"] for run in runs["polyvec"])
    for system in systems:
        cosine = float((vectors[system] * vectors["polyvec-float32"]).sum(axis=1).min())
        seconds, peak, cold = (
            statistics.median(run[key] for run in runs[system]) for key in ("seconds", "peak_mb", "cold_seconds")
        )
        rate = bytes_ if system == "polyvec" and mini.engine.name == "onnx-int8" else floats
        least = operations(lengths, mini.config) / rate
        cells = (f"{cosine:.5f}", f"{ours / seconds:.2f}", f"{least / seconds:.0%}", f"{peak:.0f}", f"{cold:.1f}")
        print(f"| {system} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=120, help="Of log-normal length; the other mixes have as much.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=(*MIXES, "tasks"), default=[*MIXES, "tasks"])
    parser.add_argument("--infinity", help="The Python of an environment with infinity-emb.")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.work:
        system, *paths = options.work
        work(system, *map(Path, paths))
        return
    print(where("torch", "sentence-transformers", "transformers", "fastembed", "openvino"))
    print(f"polyvec chose {Embedder().engine.name}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if set(options.parts) & set(MIXES):
            write_peers(folder)
            write_openvino(folder)
            if options.infinity:
                from serving import write_roformer

                write_roformer(folder / "roformer")
        for part in options.parts:
            if part == "tasks":
                mixed_tasks(folder, make_texts(options.texts)[:64], options.repeats)
            else:
                of_mix(part, folder, options)


if __name__ == "__main__":
    main()
