"""The 570M shape on a CPU: how soon, in how much memory and how fast, beside peers on the same weights.

    python benchmarks/large.py --folder /tmp/570m --texts 16 --repeats 3

The weights are random, of the shape of jina-embeddings-v3, in bfloat16 as published: speed and memory do not depend on
their values. A folder that exists is used again. Every run is a process of its own, on one thread, measured in CPU
seconds, which other processes on the machine hardly touch; repeats alternate between systems; outputs are compared
before anything is said about speed. Random weights give every text nearly the same vector, so the
cosine to float32 is also given with the mean over texts taken away, where nothing hides behind what all share. With
``--llama PYTHON``, of an environment with llama-cpp-python and gguf, llama.cpp joins with 8-bit blocks of weights.
Needs Linux, the ``dev`` extra, 6 GB of memory and 6 GB of disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from common import make_texts, matrix_rate, memory_mb, operations, randomise, where

from polyvec import Embedder
from polyvec.inference.quantize import smallest_cosine
from polyvec.model.config import ModelConfig
from polyvec.model.hub import resolve_model_folder
from polyvec.text.tokenizer import Tokenizer

SYSTEMS = ("polyvec-int8", "polyvec-torch", "sentence-transformers", "transformers", "llama.cpp, Q8_0")
LENGTHS = (16, 128, 512, 2048, 8192)


def write_models(folder: Path) -> None:
    """Write our layout with its int8 graph into ``folder/ours`` and transformers' layout into ``folder/hf``."""
    import torch

    from polyvec.inference.export import export_onnx
    from polyvec.model.encoder import Encoder
    from polyvec.model.weights import load_encoder, save_encoder, save_hf

    ours, tokenizer = folder / "ours", folder / "ours" / "tokenizer.json"
    if not (ours / "model.safetensors").exists():
        torch.manual_seed(0)
        with torch.device("meta"):
            encoder = Encoder(ModelConfig())
        encoder.to_empty(device="cpu")
        randomise(encoder)
        save_encoder(encoder, ours, dtype=torch.bfloat16)
        tokenizer.write_text(json.dumps(grown_tokenizer(), ensure_ascii=False), encoding="utf-8")
    if not (ours / "model.int8.onnx").exists():
        print(f"int8 graph: {export_onnx(ours, precision='int8')}", file=sys.stderr)
    if not (folder / "hf").exists():
        save_hf(load_encoder(ours), folder / "hf", tokenizer)


