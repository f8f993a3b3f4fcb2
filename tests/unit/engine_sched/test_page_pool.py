import pytest

from kiln_engine.domain.errors import OutOfPages, OutOfStateSlots
from kiln_engine.scheduling.page_pool import PagePool
from kiln_engine.scheduling.state_pool import StatePool


def test_take_reserves_all_or_nothing():
    pool = PagePool(3)
    pool.take(2)
    with pytest.raises(OutOfPages):
        pool.take(2)
    assert pool.num_free == 1


def test_state_pool_names_its_own_shortage():
    with pytest.raises(OutOfStateSlots):
        StatePool(1).take(2)


def test_an_id_is_free_after_its_last_reference():
    pool = PagePool(1)
    [page] = pool.take(1)
    pool.retain(page)
    pool.release(page)
    assert pool.num_free == 0
    pool.release(page)
    assert pool.num_free == 1


def test_only_cached_follows_the_other_references():
    pool = PagePool(2)
    [page] = pool.take(1)
    pool.retain(page)
    pool.mark_cached(page)
    assert pool.num_only_cached == 0
    pool.release(page)
    assert pool.num_only_cached == 1
    pool.retain(page)
    assert not pool.is_only_cached(page)
    pool.release(page)
    pool.uncache(page)
    assert (pool.num_only_cached, pool.num_cached, pool.num_free) == (0, 0, 2)
