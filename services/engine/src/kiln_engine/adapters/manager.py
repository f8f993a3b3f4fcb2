"""Brings adapter versions onto the device while steps go on, and keeps them there while needed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import structlog

from kiln_common.errors import AdapterNotFound, KilnError
from kiln_common.pb import registry_pb2
from kiln_engine.adapters.slots import AdapterSlots, SlotEntry, SlotState
from kiln_engine.domain.adapter import AdapterLease, AdapterVersion, ResidentAdapter
from kiln_engine.domain.errors import AdapterSlotsFull, AdapterUnavailable
from kiln_engine.domain.ports import AdapterStore
from kiln_engine.loop import EngineLoop

log = structlog.get_logger()


class AdapterSource(Protocol):
    """Where versions come from: the registry's client."""

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion: ...

    async def fetch(self, sha256: str) -> bytes: ...


class AdapterManager:
    """Owns the slot table; lives on the asyncio thread.

    Bytes are fetched, checked and uploaded off the loop thread; a version starts to serve, and a
    slot is emptied, on the loop thread between two steps. Whoever needs a version that is being
    fetched waits for that one fetch. When all slots are pinned, a request waits up to `slot_wait_s`
    for one.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        store: AdapterStore,
        source: AdapterSource | None,
        loop: EngineLoop,
        *,
        slot_wait_s: float = 30.0,
    ) -> None:
        self._slots = slots
        self._store = store
        self._source = source
        self._loop = loop
        self._slot_wait_s = slot_wait_s
        self._loads: dict[str, asyncio.Task[None]] = {}
        # Set, and replaced, whenever a slot may have become free.
        self._change = asyncio.Event()

    @property
    def resident(self) -> list[ResidentAdapter]:
        """Versions that steps may use, by slot."""
        return [
            ResidentAdapter(entry.adapter, entry.slot, entry.num_pins)
            for entry in self._slots.entries
            if entry.is_usable
        ]

    async def acquire(self, versions: Sequence[AdapterVersion]) -> AdapterLease:
        """Make the versions resident and pin them; all or none.

        Raises:
            AdapterNotFound, AdapterUnavailable, AdapterSlotsFull, or what the store says about the
            bytes: nothing stays pinned.
        """
        entries: list[SlotEntry] = []
        try:
            for version in versions:
                entries.append(await self._acquire_one(version))
        except BaseException:
            for entry in entries:
                self._slots.unpin(entry)
            self._tell_waiters()
            raise
        return AdapterLease(tuple(versions), tuple(entry.slot for entry in entries))

    def release(self, lease: AdapterLease) -> None:
        """Let go of a lease's slots."""
        for adapter in lease.adapters:
            entry = self._slots.find(adapter.sha256)
            assert entry is not None, "a pinned version left its slot"
            self._slots.unpin(entry)
        self._tell_waiters()

    async def prepare(self, version: AdapterVersion) -> tuple[int, bool]:
        """Make a version resident; returns its slot and whether it had to be loaded."""
        known = self._slots.find(version.sha256)
        was_resident = known is not None and known.is_usable
        lease = await self.acquire([version])
        self.release(lease)
        self._retire_older(version)
        return lease.slots[0], not was_resident

    async def close(self) -> None:
        """Give up what is being fetched."""
        tasks = [*self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _acquire_one(self, version: AdapterVersion) -> SlotEntry:
        entry = self._slots.find(version.sha256) or await self._begin(version)
        self._slots.pin(entry)
        try:
            load = self._loads.get(version.sha256)
            if load is not None:
                await asyncio.shield(load)
        except BaseException:
            self._slots.unpin(entry)
            raise
        return entry

    async def _begin(self, version: AdapterVersion) -> SlotEntry:
        """Give the version a slot and start to load it; waits for a slot if all are pinned."""
        deadline_s = asyncio.get_running_loop().time() + self._slot_wait_s
        while True:
            known = self._slots.find(version.sha256)
            if known is not None:
                return known
            try:
                entry, evicted = self._slots.begin(version)
            except AdapterSlotsFull:
                try:
                    async with asyncio.timeout_at(deadline_s):
                        await self._change.wait()
                except TimeoutError:
                    raise AdapterSlotsFull(
                        f"all {self._slots.num_slots} adapter slots stayed in use for {self._slot_wait_s:g} s"
                    ) from None
                continue
            load = asyncio.create_task(self._load(entry, version, evicted))
            load.add_done_callback(_hear)
            self._loads[version.sha256] = load
            return entry

    async def _load(self, entry: SlotEntry, version: AdapterVersion, evicted: SlotEntry | None) -> None:
        started_s = asyncio.get_running_loop().time()
        try:
            if evicted is not None:
                await self._between_steps(lambda: self._clear(evicted))
            adapter_bytes, config_json = await self._fetch(version)
            await asyncio.to_thread(self._store.stage, entry.slot, adapter_bytes, config_json)
            self._slots.advance(entry, SlotState.STAGED)
            await self._between_steps(lambda: self._store.activate(entry.slot))
            self._slots.advance(entry, SlotState.RESIDENT)
        except BaseException as error:
            self._slots.fail(entry)
            if isinstance(error, KilnError):
                log.warning("adapter_failed", adapter=version.reference, code=error.code, reason=str(error))
            raise
        else:
            seconds = asyncio.get_running_loop().time() - started_s
            log.info(
                "adapter_resident", adapter=version.reference, slot=entry.slot, seconds=round(seconds, 4)
            )
        finally:
            del self._loads[version.sha256]
            self._tell_waiters()

    async def _fetch(self, version: AdapterVersion) -> tuple[bytes, str]:
        if self._source is None:
            raise AdapterUnavailable(
                f"adapter {version.reference} is not on this engine, and no registry is configured"
            )
        try:
            record = await self._source.resolve(version.reference)
            if record.sha256 != version.sha256:
                raise AdapterNotFound(
                    f"{version.reference} is {record.sha256[:12]}…, the request names {version.sha256[:12]}…"
                )
            adapter_bytes = await self._source.fetch(version.sha256)
        except KilnError as error:
            if error.code == AdapterNotFound.code:
                raise
            raise AdapterUnavailable(f"adapter {version.reference} could not be fetched: {error}") from error
        if hashlib.sha256(adapter_bytes).hexdigest() != version.sha256:
            raise AdapterUnavailable(f"the bytes of adapter {version.reference} do not match their hash")
        return adapter_bytes, record.config_json

    def _clear(self, evicted: SlotEntry) -> None:
        self._store.clear(evicted.slot)
        self._loop.retire_adapter(evicted.sha256)

    def _retire_older(self, version: AdapterVersion) -> None:
        for entry in self._slots.retire_older(version):
            self._loop.run_between_steps(partial(self._loop.retire_adapter, entry.sha256))
            log.info("adapter_retiring", adapter=entry.adapter.reference, pins=entry.num_pins)

    async def _between_steps(self, function: Callable[[], Any]) -> None:
        await asyncio.wrap_future(self._loop.run_between_steps(function))

    def _tell_waiters(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _hear(load: asyncio.Task[None]) -> None:
    """Take note of how a load ended: whoever waited for it may be gone."""
    if not load.cancelled():
        load.exception()
