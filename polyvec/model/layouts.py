"""Which of the three folder layouts lies here, and what its configuration says. Imports no torch.

* ``polyvec``: ours, ``config.json`` with ``model_type: polyvec``.
* ``original``: the hub layout of jinaai/jina-embeddings-v3, adapters stacked inside ``model.safetensors``.
* ``hf``: the layout of jinaai/jina-embeddings-v3-hf, a plain base and one PEFT folder per task.

A foreign configuration is read key by key: a value that would change the numbers and that this code does not compute
is an error, and so is a key that it does not know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyvec.errors import WeightsError
from polyvec.model.config import ModelConfig
from polyvec.tasks import TASK_PROMPTS

JINA_V3_DIMS = (32, 64, 128, 256, 512, 768, 1024)

#: Same name and meaning in the three layouts.
SHARED_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "type_vocab_size",
    "max_position_embeddings", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "initializer_range", "bos_token_id", "pad_token_id", "eos_token_id",
)  # fmt: skip
#: Keys that say how the reference runs or was saved, never what it computes.
_INERT_KEYS = frozenset({
    "_name_or_path", "architectures", "auto_map", "classifier_dropout", "dtype", "id2label", "label2id",
    "load_trained_adapters", "lora_main_params_trainable", "model_type", "output_past", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "use_cache", "use_flash_attn", "use_reentrant",
})  # fmt: skip
#: Keys with the one value that this code computes.
_FIXED_KEYS = {
    "hidden_act": "gelu",
    "position_embedding_type": "rotary",
    "emb_pooler": None,
    "truncate_dim": None,
    "is_decoder": False,
    "add_cross_attention": False,
}
_ORIGINAL_KEYS = (
    "rotary_emb_base", "lora_adaptations", "lora_rank", "lora_alpha", "lora_dropout_p", "task_instructions",
    "matryoshka_dimensions",
)  # fmt: skip


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises ``WeightsError`` if it is missing or is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"model folder must hold {path.name}, got none in {path.parent}; fetch it again") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} must be a readable JSON file, got {error}; fetch it again") from error


def detect_layout(folder: Path) -> str:
    """Return ``polyvec``, ``original`` or ``hf``. Raises ``WeightsError`` for any other model."""
    values = read_json(folder / "config.json")
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type == "polyvec":
        return "polyvec"
    if model_type == "jina_embeddings_v3":
        return "hf"
    if model_type in (None, "xlm-roberta") and isinstance(values, dict) and "lora_adaptations" in values:
        return "original"
    raise WeightsError(
        f"{folder} must hold a polyvec model or jina-embeddings-v3 (original or -hf layout), "
        f"got model_type {model_type!r} in its config.json; no other architecture loads"
    )


def read_config(folder: Path) -> ModelConfig:
    """Return the configuration of a model folder in any of the three layouts."""
    layout = detect_layout(folder)
    if layout == "polyvec":
        return ModelConfig.from_dict(read_json(folder / "config.json"))
    return _read_original(folder) if layout == "original" else _read_hf(folder)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that loading a model reads, in any of the three layouts. A checkpoint of training
    lies beside them and is none."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob("*/adapter_model*.safetensors")])


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights and configuration: the tokenizer and the int8 ranges."""
    for name in ("tokenizer.json", "int8_ranges.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def adapter_folder(task: str) -> str:
    """Return the PEFT folder of a task: ``retrieval.query`` lies in ``retrieval_query``."""
    return task.replace(".", "_").replace("-", "_")


def _read_original(folder: Path) -> ModelConfig:
    values = read_json(folder / "config.json")
    _check_keys(folder, values, required=(*SHARED_KEYS, *_ORIGINAL_KEYS))
    tasks, prompts = values["lora_adaptations"], values["task_instructions"]
    if sorted(prompts) != sorted(tasks):
        raise WeightsError(
            f"{folder / 'config.json'}: task_instructions must name exactly the lora_adaptations {tasks}, "
            f"got {list(prompts)}"
        )
    return ModelConfig(
        **{key: values[key] for key in SHARED_KEYS},
        rope_theta=values["rotary_emb_base"],
        lora_rank=values["lora_rank"],
        lora_alpha=values["lora_alpha"],
        lora_dropout=values["lora_dropout_p"],
        prompts={task: prompts[task] for task in tasks},
        matryoshka_dims=tuple(values["matryoshka_dimensions"]),
    )


def _read_hf(folder: Path) -> ModelConfig:
    """Read the transformers configuration, the PEFT configurations, and the prompts of sentence-transformers.

    The layout has no field for the trained widths: those of jina-embeddings-v3 up to ``hidden_size`` stand in, unless
    the folder is one of ours and says ``matryoshka_dimensions``.
    """
    values = read_json(folder / "config.json")
    _check_keys(
        folder, values, required=(*SHARED_KEYS, "rope_parameters"), optional=("matryoshka_dimensions", "rope_theta")
    )
    rope = values["rope_parameters"]
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        raise WeightsError(f"{folder / 'config.json'}: rope_parameters must be of rope_type 'default', got {rope}")
    prompts = _hf_prompts(folder)
    adapters = {task: read_json(folder / adapter_folder(task) / "adapter_config.json") for task in prompts}
    for task, adapter in adapters.items():
        _check_adapter(folder / adapter_folder(task) / "adapter_config.json", adapter)
    for key, name in (("r", "rank"), ("lora_alpha", "alpha"), ("lora_dropout", "dropout")):
        if len({adapter[key] for adapter in adapters.values()}) > 1:
            found = {task: adapter[key] for task, adapter in adapters.items()}
            raise WeightsError(f"{folder}: the adapters must share one {name}, got {found}")
    first = next(iter(adapters.values()))
    width = values["hidden_size"]
    dims = values.get("matryoshka_dimensions") or [d for d in JINA_V3_DIMS if d <= width]
    return ModelConfig(
        **{key: values[key] for key in SHARED_KEYS},
        rope_theta=float(rope["rope_theta"]),
        lora_rank=first["r"],
        lora_alpha=first["lora_alpha"],
        lora_dropout=first["lora_dropout"],
        prompts=prompts,
        matryoshka_dims=tuple(dims),
    )


def _hf_prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    if not path.exists():
        return dict(TASK_PROMPTS)
    prompts = read_json(path).get("prompts") or {}
    # sentence-transformers adds empty "query" and "document" prompts of its own when it saves.
    named = {name: prompt for name, prompt in prompts.items() if name not in ("query", "document")}
    if any(task not in named for task in TASK_PROMPTS):
        raise WeightsError(f"{path}: prompts must name the tasks {list(TASK_PROMPTS)}, got {list(named)}")
    return {task: named[task] for task in (*TASK_PROMPTS, *(t for t in named if t not in TASK_PROMPTS))}


def _check_adapter(path: Path, adapter: Mapping[str, Any]) -> None:
    wanted = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
    wrong = {k: adapter.get(k, v) for k, v in wanted.items() if adapter.get(k, v) != v}
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if adapter.get(key):
            wrong[key] = adapter[key]
    missing = [key for key in ("r", "lora_alpha", "lora_dropout") if key not in adapter]
    if wrong or missing:
        raise WeightsError(f"{path} must be plain LoRA of one rank, got {wrong or ''} missing {missing or 'nothing'}")


def _check_keys(
    folder: Path, values: Mapping[str, Any], *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    problems = [f"missing {key}" for key in required if key not in values]
    known = {*required, *optional, *_INERT_KEYS, *_FIXED_KEYS}
    problems += [f"unknown {key} = {value!r}" for key, value in values.items() if key not in known]
    problems += [
        f"{key} = {values[key]!r} where only {fixed!r} is computed"
        for key, fixed in _FIXED_KEYS.items()
        if values.get(key, fixed) != fixed
    ]
    if problems:
        raise WeightsError(f"{folder / 'config.json'} must be fully understood, got {'; '.join(problems)}")
