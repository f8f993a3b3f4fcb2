"""How many tokens to draft for each row of a step: as many as pay, by measured cost and acceptance.

A step of k drafts a row takes longer than a plain one and yields 1 + p1 + p1 p2 + ... tokens a row. The
length whose tokens per second are highest wins, if it beats plain decoding by a margin. So drafts
end where the batch is large enough to make a step dear, and where acceptance is low.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kiln_engine.speculation.acceptance import AcceptanceRates
from kiln_engine.speculation.step_costs import StepCosts

# What drafts must gain before they begin: less is not worth the risk of a wrong estimate.
_LEAST_GAIN = 0.02
# Of the time, what may be lost by looking at other lengths.
_LOOK_SHARE = 0.003
# Steps of one size between two looks, however little they lose: the first number behind a change, later
# doubled by each look behind which the choice stays as it is, up to the second.
_LOOK_INTERVAL = 64
_MOST_LOOK_INTERVAL = 512
# Looks at the shorter interval behind a change: it takes so many to outvote what was measured before it.
_NUM_FREQUENT_LOOKS = 4
# By how much the speed of the best must change for looks to be as frequent again as at first.
_CHANGED_SPEED = 0.2
# A look ends when it has measured so many steps of its length, or after so many in all.
_LOOK_MEASURES = 2
_MOST_LOOK_STEPS = 8
# Steps behind a look in which drafts come under way again.
_RETURN_STEPS = 2
# Of one step of a look, what may count as lost, in plain steps: it may have been held up by something else.
_MOST_LOST_STEPS = 4
# What a row's draft must be worth of its part of the step's time, nearly all of which is spent in any case.
_LEAST_WORTH = 0.1


@dataclass(slots=True)
class _Looks:
    """When to look at other lengths of one size again."""

    num_looks: int = 0
    interval: int = _LOOK_INTERVAL
    num_since_change: int = 0
    num_steps_since: int = 0
    # As they were at the last change: whether drafts paid, and the best speed of a row.
    was_drafting: bool = False
    best_speed: float = math.inf

    def follow(self, *, is_drafting: bool, best_speed: float) -> None:
        """Be frequent again where something has changed."""
        is_same = is_drafting == self.was_drafting
        if not is_same or abs(best_speed / self.best_speed - 1) > _CHANGED_SPEED:
            self.interval, self.num_since_change = _LOOK_INTERVAL, 0
            self.was_drafting, self.best_speed = is_drafting, best_speed

    def begin(self, *, is_free: bool) -> None:
        """A look begins; if it changes nothing, the next one comes later, unless it was one of the first."""
        self.num_looks += 1
        self.num_steps_since = 0
        if is_free:
            return
        self.num_since_change += 1
        if self.num_since_change >= _NUM_FREQUENT_LOOKS:
            self.interval = min(2 * self.interval, _MOST_LOOK_INTERVAL)


class DraftPolicy:
    """Chooses draft lengths for each plan by `choose`, and hears of each step's end by `observe`.

    What is not done is not measured: neither what it costs nor what is accepted. So now and then
    another length is looked at for a few steps, by all rows. What that loses against the best that is
    known is added up, and the next look waits until it will be no more than a share of the time between,
    though not for ever; and the longer, the more often looks at this number of rows have left the choice as
    it was. There is no clock and no chance in it: the same calls give the same answers, and `choose` may be
    asked again before a step ends.
    """

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        # Seconds that looks may lose; negative where they have lost more than was saved for them.
        self._allowance_s = 0.0
        self._looks: dict[int, _Looks] = {}
        # Steps of any size since the last look.
        self._num_steps_since = 0
        # The length that is looked at; the measurements and the steps left of the look.
        self._looked_at: int | None = None
        self._num_left = self._num_most_left = 0
        # Sizes and lengths that are not new any more; the first look at one is free, as this one may be.
        self._seen: set[tuple[int, int]] = set()
        self._is_free = False
        # Whether the last step was plain and nothing else; whether the last one that was no look drafted.
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
        size = self._costs.size(len(estimates))
        looks = self._looks.setdefault(size, _Looks())
        looks.follow(is_drafting=bool(best), best_speed=self._best_speed / len(estimates))
        look = self._next_look(looks, size, most, best, longest)
        # The first looks behind a change may be owed, as little is known; later ones are saved for, though not
        # for ever: what is known of the acceptance is as old as the last look.
        loss_s = 0.0
        if look is not None and looks.interval > _LOOK_INTERVAL:
            loss_s = self._look_loss_s(seconds[look], tokens[look], len(estimates))
        is_due = self._is_free or looks.num_steps_since >= _MOST_LOOK_INTERVAL
        if look is not None and (is_due or loss_s <= self._allowance_s):
            self._look_at(look, loss_s)
            looks.begin(is_free=self._is_free)
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
        self._was_plain = is_plain
        if self._looked_at is None:
            self._was_drafting = bool(num_drafted)
        self._count(num_rows, seconds, is_looked_at=is_measured and num_drafted == self._looked_at)

    def gain(self, num_accepted: int) -> None:
        """Take in how many drafts of one row were accepted in the step that was observed last."""
        if self._is_charged:
            self._allowance_s += num_accepted / self._best_speed

    def pass_over(self, num_rows: int = 0, seconds: float = 0.0) -> None:
        """Take in a step whose time tells nothing of its length.

        With its rows and time, it is one of those that a look leaves to be done, and part of what it loses.
        """
        self._was_plain = self._is_charged = False
        if num_rows:
            self._count(num_rows, seconds, is_looked_at=False)
        elif self._looked_at is not None:
            self._count_down(is_looked_at=False)

    def _next_look(self, looks: _Looks, size: int, most: int, best: int, longest: int) -> int | None:
        """The length to look at now, if there is time for it; of what is new at this size the ends at once."""
        for length in (most, 1):
            cell = size, length
            if not best and cell not in self._seen:
                self._seen.add(cell)
                self._is_free = True
                return length
        if self._num_steps_since <= _RETURN_STEPS or looks.num_steps_since < looks.interval:
            return None
        if not best:
            # Graphs have lines for one draft or for as many as there may be: what lies between costs no less.
            others = [longest, most if longest == 1 else 1]
        else:
            others = [0, *(length for length in (best - 1, best + 1) if 0 < length <= most)]
        return others[looks.num_looks % len(others)]

    def _look_loss_s(self, step_s: float, tokens: float, num_rows: int) -> float:
        """What a look will lose at least; nothing is known of what was never measured.

        Before the steps that are measured comes one of the same kind that yields a token a row.
        """
        if math.isinf(step_s):
            return 0.0
        worth_s = (num_rows + _LOOK_MEASURES * tokens) / self._best_speed
        return max(0.0, (1 + _LOOK_MEASURES) * step_s - worth_s)

    def _look_at(self, length: int, loss_s: float) -> None:
        # What will not be used up is not saved: looks would come in a row.
        self._allowance_s = min(self._allowance_s, loss_s)
        self._looked_at = length
        self._num_left, self._num_most_left = _LOOK_MEASURES, _MOST_LOOK_STEPS

    def _count(self, num_rows: int, seconds: float, *, is_looked_at: bool) -> None:
        """Pay for the look that is under way or has just ended, or save for the next one."""
        is_looking = self._looked_at is not None
        if is_looking:
            self._count_down(is_looked_at=is_looked_at)
        else:
            self._num_steps_since += 1
            looks = self._looks.get(self._costs.size(num_rows))
            if looks is not None:
                looks.num_steps_since += 1
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
