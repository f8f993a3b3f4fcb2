"""How many tokens to draft for each row of a step: as many as pay, by measured cost and acceptance.

A step of k drafts a row takes longer than a plain one and yields 1 + p1 + p1 p2 + ... tokens a row. The
length whose tokens per second are highest wins, if it beats plain decoding by a margin. So drafts
end where the batch is large enough to make a step dear, and where acceptance is low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kiln_engine.speculation.acceptance import AcceptanceRates
from kiln_engine.speculation.step_costs import StepCosts

# Less than this is not worth the risk of a wrong estimate.
_LEAST_GAIN = 0.02
# Of the time of plain steps, what may be spent to find out whether drafts would pay by now.
_LOOK_SHARE = 0.005
# Two steps of it, so that one has drafts before and behind it as when it goes on; and as many as it is
# waited for that somebody has drafts.
_LOOK_STEPS = 2
_MOST_LOOK_STEPS = 8
# Steps with drafts between two looks at another length: a longer one, a shorter one, and none, in turn.
_LOOK_INTERVAL = 64
_TURNS = (1, -1, 1, None)
# What a row's draft must be worth of its part of the step's time, most of which is spent in any case.
_LEAST_WORTH = 0.5


class DraftPolicy:
    """Chooses draft lengths for each plan by `choose`, and hears of each step's end by `observe`.

    What is not done is not measured: neither what it costs nor what is accepted. So now and then
    another length is looked at for two steps, by all rows. While drafts do not pay, the time
    for that is kept within a share of that of the plain steps between. There is no clock and no chance
    in it: the same calls give the same answers, and `choose` may be asked again before a step ends.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        # Of which a step with drafts has been run: the first one brings up what later ones find ready (a
        # graph goes to the device when it is first replayed), and would be the only one for long.
        self._warm: set[tuple[int, int]] = set()
        # Seconds that looks at drafts may take.
        self._allowance_s = 0.0
        self._num_drafting_steps = 0
        self._num_looks = 0
        # The length that is looked at, and the steps left: of that length, and in all.
        self._looked_at: int | None = None
        self._num_left = self._num_most_left = 0

    def choose(self, estimates: Sequence[AcceptanceRates | None]) -> list[int]:
        """Draft lengths of the rows of a step; None stands for a row that cannot have drafts now."""
        seconds = self._costs.seconds(len(estimates)) if estimates else None
        if seconds is None or not any(estimates):
            return [0] * len(estimates)
        chances = [None if rates is None else rates.chances() for rates in estimates]
        if self._looked_at is not None:
            return _same_for_all(chances, self._looked_at)
        tokens = _tokens_by_length(chances, len(seconds) - 1)
        speeds = [count / second for count, second in zip(tokens, seconds, strict=True)]
        best = max(range(1, len(speeds)), key=speeds.__getitem__)
        if speeds[best] >= (1 + _LEAST_GAIN) * speeds[0]:
            if self._num_drafting_steps >= _LOOK_INTERVAL:
                return _same_for_all(chances, self._look_beside(best))
            return [0 if row is None else _row_length(row, best, seconds, tokens) for row in chances]
        # No worse than drawing as many tokens one by one, whatever a disturbed measurement says.
        price = _LOOK_STEPS * min(seconds[best] - seconds[0], best * seconds[0])
        if self._allowance_s < max(price, _LOOK_SHARE * seconds[0]):
            return [0] * len(estimates)
        self._allowance_s = 0.0
        return _same_for_all(chances, self._look_at(best))

    def observe(self, num_rows: int, num_verified: int, num_drafted: int, seconds: float) -> None:
        """Take in a step of nothing but decode rows that verified and then drafted so many tokens a row.

        Its time counts where the two agree (of n-gram drafts, which take the device no time, they do).
        """
        if num_verified == num_drafted and num_rows:
            cell = self._costs.cell(num_rows, num_verified)
            if not num_verified or cell in self._warm:
                self._costs.observe(num_rows, num_verified, seconds)
            self._warm.add(cell)
        if num_drafted:
            self._num_drafting_steps += 1
        elif not num_verified:
            self._allowance_s += _LOOK_SHARE * seconds
        if self._looked_at is not None:
            self._num_most_left -= 1
            self._num_left -= bool(num_drafted) == bool(self._looked_at)
            if min(self._num_left, self._num_most_left) <= 0:
                self._looked_at = None

    def _look_beside(self, best: int) -> int:
        """Look at the length whose turn it is."""
        step = _TURNS[self._num_looks % len(_TURNS)]
        self._num_looks += 1
        self._num_drafting_steps = 0
        return self._look_at(0 if step is None else min(max(best + step, 0), self._costs.max_drafts))

    def _look_at(self, length: int) -> int:
        self._looked_at = length
        self._num_left, self._num_most_left = _LOOK_STEPS, _MOST_LOOK_STEPS
        return length


_Chances = Sequence[list[float] | None]


def _same_for_all(chances: _Chances, length: int) -> list[int]:
    return [0 if row is None else length for row in chances]


def _tokens_by_length(chances: _Chances, max_drafts: int) -> list[float]:
    """Expected tokens of the whole step for 0, 1, ... drafts a row."""
    tokens = [float(len(chances))]
    for place in range(max_drafts):
        tokens.append(tokens[-1] + math.fsum(row[place] for row in chances if row is not None))
    return tokens


def _row_length(
    chances: Sequence[float], most: int, seconds: Sequence[float], tokens: Sequence[float]
) -> int:
    """How many of the drafts are worth their part of the step's time to this row."""
    draft_s = (seconds[most] - seconds[0]) / (most * tokens[0])
    token_s = seconds[most] / tokens[most]
    return sum(chance * token_s >= _LEAST_WORTH * draft_s for chance in chances[:most])
