"""Adapters handed over by a trainer on this host: from the inbox's thread to the slots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog

from kiln_common.errors import KilnError
from kiln_engine.adapters.manager import AdapterManager
from kiln_nn.sharing import AdapterRefused, HandedAdapter

log = structlog.get_logger()


class Inbox(Protocol):
    """Where adapters are handed over: AdapterInbox."""

    def serve(self, take: Callable[[HandedAdapter], str]) -> None: ...

    def close(self) -> None: ...


def serve_handovers(inbox: Inbox, manager: AdapterManager) -> None:
    """Give what arrives to the manager, on the running event loop."""
    running = asyncio.get_running_loop()

    def take(adapter: HandedAdapter) -> str:
        try:
            return _wait_for(manager.receive(adapter.name, adapter.content, adapter.config_json), running)
        except KilnError as error:
            log.warning("adapter_not_taken", adapter=adapter.name, code=error.code, reason=str(error))
            raise AdapterRefused(str(error), error.code) from error
        except Exception as error:
            log.error("adapter_not_taken", adapter=adapter.name, exc_info=error)
            raise AdapterRefused("the adapter could not be brought to the device", "internal") from error

    inbox.serve(take)


def _wait_for(call: Coroutine[Any, Any, str], running: asyncio.AbstractEventLoop) -> str:
    return asyncio.run_coroutine_threadsafe(call, running).result()
