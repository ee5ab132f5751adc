"""A training run as one value: read from TOML, checked whole before anything starts, recorded in its checkpoints."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from polyvec.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STAGES = ("mlm", "distillation", "pairs", "retrieval", "text-matching", "classification", "separation")
ARCHITECTURES = ("tiny", "mini", "jina-v3")
_WITH_TEMPERATURE = STAGES[1:]
#: Fields that a run may change when it goes on: where and how often it writes, and how a step is computed, not what.
#: Other parts and shards add up in another order, which rounds otherwise, and dropout hides other units of other parts.
FREE = ("output", "save_every", "part_tokens", "gradient_checkpointing", "sharded")
#: Fields that it may change for the steps that are left, so that one whose loss was not finite can go on.
CHANGEABLE = ("learning_rate",)
#: Fields that some stages have no use for.
_READ_BY = {
    "mask_rate": ("mlm",),
    "adapter": STAGES[3:],
    "shares": _WITH_TEMPERATURE,
    "temperature": _WITH_TEMPERATURE,
    "negatives": ("pairs", "retrieval", "text-matching", "classification", "separation"),
    "classmates": ("separation",),
    "hardness": ("pairs", "retrieval", "text-matching"),
    "guard": ("pairs", "retrieval", "text-matching"),
    "orthogonality": ("pairs", "retrieval", "text-matching"),
    "relation": ("distillation",),
    "others": ("distillation",),
    "projection": ("distillation",),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the weights that come out. Fields without a default must be given."""

    stage: str  # one of STAGES
    data: tuple[str, ...]  # JSONL, CSV or Parquet files; the columns of each say its loss (training/examples.py)
    output: str  # folder of the model, the checkpoint and the log
    steps: int
    model: str = "polyvec-mini"  # what it starts from, an XLM-RoBERTa too: folder or hub name
    architecture: str = ""  # one of ARCHITECTURES: random weights of this shape in place of ``model``
    tokenizer: str = ""  # tokenizer.json of a random model
    adapter: str = ""  # a new task of this name learns instead of the stage's own, from which it starts
    shares: tuple[float, ...] = ()  # how often each file of data is drawn; left out, by size
    batch_size: int = 64  # texts, pairs or windows a step
    part_tokens: int = 2048  # of texts that run together; what memory is needed for
    max_tokens: int = 256  # mlm splits longer texts, the other stages cut them
    learning_rate: float = 5e-4
    warmup_steps: int = 10
    temperature: float = 0.05
    rope_theta: float = 0.0  # base of the rotary positions while training; 0 is the model's, which keeps its own
    mask_rate: float = 0.3  # of the tokens, in whole words (arXiv 2202.08005 for more than 0.15)
    smoothing: float = 0.5  # a group is drawn in proportion to its size to this power
    negatives: int = 7  # at most so many hard negatives a query, or so many texts of other classes
    classmates: bool = False  # labels of separation teach as those of classification do, in place of CoSENT
    orthogonality: float = 0.0  # weight of the global orthogonal regularisation
    hardness: float = 0.0  # how much a negative's likeness adds to its weight
    guard: float = 0.0  # a negative nearer than the answer by more than this likely answers too; 0 keeps all
    relation: float = 0.2  # weight of whom the teacher holds for near, beside the distance to its vectors
    others: int = 0  # texts outside the batch whose vectors stand beside it in that
    projection: bool = False  # a matrix, learnt and then left out, between the student's space and the teacher's
    average: float = 0.0  # of the weights over the steps; 0 keeps the last, 0.99 about the last hundred
    dropout: bool = False
    gradient_checkpointing: bool = False  # each layer runs again in the backward pass instead of being remembered
    sharded: bool = False  # FSDP2 over the processes instead of a whole model on each
    bf16: bool = False
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        rules = {
            "stage": (self.stage in STAGES, f"one of {', '.join(STAGES)}"),
            "data": (len(self.data) > 0, "at least one file"),
            "steps": (self.steps >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 2, "at least 2"),
            "part_tokens": (self.part_tokens >= 1, "at least 1"),
            "max_tokens": (self.max_tokens >= 8, "at least 8"),
            "learning_rate": (self.learning_rate > 0, "greater than 0"),
            "warmup_steps": (self.warmup_steps >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "greater than 0"),
            "rope_theta": (self.rope_theta == 0 or self.rope_theta > 1, "greater than 1, or 0 for the model's"),
            "mask_rate": (0 < self.mask_rate < 1, "between 0 and 1"),
            "shares": (
                not self.shares or (len(self.shares) == len(self.data) and min(self.shares) > 0),
                f"one number greater than 0 for each of {len(self.data)} files of data",
            ),
            "smoothing": (0 <= self.smoothing <= 1, "between 0 and 1"),
            "negatives": (self.negatives >= 0, "0 or more"),
            "guard": (self.guard >= 0, "0 or more"),
            "relation": (self.relation >= 0, "0 or more"),
            "others": (self.others >= 0, "0 or more"),
            "orthogonality": (self.orthogonality >= 0, "0 or more"),
            "hardness": (self.hardness >= 0, "0 or more"),
            "average": (0 <= self.average < 1, "at least 0 and less than 1"),
            "seed": (0 <= self.seed < 2**63, "at least 0 and less than 2**63"),
            "save_every": (self.save_every >= 1, "at least 1"),
            "architecture": (
                self.architecture in ("", *ARCHITECTURES),
                f"one of {', '.join(ARCHITECTURES)}, or left out to start from a model",
            ),
            "tokenizer": (bool(self.tokenizer) == bool(self.architecture), "given with an architecture, and only then"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise InputError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, stages in _READ_BY.items():
            if self.stage not in stages and getattr(self, name) != defaults[name]:
                raise InputError(
                    f"{name} must be left out in stage {self.stage}, which does not read it, got "
                    f"{getattr(self, name)!r}; stages that do are {', '.join(stages)}"
                )


def read_run(name: str, changes: Mapping[str, str]) -> Run:
    """Return the run of a TOML file, or of the recipe ``name``, with ``changes`` (field to text) applied.

    Raises ``InputError`` naming file, field, rule and the nearest known field.
    """
    path = Path(name)
    recipes = {p.name.removesuffix(".toml"): p for p in resources.files("polyvec.training.recipes").iterdir()}
    recipes = {key: p for key, p in recipes.items() if p.name.endswith(".toml")}
    if path.suffix != ".toml" and name not in recipes:
        raise InputError(f"RUN must be a .toml file or one of {', '.join(sorted(recipes))}, got {name!r}")
    source = recipes.get(name, path)
    try:
        values = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{name} must be a readable TOML file, got {error}") from error
    hints = get_type_hints(Run)
    for key, text in changes.items():
        values[key] = _parse(key, text, hints.get(key))
    return make_run(values, source=name)


def make_run(values: Mapping[str, Any], *, source: str) -> Run:
    """Return the run of plain ``values``. Raises ``InputError`` naming ``source``, field, rule and nearest field."""
    hints = get_type_hints(Run)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            remedy = f"; did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(hints)}"
            raise InputError(f"{source}: every field must be of a run, got {key!r}{remedy}")
    if missing := [
        f.name for f in dataclasses.fields(Run) if f.default is dataclasses.MISSING and f.name not in values
    ]:
        raise InputError(f"{source}: {', '.join(missing)} must be given, got none")
    try:
        return Run(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _typed(key: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_typed(f"each of {key}", item, inner) for item in value)
        raise InputError(f"{key} must be a list of {_NAMES[inner]}, got {value!r}")
    if kind is float and type(value) is int and abs(value) < 2**63:  # beyond, which TOML allows, it may be no float
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):  # TOML has inf and nan
        raise InputError(f"{key} must be {_NAMES[kind]}, got {value!r}")
    return value


def _parse(key: str, text: str, kind: type | types.GenericAlias | None) -> Any:
    """Return a change from the command line as a TOML value; text needs no quotes there."""
    if get_origin(kind) is tuple:
        return [_parse(key, item, get_args(kind)[0]) for item in text.split(",")]
    if kind is str:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--set {key} must be a TOML value, got {text!r}") from error


_NAMES = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
