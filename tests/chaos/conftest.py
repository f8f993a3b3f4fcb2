"""One whole system for all faults: two gateways, two engines, and a Redis that the tests can take away.

KILN_CHAOS_OUTAGE_S is how long things stay away; scripts/chaos.sh makes it longer than `make test`, and
runs those marked `slow` too.
"""

import os

import pytest

from tests.support.chaos import System


def pytest_collection_modifyitems(config, items):
    if "KILN_CHAOS_OUTAGE_S" in os.environ:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def system(tmp_path_factory):
    outage_s = float(os.environ.get("KILN_CHAOS_OUTAGE_S", "3"))
    with System(tmp_path_factory.mktemp("chaos"), outage_s) as running:
        yield running


@pytest.fixture(autouse=True)
def whole_again(system):
    """Each test begins and ends with everything in place."""
    system.wait_until_whole()
    yield
    system.wait_until_whole()
