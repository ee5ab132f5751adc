"""Log lines of fields, ``key=value``, one an event; never a text, a key or a header."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime, timezone

_PLAIN = re.compile(r"[\w./:+-]+")


class Fields(logging.Formatter):
    """Time, level, and either the ``facts`` of a record or its message.

    Of an exception the type alone is written: its message may quote a text.
    """

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        facts: dict[str, object] = {"time": when, "level": record.levelname.lower()}
        facts |= getattr(record, "facts", None) or {"message": record.getMessage()}
        if record.exc_info and record.exc_info[0]:
            facts["error"] = record.exc_info[0].__name__
        return " ".join(f"{name}={_value(fact)}" for name, fact in facts.items())


def _value(fact: object) -> str:
    text = str(fact)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
