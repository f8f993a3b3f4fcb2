"""A decode loop of made-up costs and made-up acceptance, to see what a draft policy makes of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kiln_engine.speculation.acceptance import AcceptanceBook, SequenceAcceptance
from kiln_engine.speculation.policy import DraftPolicy
from kiln_engine.speculation.step_costs import StepCosts

ROW_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
MAX_DRAFTS = 4


@dataclass
class DraftingRows:
    """So many rows whose drafts are accepted by chance, at each place alike; `acceptance` may be changed."""

    policy: DraftPolicy
    acceptance: list[float]
    # Seconds of a step that verifies and drafts (at most) so many tokens a row.
    step_seconds: Callable[[int, int], float]
    seed: int = 0
    # Deviation of what is measured, and how often a step takes ten times as long.
    noise: float = 0.0
    outliers: float = 0.0
    # How many times as long the first step takes that verifies and drafts as many tokens.
    first: float = 1.0
    seconds: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    # How many steps had so many drafts a row at most.
    steps_by_length: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))
    tokens_by_row: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        book = AcceptanceBook(MAX_DRAFTS)
        self.rows: list[SequenceAcceptance] = [book.begin("") for _ in self.acceptance]
        self.lengths = [0] * len(self.rows)
        self.tokens_by_row = [0] * len(self.rows)
        self._rng = random.Random(self.seed)
        self._seen: set[tuple[int, int]] = set()

    def run(self, num_steps: int) -> DraftingRows:
        """Step by step: of what was drafted as much is verified as is chosen now, and as much is drafted."""
        for _ in range(num_steps):
            self._step()
        return self

    def speed(self, num_steps: int) -> float:
        """Tokens per second over the next steps, relative to plain decoding."""
        tokens, seconds = self.num_tokens, self.seconds
        self.run(num_steps)
        plain = len(self.rows) / self.step_seconds(0, 0)
        return (self.num_tokens - tokens) / (self.seconds - seconds) / plain

    def _step(self) -> None:
        estimates = [row.estimate for row in self.rows]
        chosen = self.policy.choose(estimates)
        assert self.policy.choose(estimates) == chosen, "asking changes nothing"
        verifying = [min(pair) for pair in zip(self.lengths, chosen, strict=True)]
        verified, drafted = max(verifying), max(chosen)
        seconds = self.step_seconds(verified, drafted)
        measured = seconds * (1 + self.noise * self._rng.gauss(0, 1))
        if self._rng.random() < self.outliers:
            measured *= 10
        if (verified, drafted) not in self._seen:
            self._seen.add((verified, drafted))
            measured *= self.first
        self.policy.observe(len(self.rows), verified, drafted, measured)
        for index, (row, length) in enumerate(zip(self.rows, verifying, strict=True)):
            num_accepted = 0
            while num_accepted < length and self._rng.random() < self.acceptance[index]:
                num_accepted += 1
            if length:
                row.observe(length, num_accepted)
                self.policy.gain(num_accepted)
            self.num_tokens += 1 + num_accepted
            self.tokens_by_row[index] += 1 + num_accepted
        self.steps_by_length[drafted] += 1
        self.seconds += seconds
        self.num_steps += 1
        self.lengths = chosen


def linear_cost(plain: float, per_verified: float, per_drafted: float) -> Callable[[int, int], float]:
    """A step's seconds: a plain one's, and shares of it for each verified and each drafted token a row."""
    return lambda verified, drafted: plain * (1 + per_verified * verified + per_drafted * drafted)


def new_policy() -> DraftPolicy:
    return DraftPolicy(StepCosts(ROW_SIZES, MAX_DRAFTS))
