"""Every scheduler and loop test that asks for these runs one step at a time, and one step ahead."""

from collections.abc import Callable
from functools import partial

import pytest

from tests.support.engine_scheduling import SchedulerRig


@pytest.fixture(params=[0, 1], ids=["in_turn", "run_ahead"])
def run_ahead(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def make_rig(run_ahead: int) -> Callable[..., SchedulerRig]:
    return partial(SchedulerRig, run_ahead=run_ahead)
