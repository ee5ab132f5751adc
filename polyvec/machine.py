"""What was measured of this machine once, and remembered in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from polyvec.atomic import write_json


def remembered(question: str, facts: Any, answers: Collection[str], measure: Callable[[], str]) -> str:
    """Return what ``measure`` gave, one of ``answers``, when the ``question`` was first asked with these ``facts``.

    Facts are JSON values of what the answer depends on beside the processor. Answers lie in ``$XDG_CACHE_HOME/polyvec``
    or ``~/.cache/polyvec``, a file a question; where that cannot be written, every call measures.
    """
    key = hashlib.sha256(json.dumps([_processor(), facts]).encode()).hexdigest()[:16]
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyvec" / f"{question}.json"
    known = _read(path)
    if known.get(key) not in answers:
        known[key] = measure()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(known, path)
    return known[key]


def _processor() -> str:
    """Return the processor with its instruction sets, as far as the system tells."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def _read(path: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):  # a cache that cannot be read is measured anew
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}
