"""A job's gate: its result is evaluated before the name it was trained for may mean it."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import structlog

from kiln_common.errors import KilnError
from kiln_common.pb import evaluations_pb2, registry_pb2, trainer_pb2
from kiln_trainer.domain.errors import ClaimLost, JobCancelled
from kiln_trainer.domain.training import AdapterContent
from kiln_trainer.jobs.claimed_job import ClaimedJob
from kiln_trainer.jobs.errors import WorkerStopping
from kiln_trainer.jobs.ports import Publisher
from kiln_trainer.jobs.published import VERSION_DELETED

log = structlog.get_logger()
T = TypeVar("T")
_LOOK_EVERY_S = 0.5


class WaitFor(Protocol):
    """Calls until a service that is away answers."""

    def __call__(self, call: Callable[[], T]) -> T: ...


class Gate:
    """Belongs to the worker thread and to one claim.

    The candidate is a version of the adapter named like the job, so that no request comes to it by
    another name. Gateways evaluate it; a run that an earlier claim began on the same bytes is the same
    run. What does not pass stays under that name, with its reason in the job's result.
    """

    def __init__(
        self,
        job: ClaimedJob,
        publisher: Publisher,
        wait_for: WaitFor,
        gate: trainer_pb2.Gate,
        stopping: threading.Event,
    ) -> None:
        self._job = job
        self._publisher = publisher
        self._wait_for = wait_for
        self._gate = gate
        self._stopping = stopping

    def judge(
        self, header: registry_pb2.PublishHeader, content: AdapterContent
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """The outcome; and where it is not passed, the version that is kept.

        Raises:
            ClaimLost, JobCancelled, WorkerStopping: after a cancel nothing is kept.
        """
        # Only the last claim may put a version into the registry.
        self._job.sync()
        # A later claim may train other bytes, on a GPU: what was evaluated is what is published.
        key = f"gate:{self._job.claim.job_id}:{hashlib.sha256(content.view()).hexdigest()}"
        try:
            candidate = self._publish(header, content, key)
        except KilnError as error:
            if error.code != VERSION_DELETED:
                raise
            key = f"{key}:{self._job.claim.claim_epoch}"  # an earlier claim let go of it: judged anew
            candidate = self._publish(header, content, key)
        report = self._publisher.make_live(candidate)
        outcome = self._evaluate(candidate, key)
        self._job.write({}, ("gate", outcome))
        log.info("gate_judged", passed=outcome["passed"], reason=outcome["reason"])
        if outcome["passed"]:
            return outcome, None
        kept = {
            "adapter": candidate.name,
            "version": candidate.version,
            "sha256": candidate.sha256,
            "not_live": [*report.not_live],
            "swap_s": round(report.seconds, 6),
        }
        return outcome, kept

    def clear(self) -> None:
        """Let go of the candidate; one that stays because the registry is away does no harm."""
        try:
            self._publisher.withdraw(self._job.claim.job_id)
        except KilnError as error:
            log.warning("candidate_not_withdrawn", code=error.code, reason=str(error))

    def _publish(
        self, header: registry_pb2.PublishHeader, content: AdapterContent, key: str
    ) -> registry_pb2.AdapterVersion:
        held = registry_pb2.PublishHeader()
        held.CopyFrom(header)
        held.name, held.publish_key, held.attach = self._job.claim.job_id, key, False
        return self._wait_for(lambda: self._publisher.publish(held, content))

    def _evaluate(self, candidate: registry_pb2.AdapterVersion, key: str) -> dict[str, Any]:
        try:
            return self._evaluation(candidate, key)
        except (ClaimLost, JobCancelled):
            raise
        except KilnError as error:
            return self._outcome(None, f"the evaluation failed with {error.code}: {error}")

    def _evaluation(self, candidate: registry_pb2.AdapterVersion, key: str) -> dict[str, Any]:
        """Start it, wait for its end, and compare the score."""
        request = evaluations_pb2.SubmitRunRequest(
            owner=self._gate.owner,
            suite_id=self._gate.suite_id,
            adapter=f"{candidate.name}@{candidate.version}",
            settings_json=self._gate.settings_json,
            job_id=self._job.claim.job_id,
            idempotency_key=key,
        )
        run = self._wait_for(lambda: self._publisher.start_evaluation(request))
        run_id = run.id
        self._job.write({}, ("evaluating", {"run": run_id, "suite": self._gate.suite}))
        deadline_s = time.monotonic() + self._gate.timeout_s
        while run.status not in ("succeeded", "failed"):
            if time.monotonic() > deadline_s:
                return self._outcome(
                    run, f"the evaluation was {run.status} after {self._gate.timeout_s:g} s, "
                    f"with {run.num_done} of {run.suite.num_cases} cases done"
                )  # fmt: skip
            if self._stopping.wait(_LOOK_EVERY_S):
                raise WorkerStopping
            self._job.check()
            run = self._wait_for(lambda: self._publisher.evaluation(run_id, self._gate.owner))
        if run.status == "failed":
            return self._outcome(run, f"the evaluation failed with {run.error.code}: {run.error.message}")
        score, least = json.loads(run.summary_json)["score"]["mean"], self._gate.min_score
        relation = "reaches" if score >= least else "is below"
        return self._outcome(run, f"the score {score:.4g} {relation} the least of {least:g}", score)

    def _outcome(
        self, run: evaluations_pb2.EvalRun | None, reason: str, score: float | None = None
    ) -> dict[str, Any]:
        outcome: dict[str, Any] = {
            "passed": score is not None and score >= self._gate.min_score,
            "reason": reason,
            "run_id": run.id if run is not None else "",
            "suite": self._gate.suite,
            "min_score": self._gate.min_score,
        }
        return outcome if score is None else {**outcome, "score": score}
