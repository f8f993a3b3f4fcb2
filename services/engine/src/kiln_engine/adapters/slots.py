"""Which adapter version is in which slot, and how far it is. Decides with integers only."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum

from kiln_engine.domain.adapter import AdapterVersion
from kiln_engine.domain.errors import AdapterSlotsFull


class SlotState(Enum):
    """Life of a version in a slot; a version without a slot is absent."""

    FETCHING = "fetching"  # its bytes are on their way
    STAGED = "staged"  # on the device, for no request yet
    RESIDENT = "resident"  # steps may use it
    RETIRING = "retiring"  # superseded: serves those who name it, and is the first to go


_NEXT_STATES = {
    SlotState.FETCHING: {SlotState.STAGED},
    SlotState.STAGED: {SlotState.RESIDENT},
    SlotState.RESIDENT: {SlotState.RETIRING},
    SlotState.RETIRING: {SlotState.RESIDENT},
}


@dataclass(eq=False, slots=True)
class SlotEntry:
    """One version in one slot."""

    slot: int
    adapter: AdapterVersion
    state: SlotState = SlotState.FETCHING
    num_pins: int = 0
    last_used: int = 0
    # Staged ahead of its publication, and nobody has asked for it yet.
    is_unclaimed: bool = False

    @property
    def sha256(self) -> str:
        return self.adapter.sha256

    @property
    def is_usable(self) -> bool:
        return self.state in (SlotState.RESIDENT, SlotState.RETIRING)

    @property
    def can_give_way(self) -> bool:
        return (self.is_usable or self.is_unclaimed) and not self.num_pins


class AdapterSlots:
    """Slots 1 to `num_slots`; slot 0 is the base model and never given out.

    Invariants: a version has at most one slot; a pinned slot is not reused; only a version that is
    resident or retiring, or unclaimed, and unpinned, gives way.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._by_sha256: dict[str, SlotEntry] = {}
        self._free = list(range(num_slots, 0, -1))
        self._ticks = itertools.count(1)

    @property
    def entries(self) -> list[SlotEntry]:
        """By slot."""
        return sorted(self._by_sha256.values(), key=lambda entry: entry.slot)

    def find(self, sha256: str) -> SlotEntry | None:
        return self._by_sha256.get(sha256)

    def begin(self, adapter: AdapterVersion) -> tuple[SlotEntry, SlotEntry | None]:
        """Give an absent version a slot, in state FETCHING.

        Returns the entry and the version that had to leave its slot for it, if any.

        Raises:
            AdapterSlotsFull: every slot is pinned or being filled.
        """
        assert adapter.sha256 not in self._by_sha256
        evicted = None
        if not self._free:
            evicted = self._choose_victim()
            self.drop(evicted)
        entry = SlotEntry(self._free.pop(), adapter, last_used=next(self._ticks))
        self._by_sha256[adapter.sha256] = entry
        return entry, evicted

    def advance(self, entry: SlotEntry, state: SlotState) -> None:
        """Move a version on in its life."""
        assert state in _NEXT_STATES[entry.state], f"{entry.state} does not become {state}"
        entry.state = state

    def drop(self, entry: SlotEntry) -> None:
        """Make a version absent and its slot free; it must not be pinned."""
        assert entry.num_pins == 0, f"slot {entry.slot} is pinned {entry.num_pins} times"
        del self._by_sha256[entry.sha256]
        self._free.append(entry.slot)

    def fail(self, entry: SlotEntry) -> None:
        """Make a version absent whose load failed. Pins of those who waited for it mean nothing now."""
        assert not entry.is_usable
        del self._by_sha256[entry.sha256]
        self._free.append(entry.slot)

    def pin(self, entry: SlotEntry) -> None:
        """Keep a version where it is; a retiring one that is asked for again stays."""
        entry.num_pins += 1
        entry.last_used = next(self._ticks)

    def unpin(self, entry: SlotEntry) -> None:
        assert entry.num_pins > 0
        entry.num_pins -= 1

    def retire_older(self, newer: AdapterVersion) -> list[SlotEntry]:
        """Mark the resident versions of the same name before `newer` as superseded; returns them."""
        older = [
            entry
            for entry in self._by_sha256.values()
            if entry.adapter.name == newer.name
            and entry.adapter.version < newer.version
            and entry.state is SlotState.RESIDENT
        ]
        for entry in older:
            self.advance(entry, SlotState.RETIRING)
        return older

    def prefer(self, current: AdapterVersion) -> None:
        """Let the versions of a name after `current` go before it: the name was rolled back to it."""
        for entry in self._by_sha256.values():
            if entry.adapter.name != current.name:
                continue
            if entry.sha256 == current.sha256 and entry.state is SlotState.RETIRING:
                self.advance(entry, SlotState.RESIDENT)
            elif entry.adapter.version > current.version and entry.state is SlotState.RESIDENT:
                self.advance(entry, SlotState.RETIRING)

    def _choose_victim(self) -> SlotEntry:
        candidates = [entry for entry in self._by_sha256.values() if entry.can_give_way]
        if not candidates:
            raise AdapterSlotsFull(f"all {self.num_slots} adapter slots are in use by running requests")
        return min(candidates, key=lambda entry: (entry.state is not SlotState.RETIRING, entry.last_used))