def grown_tokenizer() -> dict[str, Any]:
    """Return polyvec-mini's tokenizer with as many pieces as XLM-RoBERTa's: each new one is an old one and a letter.

    Pieces share their beginnings, as real ones do, so the search tree over them takes the memory that a real one takes.
    """
    state: dict[str, Any] = json.loads((resolve_model_folder(None) / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = state["model"]["vocab"]
    known = {piece for piece, _ in vocab}
    unlikely = min(score for _, score in vocab) - 10
    words = [piece for piece, _ in vocab if len(piece) > 2 and piece[-1].isalpha()]
    longer = (word + letter for letter in "aeinrstolkm" for word in words if word + letter not in known)
    vocab += [[piece, unlikely] for piece in itertools.islice(longer, ModelConfig().vocab_size - len(vocab))]
    return state


def open_system(system: str, folder: Path):  # type: ignore[no-untyped-def]
    """Return a function from texts to (B, D) unit vectors, each library used as its documentation says."""
    if system.startswith("polyvec"):
        model = Embedder(folder / "ours", engine="torch" if system.endswith("torch") else "onnx-int8", threads=1)
        return lambda texts: model.encode(texts)
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
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=8192, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        mask = inputs["attention_mask"].unsqueeze(-1)
        states = hf(**inputs).last_hidden_state
        return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).numpy()

    return encode


def work(system: str, folder: Path, output: str) -> dict[str, float]:
    """One process, one system: seconds to the first vector and for all texts, memory after each, vectors to a file."""
    started = time.process_time()
    encode = open_system(system, folder)
    encode(["first"])
    first = time.process_time() - started
    opened = memory_mb("VmRSS")
    texts = json.loads((folder / "texts.json").read_text())
    started = time.process_time()
    vectors = encode(texts)
    seconds = time.process_time() - started
    np.save(output, np.asarray(vectors, np.float32))
    return {"first": first, "seconds": seconds, "opened_mb": opened, "peak_mb": memory_mb()}


def ceiling(folder: Path, length: int) -> dict[str, float]:
    """One process: peak memory of the int8 graph at one text of ``length`` tokens."""
    model = Embedder(folder / "ours", engine="onnx-int8", threads=1)
    text = " ".join(make_texts(length, seed=length))[: 40 * length]  # far more than fits: cut to the length by tokens
    encoding = model.tokenizer.encode(text, max_tokens=length)
    kept = text[: int(encoding.offsets[-2, 1])]
    started = time.process_time()
    model.encode(kept)
    return {"tokens": len(encoding), "seconds": time.process_time() - started, "peak_mb": memory_mb()}


def run(folder: Path, *arguments: str, llama: str = "") -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--folder", str(folder), "--work", *arguments]
    if arguments[0].startswith("llama"):
        command = [llama, str(Path(__file__).parent / "llama_peer.py"), "run", str(folder / "model.gguf")]
        command += [str(folder / "ids.json"), arguments[1]]
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **one})
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-2000:]}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prepare", action="store_true", help="Write the models and stop.")
    parser.add_argument("--lengths", action="store_true", help="Peak memory of int8 by length instead of the systems.")
    parser.add_argument("--llama", default="", help="The Python of an environment with llama-cpp-python and gguf.")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder: Path = options.folder
    if options.work:
        warnings.simplefilter("ignore")
        what, *rest = options.work
        if what == "rate":
            print(json.dumps({"operations_per_second": matrix_rate(time.process_time)}))
        else:
            print(json.dumps(ceiling(folder, int(rest[0])) if what == "ceiling" else work(what, folder, *rest)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_models(folder)
    if options.llama and not (folder / "model.gguf").exists():
        theta = str(ModelConfig().rope_theta)
        paths = [str(folder / "hf" / "model.safetensors"), str(folder / "model.gguf")]
        subprocess.run(
            [options.llama, str(Path(__file__).parent / "llama_peer.py"), "write", *paths, theta], check=True
        )
    if options.prepare:
        return
    print(where("torch", "sentence-transformers", "transformers") + "; one thread, CPU seconds", flush=True)
    if options.lengths:
        print("\n| tokens of one text | peak MB of polyvec-int8 | s |\n|---|---|---|")
        for length in LENGTHS:
            found = run(folder, "ceiling", str(length))
            print(f"| {found['tokens']} | {found['peak_mb']:.0f} | {found['seconds']:.1f} |", flush=True)
        return
    texts = make_texts(options.texts)
    (folder / "texts.json").write_text(json.dumps(texts))
    config = ModelConfig()
    path = folder / "ours" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(path, vocab_size=config.vocab_size, bos_token_id=0, eos_token_id=2)
    ids = [e.input_ids.tolist() for e in tokenizer.tokens_batch(texts, [""] * len(texts))]
    (folder / "ids.json").write_text(json.dumps(ids))
    lengths = [len(row) for row in ids]
    systems = [system for system in SYSTEMS if options.llama or not system.startswith("llama")]
    runs: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for _ in range(options.repeats):
        for system in systems:
            runs[system].append(run(folder, system, str(folder / f"{system}.npy"), llama=options.llama))
    vectors = {system: np.load(folder / f"{system}.npy") for system in systems}
    exact = vectors["transformers"]
    rate = run(folder, "rate")["operations_per_second"]
    print(f"{len(texts)} texts, {sum(lengths)} tokens, {options.repeats} alternating repeats, medians; ", end="")
    print(f"float32 products {rate / 1e9:.0f} billion operations a second\n")
    print("| system | smallest cosine | centred | tokens/s of polyvec-int8's | of the matrix rate | ", end="")
    print("first vector s | MB after it | peak MB |\n|---|---|---|---|---|---|---|---|")
    middle = {s: {k: statistics.median(r[k] for r in runs[s]) for k in runs[s][0]} for s in systems}
    for system, m in middle.items():
        plain = smallest_cosine(vectors[system], exact)
        centred = smallest_cosine(vectors[system] - exact.mean(0), exact - exact.mean(0))
        print(
            f"| {system} | {plain:.5f} | {centred:.5f} | {middle['polyvec-int8']['seconds'] / m['seconds']:.2f} | "
            f"{operations(lengths, config) / rate / m['seconds']:.0%} | {m['first']:.1f} | {m['opened_mb']:.0f} | "
            f"{m['peak_mb']:.0f} |"
        )


if __name__ == "__main__":
    main()
