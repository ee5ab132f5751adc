"""The encoder as an ONNX graph, written node by node from our own weights and checked against them before it is kept.

Inputs ``input_ids`` (B, T) int64, ``attention_mask`` (B, T) int64, ``task_ids`` (B,) int64 with -1 for no adapter;
outputs ``pooled`` (B, D), the mean over real tokens, and ``token_states`` (B, T, D). All adapters are resident and
chosen per row, as in ``polyvec.model.lora``; a batch pays for the adapters that its texts name and for no other.
Attention and rotary positions are ONNX Runtime's fused operators.

Neither graph holds large weights. The word table of both and all weights of the fp32 graph are those of
``model.safetensors`` beside it: nothing is stored twice, and half-precision weights become float32 when the session
opens, those of the table as they are read. The 8-bit codes of the int8 graph's layers lie in a file of their own. ONNX
Runtime maps both files into memory: a model may pass the 2 GB of a protobuf, and of the table only the rows that texts
touch are ever read.

Shape letters: B texts, T padded tokens, N = B * T, D width, I and O inputs and outputs of a linear layer, H heads,
K head width, A adapters, n of them named in the batch, R rank, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyvec.atomic import whole_file
from polyvec.errors import InputError, MissingExtraError, WeightsError
from polyvec.inference.batching import Batch
from polyvec.inference.engines.onnx import GRAPH_FILES, OnnxEngine
from polyvec.inference.engines.torch import TorchEngine
from polyvec.inference.quantize import smallest_cosine
from polyvec.model.config import ModelConfig
from polyvec.model.encoder import Encoder, Layer
from polyvec.model.layouts import detect_layout
from polyvec.model.lora import AdaptedEmbedding, AdaptedLinear
from polyvec.model.weights import load_encoder

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise MissingExtraError.of("writing ONNX", "export") from error

OPSET = 20
_MS = "com.microsoft"
# Weights of an int8 matrix keep to 7 bits: without VNNI, ONNX Runtime adds two products of a uint8 and an int8 in 16
# bits, where 2 * 255 * 63 fits and 2 * 255 * 127 does not.
_WEIGHT_PEAK = 63
_GELU_SHIFT = 0.17  # GELU is never below -0.16998
_GELU_ZERO = 32  # its code of 0; the 223 above it are for what is above 0
_CODES_FILE = "model.int8.{}.bin"  # named by its content: a graph never points into the codes of another
_HIDDEN = 1e6  # what a padded key loses in its score; its weight is then exactly 0 in float32
_STORED = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Parity:
    """How far a written graph is from the encoder: the largest error of fp32 states, the smallest cosine of vectors."""

    max_abs_error: float
    min_cosine: float


#: What a graph must reach to be kept: fp32 by its states, int8 by its vectors.
LIMITS = {"fp32": Parity(max_abs_error=1e-4, min_cosine=0.999999), "int8": Parity(float("inf"), min_cosine=0.999)}


def export_onnx(
    folder: str | Path, *, precision: str = "fp32", gate: Callable[[OnnxEngine], None] | None = None
) -> Parity:
    """Write ``model.onnx`` or ``model.int8.onnx`` into a folder of our layout and return how close the graph is.

    ``int8`` keeps 7 bits a weight with a float32 scale per output, and quantises activations row by row, so that a
    text's vector never depends on its neighbours. Where that misses ``LIMITS``, biases take back what rounding the
    weights does to the mean of each output, over ``_mean_inputs``. Raises ``WeightsError`` when the graph misses
    ``LIMITS`` all the same, or what ``gate`` raises of it; a graph that was there before then stays.
    """
    if precision not in GRAPH_FILES:
        raise InputError(f"precision must be one of {', '.join(GRAPH_FILES)}, got {precision!r}")
    folder = Path(folder)
    if detect_layout(folder) != "polyvec":
        raise InputError(f"an ONNX graph lies beside polyvec's layout, got {folder} in another; convert it first")
    encoder = load_encoder(folder)
    path = folder / GRAPH_FILES[precision]
    before = set(folder.glob(_CODES_FILE.format("*")))
    codes_path = None
    try:
        with whole_file(path) as partial:  # in the same folder, which the paths inside the graph start from
            limit = LIMITS[precision]
            corrections: list[Callable[[], dict[str, Tensor]]] = [dict, lambda: _mean_inputs(encoder)]
            for means in corrections if precision == "int8" else corrections[:1]:
                codes_path = _Graph(encoder, precision, folder / "model.safetensors", means()).save(partial)
                engine = OnnxEngine(partial, encoder.config)
                parity = measure_parity(encoder, engine)
                if parity.max_abs_error <= limit.max_abs_error and parity.min_cosine >= limit.min_cosine:
                    break
            else:
                raise WeightsError(f"the {precision} graph must keep to {limit}, got {parity}; {path} was not written")
            if gate is not None:
                gate(engine)
    except BaseException:
        if codes_path is not None and codes_path not in before:
            codes_path.unlink()
        raise
    if codes_path is not None:
        for old in before - {codes_path}:  # only now: until the rename the old graph pointed there
            old.unlink()
    return parity


def measure_parity(encoder: Encoder, engine: OnnxEngine) -> Parity:
    """Compare both engines on random ids of mixed lengths and every task, base included."""
    batch = _random_batch(encoder.config, seed=0)
    reference = TorchEngine(encoder, device="cpu")
    states, vectors = reference.token_states(batch), reference.pool(batch)
    got = engine.pool(batch)
    errors = np.abs(states - engine.token_states(batch))
    return Parity(float(errors.max()), smallest_cosine(vectors, got))


def _random_batch(config: ModelConfig, seed: int) -> Batch:
    """Return random ids of mixed lengths for every task, base included."""
    rng = np.random.default_rng(seed)
    longest = min(200, config.max_tokens)
    rows = [
        np.concatenate(([config.bos_token_id], rng.integers(4, config.vocab_size - 1, n), [config.eos_token_id]))
        for n in rng.integers(1, longest - 2, 24)
    ]
    return Batch.of(rows, [i % (len(config.tasks) + 1) - 1 for i in range(len(rows))])


def _mean_inputs(encoder: Encoder) -> dict[str, Tensor]:
    """Return the mean input (I,) of every linear layer, by name, over random ids that are not those of the gate.

    Rounding errors of weights are the same for every token, so they do not average out over a text as those of
    activations do: W - W' shifts all outputs by its product with what the inputs share, which is known and can be taken
    back (arXiv 1906.04721, section 4.2). Of trained weights, whose inputs depend more on the text, this can take back
    too much, so it is for graphs that miss the gate (docs/experiments.md).
    """
    means: dict[str, Tensor] = {}
    hooks = []
    for name, layer in encoder.named_modules():
        if isinstance(layer, AdaptedLinear):

            def note(_: torch.nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                means[name] = inputs[0].mean(dim=0)

            hooks.append(layer.register_forward_pre_hook(note))
    TorchEngine(encoder, device="cpu").pool(_random_batch(encoder.config, seed=1))
    for hook in hooks:
        hook.remove()
    return means


class _Graph:
    """Collects nodes and weights; each method adds one part and returns the name of its output.

    ``means`` are those of ``_mean_inputs``, or empty where biases stay as they are.
    """

    def __init__(self, encoder: Encoder, precision: str, tensors_path: Path, means: dict[str, Tensor]) -> None:
        self.encoder, self.config, self.precision, self.means = encoder, encoder.config, precision, means
        self.tensors_path = tensors_path
        with tensors_path.open("rb") as file:  # safetensors: header length, JSON header, then the tensors' bytes
            (size,) = struct.unpack("<Q", file.read(8))
            self.header = json.loads(file.read(size))
        self.data_start = 8 + size
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.codes: list[tuple[onnx.TensorProto, NDArray[np.generic]]] = []
        self._count = 0
        self._build()

    def save(self, path: Path) -> Path | None:
        """Write the graph to ``path`` and return the file of its codes beside it, None if it has none."""
        codes_path = self._save_codes(path.parent) if self.codes else None
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "T"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "T"]),
            helper.make_tensor_value_info("task_ids", TensorProto.INT64, ["B"]),
        ]
        width = self.config.hidden_size
        outputs = [
            helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B", width]),
            helper.make_tensor_value_info("token_states", TensorProto.FLOAT, ["B", "T", width]),
        ]
        graph = helper.make_graph(self.nodes, "polyvec", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_MS, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="polyvec")
        path.write_bytes(model.SerializeToString())
        return codes_path

    def _save_codes(self, folder: Path) -> Path:
        """Write the codes end to end into the file that their hash names, and let their tensors point there."""
        digest = hashlib.sha256()
        for _, codes in self.codes:
            digest.update(codes.data)
        path = folder / _CODES_FILE.format(digest.hexdigest()[:12])
        with whole_file(path) as partial, partial.open("wb") as file:
            for tensor, codes in self.codes:
                _point(tensor, path, file.tell(), codes.nbytes)
                file.write(codes.data)
        return path

    def node(self, op: str, *inputs: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        self._count += 1
        output = output or f"{op}_{self._count}"
        # ONNX marks a left-out optional input by an empty name.
        self.nodes.append(helper.make_node(op, list(inputs), [output], domain=domain, **attributes))
        return output

    def weight(self, value: Tensor | NDArray[np.generic], name: str = "") -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self._count += 1
        name = name or f"constant_{self._count}"
        self.weights.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def stored(self, name: str, *shape: int) -> str:
        """Return a weight of ``model.safetensors`` by reference, as stored; ``shape`` reads it in another one."""
        entry = self.header[name]
        start, stop = entry["data_offsets"]
        tensor = TensorProto(name=name, data_type=_STORED[entry["dtype"]], dims=shape or entry["shape"])
        _point(tensor, self.tensors_path, self.data_start + start, stop - start)
        self.weights.append(tensor)
        return name

    def code(self, value: Tensor, name: str) -> str:
        """Return a weight that goes to the file of codes."""
        array = np.ascontiguousarray(value.detach().cpu().numpy())
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        self.weights.append(tensor)
        self.codes.append((tensor, array))
        return name

    def as_float(self, name: str) -> str:
        return self.node("Cast", name, to=TensorProto.FLOAT)

    def ints(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def _build(self) -> None:
        config, encoder = self.config, self.encoder
        if encoder.merged_task is not None:
            raise WeightsError("encoder must be unmerged to be exported; load the model again")
        shape = self.node("Shape", "input_ids")
        states_shape = self.node("Concat", shape, self.ints(config.hidden_size), axis=0)
        ids = self.node("Reshape", "input_ids", self.ints(-1))
        self.num_rows = self.node("Shape", ids)
        self._choose_adapters(shape)

        # The linear layers see one (N, D) matrix: bias and adapter then ride along inside the matrix product.
        x = self._embedding(encoder.embeddings.word_embeddings, "embeddings.word_embeddings", ids)
        types = self.node("Mul", ids, self.ints(0))
        type_table = encoder.embeddings.token_type_embeddings
        x = self.node("Add", x, self._embedding(type_table, "embeddings.token_type_embeddings", types))
        x = self.node("LayerNormalization", x, *self._norm(encoder.embeddings.norm, "embeddings.norm"),
                      epsilon=config.layer_norm_eps)  # fmt: skip
        positions, cos, sin = self._rotary_table(shape)
        channels = self._mask_channels(shape)
        for i, layer in enumerate(encoder.layers):
            name = f"layers.{i}"
            assert isinstance(layer, Layer)
            qkv = self._linear(layer.attention.qkv, f"{name}.attention.qkv", x)
            attended = self._attention(qkv, states_shape, positions, cos, sin, channels)
            out = self._linear(layer.attention.out, f"{name}.attention.out", attended)
            x = self._add_norm(x, out, layer.attention_norm, f"{name}.attention_norm")
            hidden = self._linear(layer.mlp.fc1, f"{name}.mlp.fc1", x)
            hidden = self.node("Gelu", hidden, domain=_MS)
            out = self._linear(layer.mlp.fc2, f"{name}.mlp.fc2", hidden, follows_gelu=True)
            x = self._add_norm(x, out, layer.mlp_norm, f"{name}.mlp_norm")
        states = self.node("Reshape", x, states_shape, output="token_states")
        weights = self.node("Cast", "attention_mask", to=TensorProto.FLOAT)
        column = self.node("Unsqueeze", weights, self.ints(2))
        total = self.node("ReduceSum", self.node("Mul", states, column), self.ints(1), keepdims=0)
        self.node("Div", total, self.node("ReduceSum", weights, self.ints(1), keepdims=1), output="pooled")

    def _choose_adapters(self, shape: str) -> None:
        """Find the adapters that the batch names, and each token's column among them.

        Sets ``named`` (n,), ``named_shape`` of a factor's columns (N, n, R), ``gate`` (N, n*R) with 1 in the columns of
        the token's own adapter, and ``token_tasks`` (N,), where a text without adapter counts as 0: its gate is closed.
        """
        rank = self.config.lora_rank
        tasks = self.node("Max", "task_ids", self.ints(0))
        self.named = self.node("Unique", tasks)
        open_columns = self.node("Equal", self.node("Unsqueeze", "task_ids", self.ints(1)), self.named)  # (B, n)
        open_columns = self.node("Cast", open_columns, to=TensorProto.FLOAT)
        number = self.node("Shape", self.named)
        per_token = self.node("Concat", shape, number, self.ints(rank), axis=0)
        gate = self.node("Expand", self.node("Unsqueeze", open_columns, self.ints(1, 3)), per_token)
        self.named_shape = self.node("Concat", self.ints(-1), number, self.ints(rank), axis=0)
        self._columns_shape = self.node("Concat", self.ints(-1), self.node("Mul", number, self.ints(rank)), axis=0)
        self.gate = self.node("Reshape", gate, self._columns_shape)
        tasks = self.node("Expand", self.node("Unsqueeze", tasks, self.ints(1)), shape)
        self.token_tasks = self.node("Reshape", tasks, self.ints(-1))

    def _factors_in(self, factors: Tensor, name: str) -> str:
        """Return the (I, n*R) columns of the named adapters, for factors (A, R, I)."""
        table = self.weight(factors.permute(2, 0, 1), name)  # gathered in the layout that the product reads
        return self.node("Reshape", self.node("Gather", table, self.named, axis=1), self.ints(factors.shape[2], -1))

    def _factors_out(self, factors: Tensor, name: str) -> str:
        """Return the (n*R, O) rows of the named adapters, alpha / rank inside, for factors (A, R, O)."""
        table = self.weight(factors * self.encoder.lora_scale, name)
        return self.node("Reshape", self.node("Gather", table, self.named), self.ints(-1, factors.shape[2]))

    def _embedding(self, table: AdaptedEmbedding, name: str, ids: str) -> str:
        num_adapters, num_rows, rank = table.lora_A.shape
        rows = self.as_float(self.node("Gather", self.stored(f"{name}.weight"), ids))
        factors = self.stored(f"{name}.lora_A", num_adapters * num_rows, rank)
        entries = self.node("Add", self.node("Mul", self.token_tasks, self.ints(num_rows)), ids)
        columns = self.as_float(self.node("Gather", factors, entries))  # (N, R), of each token's own adapter
        columns = self.node("Mul", self.node("Unsqueeze", columns, self.ints(1)),
                            self.node("Reshape", self.gate, self.named_shape))  # fmt: skip
        columns = self.node("Reshape", columns, self._columns_shape)
        return self.node("Gemm", columns, self._factors_out(table.lora_B, f"{name}.lora_B"), rows)

    def _linear(self, layer: AdaptedLinear, name: str, x: str, *, follows_gelu: bool = False) -> str:
        if self.precision == "int8":
            return self._int8_linear(layer, name, x, follows_gelu)
        bias = self.weight(layer.bias, f"{name}.bias")
        y = self.node("Gemm", x, self.as_float(self.stored(f"{name}.weight")), bias, transB=1)
        columns = self.node("MatMul", x, self._factors_in(layer.lora_A, f"{name}.lora_A"))
        columns = self.node("Mul", columns, self.gate)
        return self.node("Gemm", columns, self._factors_out(layer.lora_B.transpose(1, 2), f"{name}.lora_B"), y)

    def _int8_linear(self, layer: AdaptedLinear, name: str, x: str, follows_gelu: bool) -> str:
        """Multiply 8-bit rows of ``x``, each with a scale of its own, by 7-bit weights with a scale per output.

        A row's scale is its largest magnitude, found as it passes: a text's numbers never depend on its neighbours.
        GELU's rows lie above -0.17, so few of the 256 codes are for what is below 0, and a row's peak is at least what
        leaves these enough. The same 8-bit rows go through the adapters' first factors. With ``peak`` the row's scale
        and q its codes less the zero, over the codes above it, ``y = peak * (q W + [gate * q A, 1 / peak] [B; bias])``:
        the bias is one more row of the second factor.
        """
        bias = layer.bias.detach()
        codes, scales = _seven_bits(layer.weight.detach())
        if self.means:
            bias = bias + (layer.weight.detach() - codes * scales) @ self.means[name]
        codes_A, scales_A = _seven_bits(layer.lora_A.detach())
        zero, least = (_GELU_ZERO, _GELU_SHIFT * (255 - _GELU_ZERO) / _GELU_ZERO) if follows_gelu else (128, 1e-12)
        peak = self.node("ReduceMax", x if follows_gelu else self.node("Abs", x), self.ints(1), keepdims=1)
        peak = self.node("Max", peak, self._scalar(least))
        per_peak = self.node("Reciprocal", peak)
        step, zero_point = self._scalar(1 / (255 - zero)), self.weight(np.array(zero, np.uint8))
        steps = self.node("Squeeze", self.node("Mul", peak, step), self.ints(1))  # (N,)
        rows = self.node("QuantizeLinear", x, steps, self.node("Expand", zero_point, self.num_rows), axis=0)
        y = self.node(
            "MatMulIntegerToFloat", rows, self.code(codes.T.to(torch.int8), f"{name}.weight"), step,
            self.weight(scales.squeeze(1), f"{name}.scales"), zero_point, domain=_MS,
        )  # fmt: skip
        columns = self.node(
            "MatMulIntegerToFloat", rows, self._factors_in(codes_A.to(torch.int8), f"{name}.lora_A"), step,
            self._scalar(1), zero_point, domain=_MS,
        )  # fmt: skip
        columns = self.node("Concat", self.node("Mul", columns, self.gate), per_peak, axis=1)
        factors = self._factors_out(layer.lora_B.transpose(1, 2) * scales_A, f"{name}.lora_B")
        factors = self.node("Concat", factors, self.weight(bias.unsqueeze(0), f"{name}.bias"), axis=0)
        return self.node("Mul", self.node("Gemm", columns, factors, y), peak)

    def _norm(self, norm: torch.nn.LayerNorm, name: str) -> tuple[str, str]:
        return self.weight(norm.weight, f"{name}.weight"), self.weight(norm.bias, f"{name}.bias")

    def _add_norm(self, x: str, update: str, norm: torch.nn.LayerNorm, name: str) -> str:
        total = self.node("Add", x, update)
        return self.node("LayerNormalization", total, *self._norm(norm, name), epsilon=self.config.layer_norm_eps)

    def _rotary_table(self, shape: str) -> tuple[str, str, str]:
        config = self.config
        exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
        frequencies = np.float32(config.rope_theta) ** -exponents
        angles = np.arange(config.max_tokens, dtype=np.float32)[:, None] * frequencies
        # A single position id is an offset that every row shares: all texts begin at 0.
        return self.ints(0), self.weight(np.cos(angles), "rotary.cos"), self.weight(np.sin(angles), "rotary.sin")

    def _mask_channels(self, shape: str) -> tuple[str, str]:
        """Return (B, T, H, 1) channels of query and key whose product is 0 at a real key and hides a padded one.

        ONNX Runtime's flash kernel, which never holds the T x T scores, takes no mask; so the mask goes in as one more
        channel of every head.
        """
        per_head = self.node("Concat", shape, self.ints(self.config.num_attention_heads, 1), axis=0)
        real = self.node("Cast", "attention_mask", to=TensorProto.FLOAT)
        hidden = self.node("Mul", self.node("Sub", real, self._scalar(1)), self._scalar(_HIDDEN))
        hidden = self.node("Expand", self.node("Unsqueeze", hidden, self.ints(2, 3)), per_head)
        return self.node("Expand", self._scalar(1), per_head), hidden

    def _scalar(self, value: float) -> str:
        return self.weight(np.array(value, np.float32))

    def _attention(
        self, qkv: str, states_shape: str, positions: str, cos: str, sin: str, channels: tuple[str, str]
    ) -> str:
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        query, key, value = (self.node("Reshape", part, states_shape) for part in self._split(qkv))
        rotated = []
        for part, channel in zip((query, key), channels, strict=True):
            part = self.node("RotaryEmbedding", part, positions, cos, sin, domain=_MS, num_heads=heads)
            part = self.node("Reshape", part, self.ints(0, 0, heads, head_dim))
            part = self.node("Concat", part, channel, axis=3)
            rotated.append(self.node("Reshape", part, self.ints(0, 0, heads * (head_dim + 1))))
        attended = self.node("MultiHeadAttention", *rotated, value, domain=_MS, num_heads=heads, scale=head_dim**-0.5)
        return self.node("Reshape", attended, self.ints(-1, self.config.hidden_size))

    def _split(self, qkv: str) -> list[str]:
        self._count += 1
        outputs = [f"{x}_{self._count}" for x in ("query", "key", "value")]
        self.nodes.append(helper.make_node("Split", [qkv], outputs, axis=1, num_outputs=3))
        return outputs


def _point(tensor: onnx.TensorProto, path: Path, offset: int, length: int) -> None:
    """Let ``tensor`` lie in the bytes of a file beside the graph."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": path.name, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def _seven_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return whole numbers from -63 to 63, shaped as ``weight`` (..., I), and the scale of each row (..., 1)."""
    scales = (weight.abs().amax(-1, keepdim=True) / _WEIGHT_PEAK).clamp_min(1e-12)
    return (weight / scales).round(), scales
