"""What an engine tells the registry about the versions its requests run on."""

from kiln_common.errors import RegistryUnavailable
from kiln_engine.adapters.holds import AdapterHolds
from kiln_engine.domain.adapter import AdapterVersion, ResidentAdapter


class Adapters:
    def __init__(self) -> None:
        self.resident = []

    def put(self, **pins):
        self.resident = [
            ResidentAdapter(AdapterVersion(name, 1, name * 64), slot, num_pins)
            for slot, (name, num_pins) in enumerate(pins.items(), start=1)
        ]


class Registry:
    def __init__(self) -> None:
        self.held = []
        self.is_up = True

    async def hold(self, holder, references, *, for_s):
        if not self.is_up:
            raise RegistryUnavailable("away")
        assert (holder, for_s > 0) == ("boot", True)
        self.held.append([*references])


async def test_pinned_versions_are_held_and_let_go_once():
    adapters, registry = Adapters(), Registry()
    holds = AdapterHolds(registry, adapters, "boot")
    await holds.report()
    assert registry.held == []  # nothing to say
    adapters.put(a=1, b=0, c=2)
    await holds.report()
    await holds.report()
    adapters.put(a=0)
    await holds.report()
    await holds.report()
    assert registry.held == [["a@1", "c@1"], ["a@1", "c@1"], []]


async def test_what_could_not_be_let_go_is_let_go_later():
    adapters, registry = Adapters(), Registry()
    holds = AdapterHolds(registry, adapters, "boot")
    adapters.put(a=1)
    await holds.report()
    adapters.put()
    registry.is_up = False
    await holds.report()
    registry.is_up = True
    await holds.report()
    assert registry.held == [["a@1"], []]
