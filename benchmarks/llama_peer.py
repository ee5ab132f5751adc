"""llama.cpp on token ids, in an environment of its own with llama-cpp-python and gguf (see large.py).

    LLAMA/bin/python benchmarks/llama_peer.py write MODEL.safetensors MODEL.gguf THETA
    LLAMA/bin/python benchmarks/llama_peer.py run MODEL.gguf IDS.json VECTORS.npy

``write`` turns the weights that transformers reads, in float32, into 8-bit blocks (Q8_0); it has no vocabulary, so that
``run``, on one thread, is given the ids of another's tokenizer, whose time does not count against it.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys
import time
from pathlib import Path

import numpy as np

MODULES = {
    "encoder.layers.{i}.mixer.Wqkv": "blk.{i}.attn_qkv",
    "encoder.layers.{i}.mixer.out_proj": "blk.{i}.attn_output",
    "encoder.layers.{i}.norm1": "blk.{i}.attn_output_norm",
    "encoder.layers.{i}.mlp.fc1": "blk.{i}.ffn_up",
    "encoder.layers.{i}.mlp.fc2": "blk.{i}.ffn_down",
    "encoder.layers.{i}.norm2": "blk.{i}.layer_output_norm",
}


def write(source: Path, target: Path, theta: float) -> None:
    import gguf

    with source.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    data = np.memmap(source, np.uint8, "r", offset=8 + size)

    def tensor(name: str) -> np.ndarray:
        first, last = header[name]["data_offsets"]
        return data[first:last].view(np.float32).reshape(header[name]["shape"])

    layers = 1 + max(int(name.split(".")[2]) for name in header if name.startswith("encoder.layers."))
    vocabulary, width = header["embeddings.word_embeddings.weight"]["shape"]
    names = {
        "embeddings.word_embeddings.weight": "token_embd.weight",
        "embeddings.token_type_embeddings.weight": "token_types.weight",
        "emb_ln.weight": "token_embd_norm.weight",
        "emb_ln.bias": "token_embd_norm.bias",
    }
    for i in range(layers):
        for theirs, ours in MODULES.items():
            for kind in ("weight", "bias"):
                names[f"{theirs}.{kind}".replace("{i}", str(i))] = f"{ours}.{kind}".replace("{i}", str(i))
    writer = gguf.GGUFWriter(target, "jina-bert-v3")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(header["encoder.layers.0.mlp.fc1.weight"]["shape"][0])
    writer.add_head_count(width // 64)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(vocabulary)
    writer.add_token_type_count(1)
    writer.add_tokenizer_model("none")
    for theirs, ours in names.items():
        value = tensor(theirs)
        if value.ndim == 2 and len(value) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(ours, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(ours, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(model: Path, ids_path: Path, output: Path) -> dict[str, float]:
    """Return CPU seconds to the first vector and for all rows, memory after each; write the vectors."""
    import llama_cpp as ll

    started = time.process_time()
    ll.llama_backend_init()
    ll.llama_log_set(_QUIET, ctypes.c_void_p(0))
    how = ll.llama_model_default_params()
    # Its AMX kernels end in a segmentation fault (llama-cpp-python 0.3.36, 2026-11-26).
    how.use_extra_bufts = "amx_tile" not in Path("/proc/cpuinfo").read_text()
    loaded = ll.llama_model_load_from_file(str(model).encode(), how)
    if not loaded:
        raise SystemExit(f"llama.cpp must read {model}, and did not")
    options = ll.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 8192
    options.n_seq_max = 1
    options.n_threads = options.n_threads_batch = 1
    options.embeddings = True
    options.pooling_type = ll.LLAMA_POOLING_TYPE_MEAN
    context = ll.llama_init_from_model(loaded, options)
    width = ll.llama_model_n_embd(loaded)

    def embed(ids: list[int]) -> np.ndarray:
        batch = ll.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        if ll.llama_encode(context, batch):
            raise SystemExit("llama_encode failed")
        vector = np.ctypeslib.as_array(ll.llama_get_embeddings_seq(context, 0), (width,)).copy()
        ll.llama_batch_free(batch)
        return vector / np.linalg.norm(vector)

    embed([0, 5, 2])
    first, opened = time.process_time() - started, memory("VmRSS")
    rows = json.loads(ids_path.read_text())
    started = time.process_time()
    vectors = np.stack([embed(row) for row in rows])
    seconds = time.process_time() - started
    np.save(output, vectors)
    return {"first": first, "seconds": seconds, "opened_mb": opened, "peak_mb": memory("VmHWM")}


def memory(field: str) -> float:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 1024


_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    if verb == "write":
        write(Path(paths[0]), Path(paths[1]), float(paths[2]))
    else:
        print(json.dumps(run(*map(Path, paths))))
