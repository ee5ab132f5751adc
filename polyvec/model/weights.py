"""Encoders to and from files. Every foreign tensor name lives here, and weights load whole or not at all.

Ours, the original hub layout and the plain base of the ``-hf`` layout differ in names alone, so they convert bit for
bit in both directions. PEFT keeps one adapter a file and three factors where the checkpoint has one (query, key and
value share lora_A): the three are checked to be equal.

Shape letters: V vocabulary, D width, A adapters, R rank.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyvec.atomic import whole_file, write_json
from polyvec.errors import WeightsError
from polyvec.model.config import ModelConfig
from polyvec.model.encoder import Encoder
from polyvec.model.layouts import SHARED_KEYS, adapter_folder, detect_layout, read_config, read_json

Tensors = dict[str, Tensor]

#: Module names, ours to those of the original checkpoint; ``{i}`` is the layer.
_ORIGINAL = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.norm": "emb_ln",
    "layers.{i}.attention.qkv": "encoder.layers.{i}.mixer.Wqkv",
    "layers.{i}.attention.out": "encoder.layers.{i}.mixer.out_proj",
    "layers.{i}.attention_norm": "encoder.layers.{i}.norm1",
    "layers.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "layers.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
    "layers.{i}.mlp_norm": "encoder.layers.{i}.norm2",
    "pooler": "pooler.dense",
}
#: The same modules in transformers' class, whose names PEFT uses; qkv is three modules there.
_NATIVE = {
    **_ORIGINAL,
    "embeddings.norm": "embeddings.LayerNorm",
    "layers.{i}.attention.qkv": "layers.{i}.self_attn.{x}_proj",
    "layers.{i}.attention.out": "layers.{i}.self_attn.o_proj",
    "layers.{i}.attention_norm": "layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.fc1": "layers.{i}.mlp.fc1",
    "layers.{i}.mlp.fc2": "layers.{i}.mlp.fc2",
    "layers.{i}.mlp_norm": "layers.{i}.post_mlp_layernorm",
}
#: A masked-language head may lie in a checkpoint saved from that class; an embedding model has no use for it.
_HEAD = "lm_head."
_PEFT_PREFIX = "base_model.model."


def load_encoder(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Encoder:
    """Return the encoder in ``folder``, any of the three layouts, in evaluation mode.

    Raises ``WeightsError`` naming every missing, unexpected or misshapen tensor and every unknown configuration value.
    """
    folder = Path(folder)
    layout, config = detect_layout(folder), read_config(folder)
    with torch.device("meta"):
        encoder = Encoder(config)
    if layout == "polyvec":
        tensors = _read_tensors(folder, "model")
    elif layout == "original":
        tensors = _from_original(_read_tensors(folder, "model"), config)
    else:
        tensors = _from_hf(folder, config)
    _check(folder, encoder, tensors)
    encoder.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    encoder.pooler.requires_grad_(False)
    return encoder.eval()


def save_encoder(encoder: Encoder, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors`` in our layout; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(_state(encoder, dtype), folder / "model.safetensors")
    write_json(encoder.config.to_dict(), folder / "config.json")


def save_original(encoder: Encoder, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the layout of jinaai/jina-embeddings-v3 into a new folder."""
    config = encoder.config
    with _new_folder(folder) as target:
        names = {theirs: ours for ours, theirs in _original_names(config).items()}
        state = _state(encoder, dtype)
        _write_tensors({theirs: state[ours] for theirs, ours in names.items()}, target / "model.safetensors")
        values = {
            **_shared_values(config),
            "architectures": ["XLMRobertaModel"],
            "emb_pooler": None,
            "position_embedding_type": "rotary",
            "rotary_emb_base": config.rope_theta,
            "lora_adaptations": list(config.tasks),
            "lora_alpha": config.lora_alpha,
            "lora_dropout_p": config.lora_dropout,
            "lora_rank": config.lora_rank,
            "task_instructions": dict(config.prompts),
            "matryoshka_dimensions": list(config.matryoshka_dims),
            "truncate_dim": None,
        }
        write_json(values, target / "config.json")


def save_hf(encoder: Encoder, folder: str | Path, tokenizer_path: str | Path) -> None:
    """Write a new folder that transformers + PEFT, and sentence-transformers for the base, load as their own."""
    config = encoder.config
    state = _state(encoder, None)
    with _new_folder(folder) as target:
        base = {n: t for n, t in state.items() if ".lora_" not in n}
        plain = {theirs: base[ours] for ours, theirs in _plain_names(config).items()}
        _write_tensors(plain, target / "model.safetensors")
        values = {
            **_shared_values(config),
            "architectures": ["JinaEmbeddingsV3Model"],
            "dtype": str(next(encoder.parameters()).dtype).removeprefix("torch."),
            "model_type": "jina_embeddings_v3",
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            "matryoshka_dimensions": list(config.matryoshka_dims),
        }
        write_json(values, target / "config.json")
        for index, task in enumerate(config.tasks):
            adapter = target / adapter_folder(task)
            adapter.mkdir()
            _write_tensors(_to_peft(state, config, index), adapter / "adapter_model.safetensors")
            write_json(_peft_config(config), adapter / "adapter_config.json")
        shutil.copyfile(tokenizer_path, target / "tokenizer.json")
        _write_sentence_transformers_files(config, target)


