"""What a job of embedding asks for, and how two of them differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from polyvec.errors import InputError
from polyvec.files import Stamp
from polyvec.inference.late_chunking import LateChunking

CHUNK_COLUMNS = ("chunk", "start", "end")  # of a job's output with late chunking

#: What may change between two runs into one folder without changing what a text becomes.
_INPUT_FIELDS = ("source", "model")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the bytes of the output; how many workers run it and where does not.

    ``engine`` is never ``auto``: machines that choose for themselves would give different bits.
    """

    source: str  # file, folder, glob or URL
    column: str = "text"
    id_column: str | None = None  # None: NAME:ROW
    keep: tuple[str, ...] = ()  # other columns that are passed through
    model: str | None = None
    engine: str = "onnx"
    task: str | None = None
    dimensions: int | None = None
    dtype: str = "float32"
    late_chunking: LateChunking | None = None
    truncate: bool = True
    part_rows: int = 8192
    dedupe: str = "job"  # duplicates are embedded once in the whole job, or once in each part
    stamp: Stamp = field(default_factory=dict)  # of the vectors, with the hash of the model's weights

    def __post_init__(self) -> None:
        if self.part_rows < 1:
            raise InputError(f"part_rows must be at least 1, got {self.part_rows}")
        if self.dedupe not in ("job", "part"):
            raise InputError(f"dedupe must be job or part, got {self.dedupe!r}")
        if again := [c for i, c in enumerate(self.keep) if c in self.keep[:i]]:
            raise InputError(f"keep must name a column once, got {again[0]!r} again")
        own = ("id", "num_tokens", "truncated", "embedding", *(CHUNK_COLUMNS if self.late_chunking is not None else ()))
        if taken := [c for c in self.keep if c in own]:
            raise InputError(f"keep must leave out {', '.join(own)}, which the output has of its own, got {taken[0]!r}")

    def columns(self) -> list[str]:
        """Return the columns that are read."""
        return list(dict.fromkeys([self.column, *([self.id_column] if self.id_column else []), *self.keep]))

    def identity(self) -> dict[str, Any]:
        """Return what a part's name depends on beside the rows of its slice."""
        values = {k: v for k, v in asdict(self).items() if k not in (*_INPUT_FIELDS, "stamp", "dedupe")}
        return {**values, "keep": list(self.keep), **{k: self.stamp[k] for k in ("weights", "fingerprint")}}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return what differs between two identities, as ``task from 'a' to 'b'``."""
    keys = sorted({*old, *new} - {"fingerprint"})
    found = [f"{k} from {old.get(k)!r} to {new.get(k)!r}" for k in keys if old.get(k) != new.get(k)]
    if not found and old.get("fingerprint") != new.get("fingerprint"):
        found = [f"fingerprint from {old.get('fingerprint')} to {new.get('fingerprint')}"]  # a prompt, for one
    return found
