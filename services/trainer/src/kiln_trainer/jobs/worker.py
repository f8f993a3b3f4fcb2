"""The worker thread: claims one job after another and carries each to its end."""

from __future__ import annotations

import contextlib
import contextvars
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import structlog

from kiln_common import tracing
from kiln_common.errors import KilnError
from kiln_trainer.domain.errors import ClaimLost, DeviceBroken, JobCancelled
from kiln_trainer.jobs.attempt import Attempt
from kiln_trainer.jobs.claimed_job import REDIS_FAILURES, ClaimedJob
from kiln_trainer.jobs.errors import (
    JobCrashedTrainer,
    JobFailedUnexpectedly,
    TrainerOutOfMemory,
    WorkerStopping,
)
from kiln_trainer.jobs.ports import JobBackend, Publisher
from kiln_trainer.jobs.records import FINAL_STATUSES, Claim, JobFailure
from kiln_trainer.jobs.store import JobStore
from kiln_trainer.jobs.totals import TrainerTotals

log = structlog.get_logger()

_MAX_CRASHES = 3
_POLL_S = 1.0
_REDIS_WAIT_S = 1.0


class Worker:
    """Owns the thread on which jobs run, and the folders of their checkpoints.

    `claim_timeout_s`: silence after which another trainer takes a job over.
    `patience_s`: how long a job waits for a registry or an engine that is away.
    """

    def __init__(
        self,
        store: JobStore,
        backend: JobBackend,
        publisher: Publisher,
        jobs_dir: Path,
        *,
        claim_timeout_s: float,
        patience_s: float,
    ) -> None:
        self._store = store
        self._backend = backend
        self._publisher = publisher
        self._jobs_dir = jobs_dir
        self._claim_timeout_s = claim_timeout_s
        self._patience_s = patience_s
        self._stopping = threading.Event()
        self._claim: Claim | None = None
        self._failure: BaseException | None = None
        self.totals = TrainerTotals()
        # Log fields of the process, such as its service, go along.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="worker", daemon=True)

    @property
    def running_job_id(self) -> str:
        """Empty while idle. May be read from any thread."""
        claim = self._claim
        return claim.job_id if claim is not None else ""

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def failure(self) -> BaseException | None:
        """What ended the thread before it was asked to stop; may be read once it is not alive."""
        return self._failure

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> None:
        """Let go of the running job at its next step boundary, and end the thread.

        A step that goes on for longer than `timeout_s` dies with the process, and is not held
        against its job.
        """
        self._stopping.set()
        self._thread.join(timeout_s)
        claim = self._claim
        if self._thread.is_alive() and claim is not None:
            self._release(claim)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._failure = error
            raise

    def _work(self) -> None:
        self._jobs_dir.mkdir(parents=True, exist_ok=True)
        is_ready = is_away = False
        try:
            while not self._stopping.is_set():
                try:
                    if not is_ready:
                        self._store.adopt_from_stream()
                        self._store.forget_expired()
                        self._remove_old_folders()
                        is_ready = True
                    claim = self._store.claim_next(
                        self._claim_timeout_s, min(_POLL_S, self._claim_timeout_s / 2)
                    )
                    is_away = False
                except REDIS_FAILURES as error:
                    if not is_away:
                        log.warning("queue_unavailable", reason=str(error))
                    is_ready, is_away = False, True
                    self._stopping.wait(_REDIS_WAIT_S)
                    continue
                if claim is not None:
                    self._carry_out(claim)
                    is_ready = False  # there may be something to forget again
                else:
                    self._backend.keep_mapped()
        finally:
            self._backend.close()

    def _carry_out(self, claim: Claim) -> None:
        self._claim = claim
        folder = self._jobs_dir / claim.job_id
        try:
            with (
                structlog.contextvars.bound_contextvars(job_id=claim.job_id),
                _job_span(claim) as span,
                ClaimedJob(self._store, claim, self._stopping, self._claim_timeout_s / 4) as job,
            ):
                log.info("job_claimed", adapter=claim.adapter, claim_epoch=claim.claim_epoch)
                status = self._end(job, folder)
                if span is not None:
                    span.set_attribute("kiln.status", status)
                self.totals.num_jobs_ended[status] += 1
                log.info("job_ended", status=status)
            shutil.rmtree(folder, ignore_errors=True)
        except ClaimLost as error:
            log.warning("claim_lost", job_id=claim.job_id, reason=str(error))
        except WorkerStopping:
            self._release(claim)
        except DeviceBroken as error:
            log.error("device_broken", job_id=claim.job_id, reason=str(error))
            raise  # ends this thread, and so the process: the next one goes on with the job
        finally:
            self._claim = None

    def _release(self, claim: Claim) -> None:
        with contextlib.suppress(*REDIS_FAILURES):  # then the claim simply runs out
            self._store.release(claim)
        log.info("job_released", job_id=claim.job_id)

    def _end(self, job: ClaimedJob, folder: Path) -> str:
        """Carry the job to its end and record it; returns the status."""
        try:
            result = self._attempt(job, folder)
        except (ClaimLost, WorkerStopping, DeviceBroken):
            raise
        except JobCancelled:
            job.finish(self._store.end_cancelled)
            return "cancelled"
        except Exception as error:
            failure = _describe(error)
            is_told = isinstance(error, KilnError)  # by its code and reason
            log.warning(
                "job_failed", code=failure.code, reason=failure.message, exc_info=None if is_told else error
            )
            job.finish(lambda claim: self._store.fail(claim, failure))
            return "failed"
        job.finish(lambda claim: self._store.succeed(claim, result))
        return "succeeded"

    def _attempt(self, job: ClaimedJob, folder: Path) -> dict[str, Any]:
        if job.claim.num_crashes >= _MAX_CRASHES:
            raise JobCrashedTrainer(job.claim.num_crashes)
        request = job.patiently(lambda: self._store.read_payload(job.claim.job_id))
        attempt = Attempt(
            job, self._backend, self._publisher, folder, self._stopping, self._patience_s, self.totals
        )
        return attempt.run(request)

    def _remove_old_folders(self) -> None:
        """Delete checkpoints of jobs that ended just before a trainer did."""
        for folder in self._jobs_dir.iterdir():
            if self._store.status(folder.name) in {None, *FINAL_STATUSES}:
                shutil.rmtree(folder, ignore_errors=True)


def _job_span(claim: Claim) -> contextlib.AbstractContextManager[Any]:
    """A span around one attempt, in the trace that the job was submitted in."""
    if claim.claim_epoch == 1:
        tracing.record_span("job.queue", claim.created_at_s, time.time(), parent=claim.traceparent)
    return tracing.span(
        "job",
        parent=claim.traceparent,
        attributes={"kiln.job_id": claim.job_id, "kiln.claim_epoch": claim.claim_epoch},
    )


def _describe(error: Exception) -> JobFailure:
    if isinstance(error, MemoryError):
        error = TrainerOutOfMemory("the trainer ran out of memory during a step")
    elif not isinstance(error, KilnError):
        error = JobFailedUnexpectedly(f"the job ended with {type(error).__name__}: {str(error)[:500]}")
    return JobFailure(error.code, str(error), error.hint)