def _state(encoder: Encoder, dtype: torch.dtype | None) -> Tensors:
    if encoder.merged_task is not None:
        raise WeightsError(
            f"encoder must be unmerged to be saved, got adapter {encoder.merged_task}; load the model again"
        )
    return {n: t.detach().to(dtype or t.dtype).contiguous() for n, t in encoder.state_dict().items()}


def _modules(names: Mapping[str, str], num_layers: int) -> Iterator[tuple[str, str]]:
    for ours, theirs in names.items():
        if "{i}" in ours:
            for i in range(num_layers):
                yield ours.replace("{i}", str(i)), theirs.replace("{i}", str(i))
        else:
            yield ours, theirs


def _is_adapted(module: str) -> bool:
    return not module.endswith("norm")


def _original_names(config: ModelConfig) -> dict[str, str]:
    """Return our tensor names to those of the original checkpoint, parametrised as torch writes them."""
    names = {}
    for ours, theirs in _modules(_ORIGINAL, config.num_hidden_layers):
        theirs = f"roberta.{theirs}"
        if _is_adapted(ours):
            names[f"{ours}.weight"] = f"{theirs}.parametrizations.weight.original"
            for factor in ("lora_A", "lora_B"):
                names[f"{ours}.{factor}"] = f"{theirs}.parametrizations.weight.0.{factor}"
        else:
            names[f"{ours}.weight"] = f"{theirs}.weight"
        if not ours.endswith("_embeddings"):
            names[f"{ours}.bias"] = f"{theirs}.bias"
    return names


def _plain_names(config: ModelConfig) -> dict[str, str]:
    """Return our base tensor names to those that transformers saves: the original modules without parametrisation."""
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for ours, theirs in _modules(_ORIGINAL, config.num_hidden_layers)
        for kind in ("weight", "bias")
        if not (kind == "bias" and ours.endswith("_embeddings"))
    }


def _from_original(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Rename; a name without a counterpart stays as it is and is then reported as unexpected."""
    ours = {theirs: name for name, theirs in _original_names(config).items()}
    return {ours.get(name, name): tensor for name, tensor in tensors.items()}


def _from_hf(folder: Path, config: ModelConfig) -> Tensors:
    tensors = {n.removeprefix("roberta."): t for n, t in _read_tensors(folder, "model").items()}
    tensors = {n: t for n, t in tensors.items() if not n.startswith(_HEAD)}
    tensors = _join_qkv(tensors)
    names = {theirs: ours for ours, theirs in _plain_names(config).items()}
    for ours, native in _modules(_NATIVE, config.num_hidden_layers):
        for kind in ("weight", "bias"):
            names[f"{native.replace('{x}', 'qkv')}.{kind}"] = f"{ours}.{kind}"
    result = {names.get(name, name): tensor for name, tensor in tensors.items()}
    stacks: dict[str, list[Tensor]] = {}
    for task in config.tasks:
        for name, tensor in _from_peft(folder / adapter_folder(task), config).items():
            stacks.setdefault(name, []).append(tensor)
    for name, stack in stacks.items():
        if len(stack) != len(config.tasks) or len({t.shape for t in stack}) > 1:
            raise WeightsError(f"{folder}: every adapter must hold {name} in one shape, got {[*map(_shape, stack)]}")
        result[name] = torch.stack(stack)
    return result


def _join_qkv(tensors: Tensors) -> Tensors:
    """Join q_proj, k_proj and v_proj rows into one ``qkv_proj``; incomplete triples stay and are reported."""
    joined = dict(tensors)
    for name in tensors:
        if match := re.fullmatch(r"(.*\.)q_proj(\..*)", name):
            parts = [f"{match[1]}{x}_proj{match[2]}" for x in "qkv"]
            if all(part in joined for part in parts):
                joined[f"{match[1]}qkv_proj{match[2]}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _from_peft(folder: Path, config: ModelConfig) -> Tensors:
    """Return one adapter's factors under our names, without the leading adapter axis."""
    tensors = {n.removeprefix(_PEFT_PREFIX): t for n, t in _read_tensors(folder, "adapter_model").items()}
    result: Tensors = {}
    for ours, native in _modules(_NATIVE, config.num_hidden_layers):
        if not _is_adapted(ours):
            continue
        if ours.endswith("_embeddings"):
            for factor in "AB":
                if (tensor := tensors.pop(f"{native}.lora_embedding_{factor}", None)) is not None:
                    result[f"{ours}.lora_{factor}"] = tensor.T
            continue
        parts = [native.replace("{x}", x) for x in "qkv"] if "{x}" in native else [native]
        for factor in "AB":
            found = [tensors.pop(f"{part}.lora_{factor}.weight", None) for part in parts]
            present = [tensor for tensor in found if tensor is not None]
            if len(present) < len(parts):
                continue  # reported as missing
            if factor == "B":
                result[f"{ours}.lora_B"] = torch.cat(present)
            elif all(torch.equal(present[0], other) for other in present[1:]):
                result[f"{ours}.lora_A"] = present[0]
            else:
                raise WeightsError(f"{folder}: q_proj, k_proj and v_proj of {ours} must share lora_A, got three")
    return {**result, **{f"{folder.name}/{name}": tensor for name, tensor in tensors.items()}}


def _to_peft(state: Tensors, config: ModelConfig, index: int) -> Tensors:
    result: Tensors = {}
    for ours, native in _modules(_NATIVE, config.num_hidden_layers):
        if not _is_adapted(ours):
            continue
        first, second = state[f"{ours}.lora_A"][index], state[f"{ours}.lora_B"][index]
        prefix = _PEFT_PREFIX + native
        if ours.endswith("_embeddings"):
            result[f"{prefix}.lora_embedding_A"], result[f"{prefix}.lora_embedding_B"] = first.T, second.T
        elif "{x}" in native:
            for x, rows in zip("qkv", second.chunk(3), strict=True):
                name = prefix.replace("{x}", x)
                result[f"{name}.lora_A.weight"], result[f"{name}.lora_B.weight"] = first.clone(), rows
        else:
            result[f"{prefix}.lora_A.weight"], result[f"{prefix}.lora_B.weight"] = first, second
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _peft_config(config: ModelConfig) -> dict[str, Any]:
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense")
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "target_modules": [*modules, "word_embeddings", "token_type_embeddings"],
        "inference_mode": True,
    }


