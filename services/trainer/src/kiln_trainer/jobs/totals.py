"""What a trainer has done since it started, for the figures it reports."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from kiln_common.histogram import REQUEST_SECONDS, Histogram
from kiln_trainer.domain.training import StepReport


class TrainerTotals:
    """Written by the worker thread; read by any."""

    def __init__(self) -> None:
        self.num_jobs_ended: Counter[str] = Counter()
        self.num_trained_tokens = 0
        self.step_seconds = Histogram(REQUEST_SECONDS)
        self.swap_seconds = Histogram(REQUEST_SECONDS)
        # Of the last step; replaced as a whole, never changed.
        self.metrics: Mapping[str, float] = {}


class StepTotals:
    """Adds one attempt's steps to the totals. Its first step is not timed: the model is made ready in it."""

    def __init__(self, totals: TrainerTotals) -> None:
        self._totals = totals
        self._last: tuple[float, int] | None = None  # when the last step ended, its tokens

    def add(self, report: StepReport) -> None:
        now_s = time.monotonic()
        if self._last is not None:
            ended_s, num_tokens = self._last
            self._totals.step_seconds.observe(now_s - ended_s)
            self._totals.num_trained_tokens += report.num_tokens - num_tokens
        elif report.step == 1:  # a resumed job counted its earlier steps when it took them
            self._totals.num_trained_tokens += report.num_tokens
        self._last = now_s, report.num_tokens
        self._totals.metrics = dict(report.metrics)
