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

# What drafts must gain before they begin: less is not worth the risk of a wrong estimate.
_LEAST_GAIN = 0.02
# Of the time, what may be lost by looking at other lengths.
_LOOK_SHARE = 0.005
# Steps between two looks, however little they lose.
_LOOK_INTERVAL = 64
# A look ends when it has measured so many steps of its length, or after so many in all.
_LOOK_MEASURES = 2
_MOST_LOOK_STEPS = 8
# Steps behind a look in which drafts come under way again.
_RETURN_STEPS = 2
# Of one step of a look, what may count as lost, in plain steps: it may have been held up by something else.
_MOST_LOST_STEPS = 4
# What a row's draft must be worth of its part of the step's time, nearly all of which is spent in any case.
_LEAST_WORTH = 0.1


class DraftPolicy:
    """Chooses draft lengths for each plan by `choose`, and hears of each step's end by `observe`.

    What is not done is not measured: neither what it costs nor what is accepted. So now and then
    another length is looked at for a few steps, by all rows. What that loses against the best that is
    known is added up, and the next look waits until it is no more than a share of the time between. There
    is no clock and no chance in it: the same calls give the same answers, and `choose` may be asked
    again before a step ends.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        # Seconds that looks may lose; negative while the last ones are being paid for.
        self._allowance_s = 0.0
        self._num_looks = 0
        self._num_steps_since = 0
        # The length that is looked at; the measurements and the steps left of the look.
        self._looked_at: int | None = None
        self._num_left = self._num_most_left = 0
        # Sizes and lengths that are not new any more; the first look at one is free, as this one may be.
        self._seen: set[tuple[int, int]] = set()
        self._is_free = False
        # Of the last step: whether it was plain and nothing else, and whether it drafted.
        self._was_plain = self._was_drafting = False
        # Tokens a second of the best that was known at the last choice, and whether the last step is charged.
        self._best_speed = math.inf
        self._is_charged = False

    def choose(
        self, estimates: Sequence[AcceptanceRates | None], most_drafts: int | None = None
    ) -> list[int]:
        """Draft lengths of the rows of a step, at most `most_drafts` (None: as long as there may be).

        None among the estimates stands for a row that cannot have drafts now.
        """
        most = self._costs.max_drafts if most_drafts is None else most_drafts
        plainly = [0] * len(estimates)
        if not most or not any(estimates):
            return plainly
        seconds = self._costs.seconds(len(estimates), most)
        if seconds is None:
            return plainly
        if self._looked_at is not None:
            return _same_for_all(estimates, min(self._looked_at, most))
        tokens = _tokens_by_length(estimates, most)
        speeds = [count / second for count, second in zip(tokens, seconds, strict=True)]
        longest = max(range(1, most + 1), key=speeds.__getitem__)
        least_gain = 0.0 if self._was_drafting else _LEAST_GAIN
        best = longest if speeds[longest] > (1 + least_gain) * speeds[0] else 0
        self._best_speed = max(speeds)
        look = self._next_look(len(estimates), most, best, longest)
        if look is not None:
            self._look_at(look)
            return _same_for_all(estimates, look)
        if not best:
            return plainly
        return [0 if row is None else _row_length(row, best, seconds, tokens) for row in estimates]

    def observe(self, num_rows: int, num_verified: int, num_drafted: int, seconds: float) -> None:
        """Take in a step of nothing but decode rows that verified and then drafted so many tokens a row.

        Its time counts where the two agree (of n-gram drafts, which take the device no time, they do),
        and for plain steps behind a plain one: only those are launched ahead.
        """
        is_plain = not num_verified and not num_drafted
        is_steady = self._was_plain if is_plain else num_verified == num_drafted
        is_measured = is_steady and self._costs.observe(num_rows, num_verified, seconds)
        if is_measured:
            self._seen.add(self._costs.cell(num_rows, num_verified))
        self._count(num_rows, seconds, is_looked_at=is_measured and num_drafted == self._looked_at)
        self._was_plain, self._was_drafting = is_plain, bool(num_drafted)

    def gain(self, num_accepted: int) -> None:
        """Take in how many drafts of one row were accepted in the step that was observed last."""
        if self._is_charged:
            self._allowance_s += num_accepted / self._best_speed

    def pass_over(self) -> None:
        """Take in a step that did something else besides, so that its time tells nothing."""
        self._was_plain = self._is_charged = False
        if self._looked_at is not None:
            self._count_down(is_looked_at=False)

    def _next_look(self, num_rows: int, most: int, best: int, longest: int) -> int | None:
        """The length to look at now, if there is time for it; of what is new at this size the ends at once."""
        for length in (most, 1):
            cell = self._costs.cell(num_rows, length)
            if not best and cell not in self._seen:
                self._seen.add(cell)
                self._is_free = True
                return length
        if self._allowance_s < 0 or self._num_steps_since < _LOOK_INTERVAL:
            return None
        if not best:
            others = [longest, 1 + self._num_looks // 2 % most]
        else:
            others = [0, *(length for length in (best - 1, best + 1) if 0 < length <= most)]
        return others[self._num_looks % len(others)]

    def _look_at(self, length: int) -> None:
        # What was not used up is not saved: looks would come in a row.
        self._allowance_s = min(self._allowance_s, 0.0)
        self._num_looks += 1
        self._looked_at = length
        self._num_left, self._num_most_left = _LOOK_MEASURES, _MOST_LOOK_STEPS

    def _count(self, num_rows: int, seconds: float, *, is_looked_at: bool) -> None:
        """Pay for the look that is under way or has just ended, or save for the next one."""
        is_looking = self._looked_at is not None
        if is_looking:
            self._count_down(is_looked_at=is_looked_at)
        else:
            self._num_steps_since += 1
            self._is_free &= self._num_steps_since <= _RETURN_STEPS
        self._allowance_s += _LOOK_SHARE * seconds
        self._is_charged = not self._is_free and (is_looking or self._num_steps_since <= _RETURN_STEPS)
        if self._is_charged:
            # Of the tokens that a step yields one a row is certain; `gain` takes in the others.
            certain_s = num_rows / self._best_speed
            self._allowance_s -= min(seconds, _MOST_LOST_STEPS * certain_s) - certain_s

    def _count_down(self, *, is_looked_at: bool) -> None:
        self._num_left -= is_looked_at
        self._num_most_left -= 1
        if min(self._num_left, self._num_most_left) <= 0:
            self._looked_at = None
            self._num_steps_since = 0


_Estimates = Sequence[AcceptanceRates | None]


def _same_for_all(estimates: _Estimates, length: int) -> list[int]:
    return [0 if row is None else length for row in estimates]


def _tokens_by_length(estimates: _Estimates, most_drafts: int) -> list[float]:
    """Expected tokens of the whole step for 0, 1, ... drafts a row."""
    tokens = [float(len(estimates))]
    places = zip(*(row.chances for row in estimates if row is not None), strict=True)
    for _, chances in zip(range(most_drafts), places, strict=False):
        tokens.append(tokens[-1] + sum(chances))
    return tokens


def _row_length(row: AcceptanceRates, most: int, seconds: Sequence[float], tokens: Sequence[float]) -> int:
    """How many of the drafts are worth their part of the step's time to this row."""
    draft_s = (seconds[most] - seconds[0]) / (most * tokens[0])
    token_s = seconds[most] / tokens[most]
    return sum(chance * token_s >= _LEAST_WORTH * draft_s for chance in row.chances[:most])
