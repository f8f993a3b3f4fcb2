"""The registry's adapters as one key sees them: those of other keys are not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kiln_common.errors import AdapterNotFound
from kiln_common.pb import registry_pb2
from kiln_gateway.auth import Caller
from kiln_gateway.ports import RegistryPort

# Where an engine runs: its address, and its GPU's UUID or its machine's boot id.
_PLACE = ("address", "device_id")


def is_visible(owner: str, caller: Caller) -> bool:
    """An adapter belongs to the key that made its first version; admins see all of them."""
    return "admin" in caller.scopes or owner == caller.owner


def visible_engines(
    engines: Iterable[dict[str, Any]], adapters: Sequence[registry_pb2.Adapter] | None, caller: Caller
) -> list[dict[str, Any]]:
    """Engines as `caller` sees them: admins whole, others without their place and with their own adapters only.

    None of those are known while the registry is away.
    """
    if "admin" in caller.scopes:
        return list(engines)
    names = {adapter.name for adapter in adapters or () if is_visible(adapter.owner, caller)}
    return [
        {
            name: [each for each in value if each.rpartition("@")[0] in names]
            if name == "resident_adapters"
            else value
            for name, value in engine.items()
            if name not in _PLACE
        }
        for engine in engines
    ]


class VisibleAdapters:
    """What `caller` may look up; each method raises AdapterNotFound as if the rest did not exist."""

    def __init__(self, registry: RegistryPort, caller: Caller) -> None:
        self._registry = registry
        self._caller = caller

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        """The version that "name" or "name@3" means now."""
        found = await self._registry.resolve(reference)
        self._check(found.owner, reference)
        return found

    async def get(self, name: str) -> registry_pb2.Adapter:
        """A name with all its versions."""
        found = await self._registry.get(name)
        self._check(found.owner, name)
        return found

    async def list(self) -> list[registry_pb2.Adapter]:
        """Every name with its versions."""
        return [found for found in await self._registry.list() if is_visible(found.owner, self._caller)]

    def _check(self, owner: str, reference: str) -> None:
        if not is_visible(owner, self._caller):
            raise AdapterNotFound(f"there is no adapter {reference[:160]!r}")
