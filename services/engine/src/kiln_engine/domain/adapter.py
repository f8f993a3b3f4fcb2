"""Adapter versions as requests name and hold them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """An immutable published version; `sha256` is the identity of its bytes."""

    name: str
    version: int
    sha256: str

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Rollback:
    """A name means `target` although there are later versions, up to `passed_over`; one after that counts again."""

    target: AdapterVersion
    passed_over: int


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter as a request applies it: identity of the bytes, and strength.

    The name it was asked for by is for statistics, and no part of what it is.
    """

    sha256: str
    scale: float = 1.0
    name: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """The adapters with which a request goes on; one use and one (slot, scale) for each version."""

    versions: tuple[AdapterVersion, ...]
    uses: tuple[AdapterUse, ...]
    slots: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class ResidentAdapter:
    """A version that steps may use, and how many requests hold its slot."""

    adapter: AdapterVersion
    slot: int
    num_pins: int


@dataclass(frozen=True, slots=True)
class AdapterLease:
    """A request's hold on its adapters: their slots stay as they are until it is released."""

    adapters: tuple[AdapterVersion, ...]
    # One for each adapter, in the same order.
    slots: tuple[int, ...]
