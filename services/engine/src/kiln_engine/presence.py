"""Keeps the engine's word on Redis, so that gateways and trainers find it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from kiln_common.bus.connect import REDIS_AWAY, connect_async
from kiln_common.bus.engine_presence import RENEW_S, EngineWord, say, withdraw
from kiln_common.pb import engine_pb2
from kiln_engine.domain.ports import AdapterResidency
from kiln_engine.loop import EngineLoop
from kiln_engine.servicer.intake import RequestIntake

log = structlog.get_logger()

_REDIS_TIMEOUT_S = 2.0
# A step may take longer than that; what was known before is said again then.
_SUMMARY_TIMEOUT_S = 0.5


class Presence:
    """Says every second what the engine holds and does, and at once when that is asked for.

    Without Redis the engine serves whoever has its address.
    """

    def __init__(
        self,
        redis_url: str,
        address: str,
        info: engine_pb2.EngineInfo,
        page_tokens: int,
        *,
        loop: EngineLoop,
        intake: RequestIntake,
        adapters: AdapterResidency,
    ) -> None:
        self._redis = connect_async(redis_url, timeout_s=_REDIS_TIMEOUT_S)
        self._address = address
        self._info = info
        self._page_tokens = page_tokens
        self._loop, self._intake, self._adapters = loop, intake, adapters
        self._prefixes: frozenset[bytes] = frozenset()
        self._is_changed = asyncio.Event()

    def say_now(self) -> None:
        """Something changed that others should not learn a second later."""
        self._is_changed.set()

    async def run(self) -> None:
        """Renew the word until cancelled, then take it back."""
        is_away: bool | None = None
        try:
            while True:
                self._is_changed.clear()
                try:
                    await say(self._redis, await self._word())
                except REDIS_AWAY as error:
                    if is_away is not True:
                        log.warning("engine_not_announced", reason=str(error))
                    is_away = True
                except Exception as error:  # noqa: BLE001 such as a full Redis: it may have room again
                    log.warning("engine_not_announced", reason=str(error))
                else:
                    if is_away is not False:
                        log.info("engine_announced", address=self._address)
                    is_away = False
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RENEW_S):
                        await self._is_changed.wait()
        finally:
            with contextlib.suppress(Exception):
                await withdraw(self._redis, self._info.boot_id)
            await self._redis.aclose()

    async def _word(self) -> EngineWord:
        stats = self._loop.stats
        return EngineWord(
            address=self._address,
            boot_id=self._info.boot_id,
            model_hash=self._info.base_model.model_hash,
            page_tokens=self._page_tokens,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting + self._intake.num_preparing,
            is_draining=self._intake.is_draining,
            adapters=frozenset(entry.adapter.sha256 for entry in self._adapters.resident),
            prefixes=await self._summary(),
        )

    async def _summary(self) -> frozenset[bytes]:
        """Beginnings it can start from; the loop's thread keeps them, and tells between two steps."""
        asked = self._loop.run_between_steps(self._loop.checkpoint_names, settles=False)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_SUMMARY_TIMEOUT_S):
                self._prefixes = await asyncio.wrap_future(asked)
        return self._prefixes


def advertised_address(configured: str, listen: str, port: int, host_name: Callable[[], str]) -> str:
    """Where others reach a server that listens on `listen`, bound to `port`."""
    if configured or listen.startswith("unix:"):
        return configured or listen
    host = listen.rpartition(":")[0]
    return f"{host_name() if host in ('', '0.0.0.0', '[::]') else host}:{port}"