def _shared_values(config: ModelConfig) -> dict[str, Any]:
    return {**{key: getattr(config, key) for key in SHARED_KEYS}, "hidden_act": "gelu"}


def _write_sentence_transformers_files(config: ModelConfig, folder: Path) -> None:
    limit = {"model_max_length": config.max_tokens, "tokenizer_class": "PreTrainedTokenizerFast"}
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json({**limit, **specials, "mask_token": "<mask>"}, folder / "tokenizer_config.json")
    write_json(
        {"prompts": dict(config.prompts), "default_prompt_name": None}, folder / "config_sentence_transformers.json"
    )
    modules = (("", "models.Transformer"), ("1_Pooling", "models.Pooling"), ("2_Normalize", "models.Normalize"))
    write_json(
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        folder / "modules.json",
    )
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": config.hidden_size, "pooling_mode_mean_tokens": True, "include_prompt": True}
    write_json(pooling, folder / "1_Pooling" / "config.json")
    (folder / "2_Normalize").mkdir()
    write_json({"max_seq_length": config.max_tokens, "do_lower_case": False}, folder / "sentence_bert_config.json")


def _read_tensors(folder: Path, stem: str) -> Tensors:
    """Return the tensors of ``stem.safetensors``, or of the shards that its index names."""
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    shards = {single}
    if not single.exists() and index.exists():
        shards = {folder / Path(name).name for name in read_json(index)["weight_map"].values()}
    tensors: Tensors = {}
    for path in sorted(shards):
        try:
            tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} must be a whole safetensors file, got {type(error).__name__}: {error}; fetch it again"
            ) from error
    return tensors


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check(folder: Path, encoder: Encoder, tensors: Tensors) -> None:
    wanted = encoder.state_dict()
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} has shape {_shape(tensors[name])} instead of {_shape(tensor)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems += [
        f"{name} holds {t.dtype}, not floating point" for name, t in tensors.items() if not t.is_floating_point()
    ]
    if problems:
        raise WeightsError(f"{folder} must hold exactly the tensors of its config.json, got {'; '.join(problems)}")


def _write_tensors(tensors: Tensors, path: Path) -> None:
    with whole_file(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # safetensors makes it readable by its owner alone, which no other user can then load


@contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a folder that takes the name of ``folder`` only when all of it is written."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"output folder must be new or empty, got {folder}; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as partial:
        target = Path(partial) / "model"
        target.mkdir()
        yield target
        if folder.exists():
            folder.rmdir()
        os.replace(target, folder)
