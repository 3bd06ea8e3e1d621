"""uvicorn's HTTP/1.1 over h11, with an end to what it would wait for for ever: a request's head that never comes whole."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT = 20.0  # seconds for a request's head to arrive; between two requests `timeout_keep_alive` counts


class Connection(H11Protocol):
    """One client's. It hangs up on who takes longer than HEAD_TIMEOUT over a head, or sends nothing at all."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:  # the head is there, or will never be
            self._cancel()
        elif self._late is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._late = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)

    def _cancel(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = None

    def _unsupported_upgrade_warning(self) -> None:
        """A request for a websocket is answered as the plain one that it also is, and needs no library installed."""
