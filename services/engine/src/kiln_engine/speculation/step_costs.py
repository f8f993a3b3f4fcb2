"""What steps cost, by their rows and the drafts they verify: measured, never assumed for long."""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Sequence

# Enough to be robust against a step that something else held up, few enough to follow the load.
_NUM_KEPT = 7
# A draft's share of a plain step where nothing like it has been measured: low, so that it will be.
_GUESSED_SHARE = 0.1


class StepCosts:
    """Seconds of a step of so many rows with so many drafts each, as the median of the latest ones.

    Rows are counted in sizes (those of the captured graphs): a step costs what the next larger size does.
    """

    def __init__(self, row_sizes: Sequence[int], max_drafts: int) -> None:
        self._row_sizes = sorted(row_sizes)
        self.max_drafts = max_drafts
        self._measured: dict[tuple[int, int], deque[float]] = {}
        self._medians: dict[tuple[int, int], float] = {}

    def observe(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        """Take in one step in which every row had its drafts verified and as many proposed."""
        cell = self.cell(num_rows, num_drafts)
        kept = self._measured.setdefault(cell, deque(maxlen=_NUM_KEPT))
        kept.append(seconds)
        self._medians[cell] = statistics.median_low(kept)

    def cell(self, num_rows: int, num_drafts: int) -> tuple[int, int]:
        """What steps have in common whose times count as one: the size of their rows, and the drafts."""
        return self._size(num_rows), num_drafts

    def seconds(self, num_rows: int) -> list[float] | None:
        """Of a step without drafts, with one a row, and so on; None before a plain one has been measured.

        Ends with the first that has not been measured at this size, so that lengths are tried one
        after the other. The first draft is guessed from the nearest size, the second to cost little: what
        the first brings with it, a wait for the host above all, says nothing about the next. A further
        one adds what the last one added.
        """
        size = self._size(num_rows)
        plain = self._medians.get((size, 0))
        if plain is None:
            return None
        seconds = [plain]
        for num_drafts in range(1, self.max_drafts + 1):
            known = self._medians.get((size, num_drafts))
            if known is None:
                return [*seconds, self._guess(size, seconds)]
            seconds.append(known)
        return seconds

    def _guess(self, size: int, seconds: list[float]) -> float:
        """Of a step with one draft more than the longest measured."""
        plain, longest = seconds[0], seconds[-1]
        if len(seconds) == 1:
            return plain * self._first_share(size)
        if len(seconds) == 2:
            return longest + min(longest - plain, plain * _GUESSED_SHARE)
        return longest + max(0.0, longest - seconds[-2])

    def _size(self, num_rows: int) -> int:
        place = bisect.bisect_left(self._row_sizes, num_rows)
        return self._row_sizes[min(place, len(self._row_sizes) - 1)]

    def _first_share(self, size: int) -> float:
        """A step with one draft a row, of a plain one, at the nearest size at which both were measured."""
        known = [s for s, n in self._medians if n == 1 and (s, 0) in self._medians]
        if not known:
            return 1 + _GUESSED_SHARE
        nearest = min(known, key=lambda other: max(other, size) / min(other, size))
        return self._medians[nearest, 1] / self._medians[nearest, 0]
