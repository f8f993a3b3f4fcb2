"""What a backend calls at each step boundary of a claimed job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

from kiln_common import tracing
from kiln_trainer.domain.training import StepReport, TrainedAdapter
from kiln_trainer.jobs.claimed_job import ClaimedJob
from kiln_trainer.jobs.totals import StepTotals, TrainerTotals


class JobHooks:
    """StepHooks that report to Redis. While it is away, steps go on and checkpoints wait.

    A checkpoint waits because only Redis can say that no later claim exists; so does a version.
    """

    def __init__(
        self,
        job: ClaimedJob,
        publish: Callable[[TrainedAdapter], None],
        totals: TrainerTotals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._job = job
        self._clock = clock
        self.publish = publish
        self._totals = StepTotals(totals)
        self._began_s = self._last_step_s = clock()
        self._traceparent = tracing.current_traceparent()
        self._step_began_s = time.time()
        self._first_step: int | None = None
        self.num_steps_reported = 0

    def after_step(self, report: StepReport) -> None:
        if self._first_step is None:
            self._first_step = report.step
        self.num_steps_reported += 1
        self._totals.add(report)
        self._trace(report)
        now_s = self._clock()
        metrics = dict(report.metrics)
        if "tokens" in metrics:
            metrics["tokens_per_s"] = metrics["tokens"] / max(now_s - self._last_step_s, 1e-9)
        self._last_step_s = now_s
        progress = {
            "step": report.step,
            "num_steps": report.num_steps,
            "num_tokens": report.num_tokens,
            "eta_s": self._eta_s(report, now_s - self._began_s),
        }
        self._job.write(
            {"progress": json.dumps(progress), "metrics": json.dumps(metrics)},
            ("step", {**progress, "metrics": metrics}),
        )

    def _trace(self, report: StepReport) -> None:
        began_s, self._step_began_s = self._step_began_s, time.time()
        attributes = {"kiln.step": report.step, "kiln.num_tokens": report.num_tokens}
        tracing.record_span(
            "job.step", began_s, self._step_began_s, parent=self._traceparent, attributes=attributes
        )

    def before_checkpoint(self, step: int) -> None:
        self._job.sync()

    def after_checkpoint(self, step: int) -> None:
        # Progress that survives: earlier crashes no longer count against the job.
        self._job.write({"num_crashes": "0"}, ("checkpoint", {"step": step}))

    def _eta_s(self, report: StepReport, elapsed_s: float) -> float:
        """Seconds left at the pace of this claim."""
        return round(elapsed_s / self.num_steps_reported * (report.num_steps - report.step), 3)
