"""Log lines of fields, ``key=value``, one an event; never a text, a key or a header."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import deque
from contextlib import suppress
from datetime import datetime, timezone
from typing import TextIO

_PLAIN = re.compile(r"[\w./:+-]+")
_WRITE_SECONDS = 0.2  # that a line waits for others: a call of the system for each costs as much as making it


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


class Lines(logging.Handler):
    """Writes lines to ``stream`` a few times a second, and with a warning at once, on a thread of its own: whoever logs
    waits for no reader of the stream. Without one, the oldest of ``most`` lines go.

    ``flush`` before a signal ends the process.
    """

    def __init__(self, stream: TextIO, most: int = 20_000) -> None:
        super().__init__()
        self.setFormatter(Fields())
        self._stream = stream
        self._records: deque[logging.LogRecord] = deque(maxlen=most)
        self._is_due, self._is_urgent = threading.Event(), threading.Event()
        self._writing = threading.Lock()
        threading.Thread(target=self._write, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)
        if record.levelno >= logging.WARNING:
            self._is_urgent.set()
        if not self._is_due.is_set():
            self._is_due.set()

    def flush(self) -> None:
        with self._writing, suppress(OSError, ValueError):  # a stream that is closed says nothing to anyone
            lines = []
            while self._records:
                record = self._records.popleft()
                with suppress(Exception):  # one whose arguments do not fit its words must not end the log
                    lines.append(self.format(record) + "\n")
            self._stream.write("".join(lines))
            self._stream.flush()

    def _write(self) -> None:
        while self._is_due.wait():
            self._is_urgent.wait(_WRITE_SECONDS)
            self._is_due.clear()
            self._is_urgent.clear()
            self.flush()
