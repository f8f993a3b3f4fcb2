"""Which tokens each step computes, with which pages and state slots. Pure Python, no clock, no I/O."""

from kiln_engine.scheduling.invariants import check_invariants
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.scheduler import Scheduler
from kiln_engine.scheduling.stats import SchedulerStats

__all__ = ["Scheduler", "SchedulerLimits", "SchedulerStats", "check_invariants"]
