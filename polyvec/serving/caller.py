"""Who asks, how urgently, and by when: what the guard reads from the headers and the scheduler orders by."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeAlias

from polyvec.serving.keys import ApiKey

#: Whom the queue is fair to.
FlowName: TypeAlias = tuple[str, bool, bool]


@dataclass(frozen=True)
class Caller:
    """``key`` is None where the server asks for none; ``timeout`` is in seconds, None for the server's own."""

    key: ApiKey | None = None
    bulk: bool = False
    timeout: float | None = None
    is_check: bool = False  # the server itself, of its own health

    @property
    def flow(self) -> FlowName:
        """A key's bulk work stands apart from its other work."""
        return (self.key.name if self.key else "", self.bulk, self.is_check)


NOBODY = Caller()
CHECK = Caller(is_check=True)
#: Of the request that is being answered.
CALLER: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
