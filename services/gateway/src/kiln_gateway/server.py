"""Serves the application over HTTP, and stops without cutting an answer off."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from kiln_gateway.edge import MOST_HEADER_BYTES
from kiln_gateway.gateway import Gateway

# A connection that has just been made has so long to send its request.
_FIRST_REQUEST_S = 1.0
# What is left after the grace time only has to send its error.
_LAST_EVENTS_S = 3
# Longer than clients keep an idle connection, so that none is closed just as it is used again.
_KEEP_ALIVE_S = 75


class TimedProtocol(H11Protocol):
    """Closes a connection whose next request's headers have begun, or were never begun, and do not end.

    An idle connection between two requests is the keep-alive timer's business.
    """

    header_timeout_s = 20.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._header_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_headers(self) -> None:
        is_waiting = self.cycle is None or self.cycle.response_complete
        if not is_waiting:
            self._stop_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_timeout_s, self.transport.close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None


class GatewayServer(uvicorn.Server):
    """On a stop: no new connections; running answers get `grace_s` to end, then end with an error."""

    def __init__(self, app: FastAPI, *, host: str, port: int, grace_s: int) -> None:
        self._gateway: Gateway = app.state.gateway
        header_timeout_s = self._gateway.settings.header_timeout_s
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                # As all libraries: through the root logger (kiln_common.logs).
                log_config=None,
                log_level="warning",
                access_log=False,
                http=type("GatewayProtocol", (TimedProtocol,), {"header_timeout_s": header_timeout_s}),
                # Far from whole and already too large: not even read.
                h11_max_incomplete_event_size=2 * MOST_HEADER_BYTES,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=grace_s + _LAST_EVENTS_S,
            )
        )
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._gateway.end_answers(self._grace_s))
        await asyncio.sleep(0)  # what the kernel has accepted is taken over
        for server in self.servers:
            server.close()
        await asyncio.sleep(min(_FIRST_REQUEST_S, self._grace_s))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ending
