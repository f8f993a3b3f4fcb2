import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln_engine.adapters.slots import AdapterSlots, SlotState
from kiln_engine.domain.adapter import AdapterVersion
from kiln_engine.domain.errors import AdapterSlotsFull


def named(name: str, version: int = 1) -> AdapterVersion:
    return AdapterVersion(name, version, f"{name}{version}")


def load(slots: AdapterSlots, name: str, version: int = 1):
    entry, evicted = slots.begin(named(name, version))
    slots.advance(entry, SlotState.STAGED)
    slots.advance(entry, SlotState.RESIDENT)
    return entry, evicted


def test_slot_zero_is_never_given_out():
    slots = AdapterSlots(3)
    assert [load(slots, name)[0].slot for name in "abc"] == [1, 2, 3]


def test_the_least_recently_pinned_version_gives_way():
    slots = AdapterSlots(2)
    a, _ = load(slots, "a")
    b, _ = load(slots, "b")
    slots.pin(a)
    slots.unpin(a)
    c, evicted = load(slots, "c")
    assert evicted is b
    assert c.slot == b.slot
    assert slots.find("b1") is None


def test_a_pinned_slot_is_never_reused():
    slots = AdapterSlots(1)
    a, _ = load(slots, "a")
    slots.pin(a)
    with pytest.raises(AdapterSlotsFull):
        slots.begin(named("b"))
    slots.unpin(a)
    assert slots.begin(named("b"))[1] is a


def test_a_slot_that_is_being_filled_does_not_give_way():
    slots = AdapterSlots(1)
    slots.begin(named("a"))
    with pytest.raises(AdapterSlotsFull):
        slots.begin(named("b"))


def test_superseded_versions_go_first():
    slots = AdapterSlots(2)
    load(slots, "other")
    old, _ = load(slots, "a", 1)
    slots.pin(old)
    slots.unpin(old)
    assert slots.retire_older(named("a", 2)) == [old]
    assert load(slots, "a", 2)[1] is old


def test_a_failed_version_frees_its_slot():
    slots = AdapterSlots(1)
    entry, _ = slots.begin(named("a"))
    slots.pin(entry)
    slots.fail(entry)
    assert slots.find("a1") is None
    assert slots.begin(named("b"))[0].slot == 1


def test_states_follow_their_order():
    slots = AdapterSlots(1)
    entry, _ = slots.begin(named("a"))
    with pytest.raises(AssertionError):
        slots.advance(entry, SlotState.RESIDENT)


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from("lpu"), st.integers(0, 6)), max_size=60))
def test_slots_are_never_shared_and_pins_hold(num_slots, actions):
    slots = AdapterSlots(num_slots)
    for action, number in actions:
        sha = f"v{number}1"
        entry = slots.find(sha)
        pinned = {e.sha256 for e in slots.entries if e.num_pins}
        if action == "l" and entry is None:
            if len(pinned) == num_slots:
                with pytest.raises(AdapterSlotsFull):
                    slots.begin(named(f"v{number}"))
            else:
                load(slots, f"v{number}")
        elif action == "p" and entry:
            slots.pin(entry)
        elif action == "u" and entry and entry.num_pins:
            slots.unpin(entry)
        assert pinned - {sha} <= {e.sha256 for e in slots.entries}
        taken = [e.slot for e in slots.entries]
        assert len(set(taken)) == len(taken) <= num_slots
        assert 0 not in taken
