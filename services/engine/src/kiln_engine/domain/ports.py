"""What the loop needs from outside: the only places where a test may put a fake."""

from __future__ import annotations

from typing import Protocol

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.domain.result import StepResult


class Runner(Protocol):
    """Carries out plans on the device and decides nothing."""

    def execute(self, plan: BatchPlan) -> StepResult:
        """Run one step. Called from the loop thread only."""
        ...


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...
