"""Brings adapter versions onto the device while steps go on, and keeps them there while needed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

import structlog

from kiln_common.errors import AdapterNotFound, KilnError
from kiln_common.histogram import REQUEST_SECONDS, Histogram
from kiln_common.pb import registry_pb2
from kiln_engine.adapters.slots import AdapterSlots, SlotEntry, SlotState
from kiln_engine.domain.adapter import AdapterLease, AdapterVersion, ResidentAdapter, Rollback
from kiln_engine.domain.errors import AdapterSlotsFull, AdapterUnavailable
from kiln_engine.domain.ports import AdapterStore
from kiln_engine.loop import EngineLoop

log = structlog.get_logger()


class AdapterSource(Protocol):
    """Where versions come from: the registry's client."""

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion: ...

    async def fetch(self, sha256: str) -> bytes:
        """The bytes, checked against their hash."""
        ...


class AdapterManager:
    """Owns the slot table; lives on the asyncio thread.

    Bytes are fetched, checked and uploaded off the loop thread; a slot is filled and emptied on the
    loop thread between two steps, which only changes an index. Bytes come from the registry, or ahead
    of their publication from a trainer on this host; then all that the commit still changes is
    whether requests are given the slot. Whoever needs a version that is being fetched waits for that
    one fetch. When all slots are pinned, a request waits up to `slot_wait_s` for one.
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
        # Called when a version can serve.
        self.on_resident: Callable[[AdapterVersion], None] = lambda _: None
        # Called with the name and the hash of bytes that came ahead of their version.
        self.on_ahead: Callable[[str, str], None] = lambda name, sha256: None
        self.load_seconds = Histogram(REQUEST_SECONDS)
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._config_of_unclaimed: dict[str, str] = {}
        # Records that the registry has sent of itself, by hash, while they are acted on.
        self._committed: dict[str, registry_pb2.AdapterVersion] = {}
        self._rollbacks: dict[str, Rollback] = {}
        # Set, and replaced, whenever a slot may have become free.
        self._change = asyncio.Event()

    def newest(self, name: str) -> AdapterVersion | None:
        """What a name means, of the versions that steps may use: the highest, unless it was rolled back."""
        versions = [
            entry.adapter for entry in self._slots.entries if entry.is_usable and entry.adapter.name == name
        ]
        highest = max(versions, key=lambda version: version.version, default=None)
        rollback = self._rollbacks.get(name)
        if rollback is None or (highest is not None and highest.version > rollback.passed_over):
            return highest
        known = self._slots.find(rollback.target.sha256)
        return rollback.target if known is not None and known.is_usable else None

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

    async def check_owner(self, versions: Sequence[AdapterVersion], owner: str) -> None:
        """Raises AdapterNotFound where one is another owner's, as if it did not exist; AdapterUnavailable."""
        for version in versions:
            record = await self._look_up(version)
            # A slot is found by its hash: the name has to be that of these bytes, too.
            if record.owner != owner or record.sha256 != version.sha256:
                raise AdapterNotFound(f"there is no adapter {version.reference[:160]!r}")

    def release(self, lease: AdapterLease) -> None:
        """Let go of a lease's slots."""
        for adapter in lease.adapters:
            entry = self._slots.find(adapter.sha256)
            assert entry is not None, "a pinned version left its slot"
            self._slots.unpin(entry)
        self._tell_waiters()

    async def receive(self, name: str, content: memoryview, config_json: str) -> str:
        """Bring what a trainer hands over into a slot, ahead of its publication; returns its sha256.

        It serves nobody before a version of this hash is asked for and the registry has it.

        Raises:
            AdapterSlotsFull: no slot is free now; or what the store says about the bytes.
        """
        sha256 = await asyncio.to_thread(_sha256_of, content)
        if self._slots.find(sha256) is None:
            entry, evicted = self._slots.begin(AdapterVersion(name, 0, sha256))
            self.on_ahead(name, sha256)
            await asyncio.shield(self._start(entry, self._receive(entry, evicted, content, config_json)))
        return sha256

    async def prepare(self, version: AdapterVersion) -> tuple[int, bool]:
        """Make a version resident; returns its slot and whether it had to be loaded."""
        known = self._slots.find(version.sha256)
        was_resident = known is not None and known.is_usable
        lease = await self.acquire([version])
        self.release(lease)
        entry = self._slots.find(version.sha256)
        if entry is not None and entry.adapter.name != version.name:
            # The same bytes, published under another name: those who follow that name hear of it.
            entry.adapter = version
            self.on_resident(version)
        self._retire_older(version)
        return lease.slots[0], not was_resident

    async def take_over(self, record: registry_pb2.AdapterVersion) -> None:
        """Let a version serve whose bytes are here, and of which the registry itself says it is committed."""
        if self._slots.find(record.sha256) is None:  # it gave way: who asks for it has it fetched
            return
        self._committed[record.sha256] = record
        try:
            await self.prepare(AdapterVersion(record.name, record.version, record.sha256))
        finally:
            self._committed.pop(record.sha256, None)

    async def turn_back(self, rollback: Rollback) -> None:
        """A name means an older version again: bring it here, and tell those who follow the name."""
        self._rollbacks[rollback.target.name] = rollback
        await self.prepare(rollback.target)
        self._slots.prefer(rollback.target)
        self.on_resident(rollback.target)

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
            # Twice where the bytes were on their way already, ahead of the version.
            while not entry.is_usable:
                await asyncio.shield(self._loads.get(version.sha256) or self._start_commit(entry, version))
        except BaseException:
            self._slots.unpin(entry)
            raise
        if entry.adapter.name == version.name and entry.adapter.version < version.version:
            entry.adapter = version  # the same bytes, published again
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
            self._start(entry, self._load(entry, version, evicted))
            return entry

    def _start(self, entry: SlotEntry, load: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Work on an entry; one at a time."""
        assert entry.sha256 not in self._loads
        task = asyncio.create_task(self._run(entry, load))
        task.add_done_callback(_hear)
        self._loads[entry.sha256] = task
        return task

    async def _run(self, entry: SlotEntry, load: Coroutine[Any, Any, None]) -> None:
        try:
            await load
        except BaseException as error:
            if not entry.is_unclaimed:
                self._slots.fail(entry)
            if isinstance(error, KilnError):
                log.warning(
                    "adapter_failed", adapter=entry.adapter.reference, code=error.code, reason=str(error)
                )
            raise
        finally:
            del self._loads[entry.sha256]
            self._tell_waiters()

    async def _load(self, entry: SlotEntry, version: AdapterVersion, evicted: SlotEntry | None) -> None:
        """From the registry to the steps."""
        started_s = asyncio.get_running_loop().time()
        await self._empty(evicted)
        record = await self._resolve(version)
        await self._fill(entry, await self._fetch(version), record.config_json)
        self._slots.advance(entry, SlotState.STAGED)
        self._serve(entry, version, started_s, came_from="registry")

    async def _empty(self, evicted: SlotEntry | None) -> None:
        if evicted is not None:
            self._config_of_unclaimed.pop(evicted.sha256, None)
            await self._between_steps(lambda: self._clear(evicted))

    async def _fill(self, entry: SlotEntry, content: bytes | memoryview, config_json: str) -> None:
        """Bring an adapter to where steps would find it, if a request named its slot."""
        await asyncio.to_thread(self._store.stage, entry.slot, content, config_json)
        await self._between_steps(lambda: self._store.activate(entry.slot))

    async def _receive(
        self, entry: SlotEntry, evicted: SlotEntry | None, content: memoryview, config_json: str
    ) -> None:
        await self._empty(evicted)
        await self._fill(entry, content, config_json)
        self._slots.advance(entry, SlotState.STAGED)
        entry.is_unclaimed = True
        self._config_of_unclaimed[entry.sha256] = config_json

    def _start_commit(self, entry: SlotEntry, version: AdapterVersion) -> asyncio.Task[None]:
        return self._start(entry, self._commit(entry, version))

    async def _commit(self, entry: SlotEntry, version: AdapterVersion) -> None:
        """Let a version serve whose bytes were there before it; they stay unclaimed if it does not exist."""
        started_s = asyncio.get_running_loop().time()
        came_from = "trainer"
        self._slots.pin(entry)  # whoever asked may go away meanwhile
        try:
            record = await self._resolve(version)
            entry.is_unclaimed = False
            if self._config_of_unclaimed.pop(entry.sha256) != record.config_json:
                # The same numbers, to be applied otherwise than it was said when they came.
                came_from = "registry"
                await self._between_steps(lambda: self._store.clear(entry.slot))
                await self._fill(entry, await self._fetch(version), record.config_json)
        finally:
            self._slots.unpin(entry)
        self._serve(entry, version, started_s, came_from=came_from)

    def _serve(self, entry: SlotEntry, version: AdapterVersion, started_s: float, *, came_from: str) -> None:
        """From here on requests get the slot: the flip, for which no step has to end."""
        entry.adapter = version
        self._slots.advance(entry, SlotState.RESIDENT)
        seconds = asyncio.get_running_loop().time() - started_s
        self.load_seconds.observe(seconds)
        log.info(
            "adapter_resident",
            adapter=version.reference,
            slot=entry.slot,
            came_from=came_from,
            seconds=round(seconds, 4),
        )
        self.on_resident(version)

    async def _resolve(self, version: AdapterVersion) -> registry_pb2.AdapterVersion:
        """The version's record, once it is committed."""
        sent = self._committed.get(version.sha256)
        if sent is not None and (sent.name, sent.version) == (version.name, version.version):
            return sent
        record = await self._look_up(version)
        if record.sha256 != version.sha256:
            raise AdapterNotFound(
                f"{version.reference} is {record.sha256[:12]}…, the request names {version.sha256[:12]}…"
            )
        return record

    async def _look_up(self, version: AdapterVersion) -> registry_pb2.AdapterVersion:
        if self._source is None:
            raise AdapterUnavailable(
                f"adapter {version.reference} is not on this engine, and no registry is configured"
            )
        try:
            return await self._source.resolve(version.reference)
        except KilnError as error:
            if error.code == AdapterNotFound.code:
                raise
            raise _unavailable(version, error) from error

    async def _fetch(self, version: AdapterVersion) -> bytes:
        """The version's bytes, checked against its hash by the source."""
        assert self._source is not None
        try:
            return await self._source.fetch(version.sha256)
        except KilnError as error:
            raise _unavailable(version, error) from error

    def _clear(self, evicted: SlotEntry) -> None:
        self._store.clear(evicted.slot)
        self._loop.retire_adapter(evicted.sha256)

    def _retire_older(self, version: AdapterVersion) -> None:
        for entry in self._slots.retire_older(version):
            self._loop.run_between_steps(partial(self._loop.retire_adapter, entry.sha256), settles=False)
            log.info("adapter_retiring", adapter=entry.adapter.reference, pins=entry.num_pins)

    async def _between_steps(self, function: Callable[[], Any]) -> None:
        """Call on the loop thread; no step under way uses a slot that is filled or given away."""
        await asyncio.wrap_future(self._loop.run_between_steps(function, settles=False))

    def _tell_waiters(self) -> None:
        self._change.set()
        self._change = asyncio.Event()


def _hear(load: asyncio.Task[None]) -> None:
    """Take note of how a load ended: whoever waited for it may be gone."""
    if not load.cancelled():
        load.exception()


def _sha256_of(content: memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _unavailable(version: AdapterVersion, error: KilnError) -> AdapterUnavailable:
    return AdapterUnavailable(f"adapter {version.reference} could not be fetched: {error}")
