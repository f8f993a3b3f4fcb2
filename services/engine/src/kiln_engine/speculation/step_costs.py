"""What steps cost, by their rows and the drafts they verify: measured, never assumed."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Sequence

# Enough to be robust against a step that something else held up, few enough to follow the load.
_NUM_KEPT = 7
# Before so many say the same, one that something else held up would decide.
_LEAST_MEASURED = 2


class StepCosts:
    """Seconds of a step of so many rows with so many drafts each, as the median of the latest ones.

    Rows are counted in sizes (those of the captured graphs): a step costs what the next larger size does.
    """

    def __init__(self, row_sizes: Sequence[int], max_drafts: int) -> None:
        self._row_sizes = sorted(row_sizes)
        self.max_drafts = max_drafts
        self._kept: dict[tuple[int, int], deque[float]] = {}
        # Of those of which enough have been measured.
        self._medians: dict[tuple[int, int], float] = {}

    def observe(self, num_rows: int, num_drafts: int, seconds: float) -> bool:
        """Take in one step in which every row had its drafts verified and as many proposed; whether it counts.

        The first of its kind does not: it brings up what later ones find ready (a graph goes to the
        device when it is first replayed).
        """
        cell = self.cell(num_rows, num_drafts)
        kept = self._kept.get(cell)
        if kept is None:
            self._kept[cell] = deque(maxlen=_NUM_KEPT)
            return False
        kept.append(seconds)
        if len(kept) >= _LEAST_MEASURED:
            self._medians[cell] = statistics.median_low(kept)
        return True

    def cell(self, num_rows: int, num_drafts: int) -> tuple[int, int]:
        """What steps have in common whose times count as one: the size of their rows, and the drafts."""
        return self.size(num_rows), num_drafts

    def seconds(self, num_rows: int, most_drafts: int) -> list[float] | None:
        """Of a step without drafts, with one a row, up to `most_drafts`; None before plain ones are measured.

        What has not been measured at this size costs no more than the next longer draft that has; else
        the share of a plain step that it has at the nearest size; else nobody knows, and it is infinite.
        """
        size = self.size(num_rows)
        plain = self._medians.get((size, 0))
        if plain is None:
            return None
        seconds = [self._draft_seconds(size, plain, num_drafts) for num_drafts in range(1, most_drafts + 1)]
        return [plain, *seconds]

    def _draft_seconds(self, size: int, plain: float, num_drafts: int) -> float:
        for longer in range(num_drafts, self.max_drafts + 1):
            if (size, longer) in self._medians:
                return self._medians[size, longer]
        others = [s for s, n in self._medians if n == num_drafts and (s, 0) in self._medians]
        if not others:
            return math.inf
        nearest = min(others, key=lambda other: max(other, size) / min(other, size))
        return plain * self._medians[nearest, num_drafts] / self._medians[nearest, 0]

    def size(self, num_rows: int) -> int:
        """That of the rows of a step."""
        place = bisect.bisect_left(self._row_sizes, num_rows)
        return self._row_sizes[min(place, len(self._row_sizes) - 1)]
