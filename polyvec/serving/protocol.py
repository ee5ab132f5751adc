"""HTTP connections that do not wait for ever: uvicorn bounds neither the time nor the size of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 30.0  # for request line and headers, from the first byte, or from the connection
_HEAD_BYTES = 65_536


class PatientProtocol(HttpToolsProtocol):
    """Closes a connection whose head is late or large, or whose body goes on after its answer. Until that the body's
    limits are the guard's.
    """

    _due: asyncio.TimerHandle | None = None
    _is_in_head = True
    _is_whole = False  # the last request, its body included
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)  # which ends the wait between requests
        if self._is_in_head:
            if self._due is None:  # a head that came whole needs no timer
                self._expect_head()
            elif self._head_bytes > _HEAD_BYTES:
                self._give_up()
        elif self._is_answered() and (self._due is None or self._is_whole):  # of a body that nobody reads any more
            self._stop_waiting()
            self._due = self.loop.call_later(self.timeout_keep_alive if self._is_whole else HEAD_SECONDS, self._give_up)

    def on_message_begin(self) -> None:
        self._stop_waiting()  # the wait for it is over
        self._is_in_head, self._is_whole = True, False
        super().on_message_begin()

    def on_message_complete(self) -> None:
        self._is_whole = True
        super().on_message_complete()

    def on_headers_complete(self) -> None:
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._stop_waiting()
        self._is_in_head = True
        self._due = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        self._is_in_head = False
        self._head_bytes = 0
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _give_up(self) -> None:
        if self._is_answered():
            self.transport.close()
        else:  # an earlier request of this connection is being answered
            self._expect_head()

    def _is_answered(self) -> bool:
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete
