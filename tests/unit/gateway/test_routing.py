"""Where requests go: to what is cached, within the bound, and evenly where nothing is."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln_gateway.routing import MAX_IMBALANCE, EngineView, PlacementCount, choose

PATH = [b"page-1", b"page-2", b"page-3"]


def views(*running, **fields):
    return [EngineView(f"engine-{i}", num, 0.0, frozenset(), **fields) for i, num in enumerate(running)]


def holding(view, *names):
    return replace(view, prefixes=frozenset(names))


def test_the_longest_cached_beginning_wins():
    engines = views(3, 3, 3)
    engines[1] = holding(engines[1], PATH[0])
    engines[2] = holding(engines[2], PATH[1])
    assert choose(engines, PATH, b"key") == 2


def test_of_two_with_the_same_beginning_the_one_with_less_to_do():
    engines = [holding(view, PATH[0]) for view in views(3, 1, 2)]
    assert choose(engines, PATH, b"key") == 1


def test_an_engine_above_the_bound_is_passed_over_whatever_it_holds():
    engines = views(13, 9, 9, 9)  # mean with this one: 10.25, the bound 13
    engines[0] = holding(engines[0], *PATH)
    assert choose(engines, PATH, b"key") != 0
    engines[0] = replace(engines[0], num_running=12)
    assert choose(engines, PATH, b"key") == 0


def test_a_few_requests_never_leave_what_is_cached():
    engines = views(7, 0, 0, 0)
    engines[0] = holding(engines[0], PATH[0])
    assert choose(engines, PATH, b"key") == 0


def test_gateways_that_know_nothing_agree_on_new_beginnings():
    engines = views(0, 0, 0, 0)
    for number in range(20):
        key = f"conversation {number}".encode()
        assert choose(engines, [], key) == choose(engines, [], key)
    assert len({choose(engines, [], f"{number}".encode()) for number in range(20)}) == 4


def test_an_engine_that_leaves_moves_only_its_own_beginnings():
    engines = views(0, 0, 0, 0)
    keys = [f"{number}".encode() for number in range(200)]
    before = {key: engines[choose(engines, [], key)].engine_id for key in keys}
    left = engines[:3]
    moved = [key for key in keys if left[choose(left, [], key)].engine_id != before[key]]
    assert set(moved) == {key for key in keys if before[key] == "engine-3"}


def test_new_beginnings_go_where_the_adapter_is():
    engines = views(0, 0, 0, has_adapters=False)
    engines[2] = replace(engines[2], has_adapters=True)
    assert all(choose(engines, [], f"{number}".encode()) == 2 for number in range(20))


@settings(max_examples=200, deadline=None)
@given(
    running=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    placed=st.lists(st.floats(0, 100), min_size=8, max_size=8),
    held=st.lists(st.sets(st.sampled_from(PATH)), min_size=8, max_size=8),
    key=st.binary(max_size=8),
)
def test_no_engine_gets_more_than_the_bound_while_another_has_room(running, placed, held, key):
    engines = [EngineView(f"engine-{i}", num, placed[i], frozenset(held[i])) for i, num in enumerate(running)]
    chosen = choose(engines, PATH, key)
    mean = (sum(running) + 1) / len(running)
    assert running[chosen] + 1 <= max(8, MAX_IMBALANCE * mean + 1)
    assert choose(engines, PATH, key) == chosen


@settings(max_examples=30, deadline=None)
@given(num_engines=st.integers(2, 8), num_gateways=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_new_conversations_are_even_whichever_gateway_they_come_by(num_engines, num_gateways, seed):
    """Each gateway counts only what it sent itself, and all requests end at once."""
    chance = random.Random(seed)
    counts = [Counter() for _ in range(num_gateways)]
    for number in range(300):
        own = counts[number % num_gateways]
        engines = [EngineView(f"engine-{i}", 0, float(own[i]), frozenset()) for i in range(num_engines)]
        own[choose(engines, [], chance.randbytes(8))] += 1
    total = sum(counts, Counter())
    assert max(total.values()) <= 1.1 * 300 / num_engines + num_gateways
    assert sum(total.values()) == 300


def test_placements_fade():
    count = PlacementCount()
    for _ in range(10):
        count.add(100.0)
    assert count.value(100.0) == pytest.approx(10.0)
    assert 1.0 < count.value(160.0) < 2.0
    assert count.value(1000.0) < 1e-6
