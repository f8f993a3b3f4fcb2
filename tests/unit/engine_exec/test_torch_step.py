"""When a launched step counts as over."""

import pytest
import torch

from kiln_engine.execution.runner import TorchStep

CUDA = torch.device("cuda")


class FakeEvent:
    recorded = synchronized = 0

    def __init__(self, blocking: bool) -> None:
        assert blocking

    def record(self) -> None:
        FakeEvent.recorded += 1

    def synchronize(self) -> None:
        FakeEvent.synchronized += 1


class Drawn:
    def wait(self) -> list:
        return []


@pytest.fixture(autouse=True)
def _events(monkeypatch):
    FakeEvent.recorded = FakeEvent.synchronized = 0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)


def test_a_step_that_draws_nothing_is_over_when_the_device_is():
    # Its prompt's adapter may be evicted, and its memory given away, as soon as it has been waited for.
    step = TorchStep(3)
    step.mark_end(CUDA)
    assert step.wait().rows == ()
    assert (FakeEvent.recorded, FakeEvent.synchronized) == (1, 1)


def test_results_wait_for_the_device_by_themselves():
    step = TorchStep(3)
    step.add([], Drawn)
    step.mark_end(CUDA)
    assert FakeEvent.recorded == 0


def test_a_cpu_is_done_at_launch():
    step = TorchStep(3)
    step.mark_end(torch.device("cpu"))
    step.wait()
    assert FakeEvent.recorded == 0
