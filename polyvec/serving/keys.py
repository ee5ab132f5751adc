"""API keys: a TOML file of hashes with limits, read again when it changes.

    [team-a]
    sha256 = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"
    requests_per_minute = 600       # both limits may be left out
    tokens_per_minute = 1_000_000

``polyvec key NAME FILE`` makes a key and adds its entry. The key itself is nowhere but with its owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import sys
import time
from pathlib import Path

from polyvec.atomic import whole_file
from polyvec.errors import InputError, PolyvecError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_log = logging.getLogger(__name__)
_RELOAD_SECONDS = 1.0  # between looks at the file
_LIMITS = ("requests_per_minute", "tokens_per_minute")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RateLimitError(PolyvecError):
    """A key has used up a limit; ``retry_after`` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Bucket:
    """A limit per minute that refills steadily. A full one lends, so that a request beyond it is not impossible."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute, self._level, self._at = per_minute, per_minute, time.monotonic()

    def spend(self, amount: float) -> float:
        """Take ``amount`` and return 0.0, or take nothing and return the seconds until it is there."""
        now = time.monotonic()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        missing = min(amount, self.per_minute) - self._level
        if missing > 0:
            return missing * 60 / self.per_minute
        self._level -= amount
        return 0.0


class ApiKey:
    """A key of the file. ``limits`` maps names of ``_LIMITS`` to numbers; a limit that is left out is none."""

    def __init__(self, name: str, sha256: bytes, limits: dict[str, float]) -> None:
        self.name, self.sha256, self.limits = name, sha256, limits
        self._buckets = {limit: Bucket(number) for limit, number in limits.items()}

    def spend(self, limit: str, amount: float) -> None:
        """Raise ``RateLimitError`` when the limit is used up."""
        if limit in self._buckets and (seconds := self._buckets[limit].spend(amount)):
            raise RateLimitError(
                f"{limit} of this key must be at most {self.limits[limit]:g}, got more; "
                "retry after the seconds in Retry-After",
                int(seconds) + 1,
            )


class Keys:
    """The keys of a file. Raises ``InputError`` for a file that is not as above, or without a key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys: list[ApiKey] = []
        self._stamp = self._look()
        self._keys = self._read()
        self._looked = time.monotonic()

    def find(self, key: str) -> ApiKey | None:
        """Return the entry of ``key``. Every one is compared, in constant time: time tells no prefix, no position."""
        self._reload()
        got = hashlib.sha256(key.encode()).digest()
        found = [entry for entry in self._keys if hmac.compare_digest(got, entry.sha256)]
        return found[0] if found else None

    def _reload(self) -> None:
        if time.monotonic() < self._looked + _RELOAD_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp, self._keys = stamp, self._read()
                _log.info("read %d API keys", len(self._keys))
        except InputError as error:  # a file that is being edited must neither open nor close the server
            _log.error("the API keys stay as they were: %s", error)

    def _look(self) -> tuple[int, int]:
        try:
            facts = self._path.stat()
        except OSError as error:
            raise _unreadable(self._path, error.strerror) from error
        return facts.st_mtime_ns, facts.st_ino

    def _read(self) -> list[ApiKey]:
        try:
            entries = _entries(self._path.read_bytes(), self._path)
        except OSError as error:
            raise _unreadable(self._path, error.strerror) from error
        if not entries:  # an empty file must not open the server to everyone
            raise InputError(
                f"api-keys must hold a key, got none in {self._path}; leave the option out to ask for none"
            )
        before = {entry.name: entry for entry in self._keys}
        keys = [self._entry(name, values) for name, values in entries.items()]
        # A key that stays as it is keeps what it has used up.
        return [before[key.name] if key.name in before and _same(before[key.name], key) else key for key in keys]

    def _entry(self, name: str, values: object) -> ApiKey:
        if not isinstance(values, dict) or not re.fullmatch("[0-9a-f]{64}", str(values.get("sha256"))):
            raise InputError(f"[{name}] of {self._path} must hold sha256, 64 hex digits; make it with polyvec key")
        limits = {limit: value for limit, value in values.items() if limit != "sha256"}
        for limit, value in limits.items():
            if limit not in _LIMITS or isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise InputError(f"[{name}] of {self._path} must hold {', '.join(_LIMITS)} above 0, got another entry")
        return ApiKey(name, bytes.fromhex(values["sha256"]), limits)


def _entries(content: bytes, path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(content.decode())
    except ValueError as error:
        raise _unreadable(path, "it is not TOML") from error


def _unreadable(path: Path, why: str | None) -> InputError:
    return InputError(f"api-keys must be a readable file, got {path} ({why}); check it")


def _same(a: ApiKey, b: ApiKey) -> bool:
    return a.sha256 == b.sha256 and a.limits == b.limits


def add_key(name: str, path: Path, limits: dict[str, float]) -> str:
    """Make a key, add its hash to ``path`` and return it. Raises ``InputError`` for a name that is taken or no name."""
    if not _NAME.fullmatch(name):
        raise InputError(f"name must be 1 to 64 letters, digits, - or _, got {name!r}")
    content = path.read_bytes() if path.exists() else b""
    if content and name in _entries(content, path):
        raise InputError(f"name must be new in {path}, got {name!r} again; choose another")
    key = secrets.token_urlsafe(32)
    lines = [f"[{name}]", f"sha256 = {json.dumps(hashlib.sha256(key.encode()).hexdigest())}"]
    lines += [f"{limit} = {number:.15g}" for limit, number in limits.items()]
    # A file that is there stays open to whom it was open: a server of another user reads it again.
    facts = path.stat() if content else None
    with whole_file(path) as partial:
        partial.write_bytes(content + (b"\n" if content else b"") + "\n".join([*lines, ""]).encode())
        if facts is not None and hasattr(os, "chown"):
            with contextlib.suppress(PermissionError):  # only root gives files away
                os.chown(partial, facts.st_uid, facts.st_gid)
        partial.chmod(0o600 if facts is None else stat.S_IMODE(facts.st_mode))
    return key
