"""How much of a GPU training takes while an engine serves on it: numbers only.

A share is a fraction: of the GPU's multiprocessors where engine and trainer run at once, of its time
where they take turns.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum

# With more running sequences than this, the engine counts as heavily loaded.
_MANY_RUNNING = 32
# A split has to be a multiple of this on Hopper, and may be on every other kind.
_SM_GRANULE = 8
# What a request that arrives while the engine is idle finds free at least.
_SMS_LEFT = 16


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """Requests that an engine is working on, and that wait for it."""

    num_running: int
    num_waiting: int


class Pressure(IntEnum):
    """How much the engine needs the GPU."""

    IDLE = 0
    LIGHT = 1
    HEAVY = 2

    @classmethod
    def of(cls, load: EngineLoad) -> Pressure:
        if load.num_waiting or load.num_running > _MANY_RUNNING:
            return cls.HEAVY
        return cls.LIGHT if load.num_running else cls.IDLE


@dataclass(frozen=True, slots=True)
class Shares:
    """The trainer's share at each pressure, each above 0 and at most 1."""

    idle: float = 1.0
    light: float = 0.5
    heavy: float = 0.25

    def at(self, pressure: Pressure) -> float:
        return (self.idle, self.light, self.heavy)[pressure]


class PressureGauge:
    """The highest pressure seen in the last `calm_s` seconds: up at once, down when it has stayed away.

    An engine that does not answer counts as lightly loaded until it has answered once, and as it was
    last afterwards.
    """

    def __init__(self, calm_s: float = 1.0) -> None:
        self._calm_s = calm_s
        self._last = Pressure.LIGHT
        self._seen: deque[tuple[float, Pressure]] = deque()

    def see(self, load: EngineLoad | None, now_s: float) -> Pressure:
        """Take in a load as of `now_s` (None: not known), and tell the pressure to act on."""
        if load is not None:
            self._last = Pressure.of(load)
        self._seen.append((now_s, self._last))
        while self._seen[0][0] < now_s - self._calm_s:
            self._seen.popleft()
        return max(pressure for _, pressure in self._seen)


def sm_count(share: float, num_sms: int) -> int:
    """Multiprocessors of a partition with about that share, some of them always left to the engine."""
    most = max(_SM_GRANULE, (num_sms - _SMS_LEFT) // _SM_GRANULE * _SM_GRANULE)
    wanted = round(share * num_sms / _SM_GRANULE) * _SM_GRANULE
    return min(most, max(_SM_GRANULE, wanted))


def pause_s(busy_s: float, share: float) -> float:
    """Seconds to leave the GPU alone after `busy_s` of work, so that work is that share of the whole."""
    return busy_s * (1.0 - share) / share
