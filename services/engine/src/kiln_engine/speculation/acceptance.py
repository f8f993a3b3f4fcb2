"""How often drafts are accepted: estimates that decide, and totals that are shown.

A draft at one place is looked at only if those before it were accepted, so the estimates are
conditional: entry j is the chance of the (j+1)-th draft given the j before it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

# What is taken for granted of adapters that have drafted nothing yet: enough to give it a try.
_FIRST_GUESS = 0.6
# How many observations what was known before counts as.
_PRIOR_WEIGHT = 8
# Later observations count this much at least, so that the estimates follow the text...
_SEQUENCE_RATE = 0.03
# ...and those of an adapter follow its versions.
_ADAPTER_RATE = 0.01
# Adapters whose totals are kept; the one longest unused gives way.
_MOST_ADAPTERS = 256


class AcceptanceRates:
    """Estimated chances by place, each an exponential average of what was observed there."""

    def __init__(self, prior: Sequence[float], least_rate: float = _SEQUENCE_RATE) -> None:
        self._rates = list(prior)
        self._num_observed = [0] * len(prior)
        self._least_rate = least_rate
        # None: not asked for since the last observation.
        self._chances: tuple[float, ...] | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(self._rates)

    @property
    def chances(self) -> tuple[float, ...]:
        """For each place the chance that it is accepted, whatever happens to those before it."""
        if self._chances is None:
            self._chances = tuple(itertools.accumulate(self._rates, operator.mul))
        return self._chances

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Take in one verification: the first `num_accepted` of `num_proposed` drafts were accepted."""
        # The device waits for this: each row of each step comes here twice.
        rates, num_observed, least_rate = self._rates, self._num_observed, self._least_rate
        for place in range(min(num_proposed, num_accepted + 1, len(rates))):
            num_observed[place] = count = num_observed[place] + 1
            rate = max(least_rate, 1 / (count + _PRIOR_WEIGHT))
            rates[place] += rate * ((place < num_accepted) - rates[place])
        self._chances = None


@dataclass(frozen=True, slots=True)
class DraftTotals:
    """Drafts of one adapter since the start; "" is the base model."""

    adapter: str
    num_proposed: int
    num_accepted: int


class _AdapterRecord:
    def __init__(self, max_drafts: int) -> None:
        self.rates = AcceptanceRates([_FIRST_GUESS] * max_drafts, _ADAPTER_RATE)
        self.num_proposed = 0
        self.num_accepted = 0


class SequenceAcceptance:
    """One sequence's estimates, which begin as its adapter's, and the adapter's record they add to."""

    def __init__(self, record: _AdapterRecord) -> None:
        self.estimate = AcceptanceRates(record.rates.rates)
        self._record = record

    def observe(self, num_proposed: int, num_accepted: int) -> None:
        """Take in one verification of the sequence's drafts."""
        assert 0 <= num_accepted <= num_proposed
        self.estimate.observe(num_proposed, num_accepted)
        self._record.rates.observe(num_proposed, num_accepted)
        self._record.num_proposed += num_proposed
        self._record.num_accepted += num_accepted


class AcceptanceBook:
    """The records of all adapters by name, which a new version inherits. One thread changes it."""

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        self._records: dict[str, _AdapterRecord] = {}

    def begin(self, adapter: str) -> SequenceAcceptance:
        """Start a sequence's estimates from what is known of its adapter."""
        record = self._records.pop(adapter, None) or _AdapterRecord(self._max_drafts)
        self._records[adapter] = record
        if len(self._records) > _MOST_ADAPTERS:
            del self._records[next(iter(self._records))]
        return SequenceAcceptance(record)

    def totals(self) -> tuple[DraftTotals, ...]:
        """Of every adapter that has drafted, by name; other threads may ask too."""
        return tuple(
            DraftTotals(adapter, record.num_proposed, record.num_accepted)
            for adapter, record in sorted(self._records.copy().items())
            if record.num_proposed
        )
