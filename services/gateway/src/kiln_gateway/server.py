"""Serves the application over HTTP, and stops without cutting an answer off."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn
from fastapi import FastAPI

from kiln_gateway.gateway import Gateway

# What is left after the grace time only has to send its error.
_LAST_EVENTS_S = 3
# Longer than clients keep an idle connection, so that none is closed just as it is used again.
_KEEP_ALIVE_S = 75


class GatewayServer(uvicorn.Server):
    """On a stop: no new connections; running answers get `grace_s` to end, then end with an error."""

    def __init__(self, app: FastAPI, *, host: str, port: int, grace_s: int) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                # As all libraries: through the root logger (kiln_common.logs).
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=grace_s + _LAST_EVENTS_S,
            )
        )
        self._gateway: Gateway = app.state.gateway
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._gateway.end_answers(self._grace_s))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ending
