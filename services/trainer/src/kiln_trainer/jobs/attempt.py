"""One attempt at one claimed job: from its payload to a published adapter that engines serve."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from kiln_common import tracing
from kiln_common.adapter_names import BASE_NAME, parse_reference
from kiln_common.errors import AdapterMismatch, AdapterNotFound, ErrorKind, KilnError
from kiln_common.pb import registry_pb2, trainer_pb2
from kiln_trainer.domain.errors import ClaimLost, DeviceBroken, JobCancelled, WeightsLost
from kiln_trainer.domain.training import StartingPoint, TrainedAdapter, TrainingTask
from kiln_trainer.jobs.claimed_job import ClaimedJob
from kiln_trainer.jobs.errors import StartRankTooHigh, WorkerStopping
from kiln_trainer.jobs.gate import Gate
from kiln_trainer.jobs.hooks import JobHooks
from kiln_trainer.jobs.ports import JobBackend, Publisher
from kiln_trainer.jobs.published import VERSION_DELETED, take_back, with_version, without
from kiln_trainer.jobs.records import data_sha256
from kiln_trainer.jobs.student import EngineStudent
from kiln_trainer.jobs.teacher import EngineTeacher
from kiln_trainer.jobs.totals import TrainerTotals
from kiln_trainer.jobs.version_metrics import version_metrics
from kiln_trainer.recipes.opd_options import OpdOptions

log = structlog.get_logger()
T = TypeVar("T")

_FIRST_WAIT_S, _LAST_WAIT_S = 0.1, 1.0
# A service that is away, and an engine that has no room for a job's completions just now.
_PASSING = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RATE_LIMITED})


class Attempt:
    """Runs one claimed job on the worker thread; used once.

    A service that is away or full (registry, engine) is waited for, at most `patience_s` seconds without
    a finished step in between.
    """

    def __init__(
        self,
        job: ClaimedJob,
        backend: JobBackend,
        publisher: Publisher,
        folder: Path,
        stopping: threading.Event,
        patience_s: float,
        totals: TrainerTotals,
    ) -> None:
        self._job = job
        self._backend = backend
        self._publisher = publisher
        self._folder = folder
        self._stopping = stopping
        self._patience_s = patience_s
        self._totals = totals
        self._published = job.claim.published

    def run(self, request: trainer_pb2.SubmitRequest) -> dict[str, Any]:
        """Train, publish, make live; returns the job's result.

        Raises:
            ClaimLost, JobCancelled, WorkerStopping; anything else means the job failed.
        """
        try:
            return self._run(request)
        except (ClaimLost, WorkerStopping, DeviceBroken):
            raise  # the next claim goes on with what there is
        except Exception as error:
            if request.config.HasField("gate"):
                self._job.check_claim()  # else the candidate is a later claim's
                self._gate(request).clear()
            was_cancelled = isinstance(error, JobCancelled)
            if was_cancelled and self._job.discards_published and request.config.publish.isdecimal():
                self._discard(request.config.adapter)
            raise

    def _run(self, request: trainer_pb2.SubmitRequest) -> dict[str, Any]:
        self._job.check()
        base = self._starting_version(request.config)
        if base is not None:
            self._check_start(request, base)
        trained = self._train(request, base)
        with contextlib.closing(trained.content):
            self._job.write({"environment": json.dumps(dict(self._backend.environment))})
            if request.config.publish == "never":
                return {"adapter": "", "version": 0, "sha256": ""}
            if not request.config.HasField("gate"):
                return self._publish(request, base, trained)
            gate = self._gate(request)
            outcome, kept = gate.judge(self._header(request, base, trained), trained.content)
            if kept is not None:
                return {**kept, "gate": outcome}
            published = self._publish(request, base, trained)
            gate.clear()
            return {**published, "gate": outcome}

    def _gate(self, request: trainer_pb2.SubmitRequest) -> Gate:
        return Gate(self._job, self._publisher, self._wait_for, request.config.gate, self._stopping)

    def _publish(
        self,
        request: trainer_pb2.SubmitRequest,
        base: registry_pb2.AdapterVersion | None,
        trained: TrainedAdapter,
    ) -> dict[str, Any]:
        self._job.write({"is_publishing": "1"}, ("publishing", {"adapter": request.config.adapter}))
        # Once this is recorded a cancel comes too late: what engines may serve is not called cancelled.
        self._job.sync()
        header = self._header(request, base, trained)
        with tracing.span("job.publish"):
            version = self._wait_for(lambda: self._publisher.publish(header, trained.content))
        published = {"adapter": version.name, "version": version.version, "sha256": version.sha256}
        self._published = with_version(self._published, trained.step, version)
        self._job.write({"published": self._published.to_json()}, ("published", published))
        with tracing.span("job.make_live"):
            report = self._publisher.make_live(version)
        self._totals.swap_seconds.observe(report.seconds)
        log.info("adapter_live", adapter=f"{version.name}@{version.version}", not_live=report.not_live)
        return {**published, "not_live": [*report.not_live], "swap_s": round(report.seconds, 6)}

    def _publish_on_the_way(
        self,
        request: trainer_pb2.SubmitRequest,
        base: registry_pb2.AdapterVersion | None,
        trained: TrainedAdapter,
    ) -> None:
        """A version between two steps; the job can still be cancelled after it."""
        # Only the last claim may put a version into the registry, and none once a cancel is asked for.
        self._job.sync()
        self._note_default(request)
        header = self._header(request, base, trained)
        header.publish_key = f"{header.job_id}:{trained.step}"
        try:
            version = self._wait_for(lambda: self._publisher.publish(header, trained.content))
        except KilnError as error:
            if error.code != VERSION_DELETED:
                raise
            log.info("version_deleted_meanwhile", step=trained.step)  # it was published, once
            return
        self._published = with_version(self._published, trained.step, version)
        self._job.write(
            {"published": self._published.to_json()}, ("published", {**self._published.versions[-1]})
        )
        report = self._publisher.make_live(version)
        log.info("adapter_live", adapter=f"{version.name}@{version.version}", not_live=report.not_live)

    def _note_default(self, request: trainer_pb2.SubmitRequest) -> None:
        """Remember what the job's first attached version takes the place of."""
        if not request.config.attach or self._published.default_before is not None:
            return
        default = self._wait_for(self._publisher.default_adapter)
        self._published = replace(self._published, default_before=default)
        self._job.write({"published": self._published.to_json()})
        self._job.sync()

    def _discard(self, adapter: str) -> None:
        """Take back what was published; a cancel does not end that, and a stop leaves it to the next claim."""
        job_id, before = self._job.claim.job_id, self._published.default_before
        references = self._wait_for(
            lambda: take_back(adapter, job_id, before, self._publisher), check=self._job.check_claim
        )
        self._published = without(self._published, references)
        with contextlib.suppress(JobCancelled):  # what is written stands, and the job ends next
            self._job.write({"published": self._published.to_json()}, ("discarded", {"versions": references}))

    def _starting_version(self, config: trainer_pb2.JobConfig) -> registry_pb2.AdapterVersion | None:
        """What the job starts from: resolved once, recorded, and the same in every later attempt."""
        recorded = self._job.claim.resolved_base
        if recorded is None:
            version = self._resolve(config)
            recorded = f"{version.name}@{version.version}" if version else ""
            sha256 = version.sha256 if version else ""
            self._job.write(
                {"resolved_base": recorded, "base_adapter_sha256": sha256},
                ("started", {"base_adapter": recorded}),
            )
            # A second attempt must find the record, whatever is published meanwhile.
            self._job.sync()
            return version
        return self._wait_for(lambda: self._publisher.resolve(recorded)) if recorded else None

    def _resolve(self, config: trainer_pb2.JobConfig) -> registry_pb2.AdapterVersion | None:
        if config.start_fresh:
            return None
        if config.base_adapter:
            parse_reference(config.base_adapter, param="base_adapter")
            return self._wait_for(lambda: self._publisher.resolve(config.base_adapter))
        try:
            return self._wait_for(lambda: self._publisher.resolve(config.adapter))
        except KilnError as error:
            if error.code == AdapterNotFound.code:
                return None
            raise

    def _check_start(self, request: trainer_pb2.SubmitRequest, base: registry_pb2.AdapterVersion) -> None:
        """Refuse a starting version whose successor could not be served, before hours go into it."""
        max_rank = self._publisher.max_adapter_rank()
        if 0 < max_rank < base.rank:
            raise StartRankTooHigh(f"{base.name}@{base.version}", base.rank, max_rank)
        _check_base_model(request, base)

    def _train(
        self, request: trainer_pb2.SubmitRequest, base: registry_pb2.AdapterVersion | None
    ) -> TrainedAdapter:
        """Run the backend; when the engine goes away, map the weights again and go on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        point: StartingPoint | None = None
        if base is not None:
            start = base
            point = self._wait_for(lambda: self._publisher.download(start, self._folder / "start"))
        task = TrainingTask(
            job_id=self._job.claim.job_id,
            request=request,
            starting_point=point,
            checkpoint_dir=self._folder,
            claim_epoch=self._job.claim.claim_epoch,
            teacher=self._teacher(request),
            sampler=self._sampler(request, base),
            scorer=self._scorer(request),
        )
        with tracing.span("job.train"):
            hooks = JobHooks(
                self._job,
                lambda trained: self._publish_on_the_way(request, base, trained),
                self._totals,
            )
            return self._wait_for(
                lambda: self._backend.run(task, hooks), num_done=lambda: hooks.num_steps_reported
            )

    def _teacher(self, request: trainer_pb2.SubmitRequest) -> StartingPoint | None:
        """The adapter that teaches, where one does. Raises AdapterNotFound, AdapterMismatch."""
        reference = request.opd.settings.teacher
        if reference in ("", BASE_NAME):
            return None
        version = self._wait_for(lambda: self._publisher.resolve(reference))
        _check_base_model(request, version)
        return self._wait_for(lambda: self._publisher.download(version, self._folder / "teacher"))

    def _sampler(
        self, request: trainer_pb2.SubmitRequest, base: registry_pb2.AdapterVersion | None
    ) -> EngineStudent | None:
        if not request.opd.prompts:
            return None
        return EngineStudent(
            self._job, self._publisher, request, base, lambda: self._base_model_hash(request)
        )

    def _scorer(self, request: trainer_pb2.SubmitRequest) -> EngineTeacher | None:
        if not request.opd.settings.HasField("teacher_model"):
            return None
        teacher = OpdOptions.from_proto(request.opd.settings).teacher_model
        assert teacher is not None
        return EngineTeacher(self._job, self._publisher, teacher)

    def _base_model_hash(self, request: trainer_pb2.SubmitRequest) -> str:
        return request.base_model_hash or self._backend.mapped_model.model_hash

    def _header(
        self,
        request: trainer_pb2.SubmitRequest,
        base: registry_pb2.AdapterVersion | None,
        trained: TrainedAdapter,
    ) -> registry_pb2.PublishHeader:
        claim = self._job.claim
        return registry_pb2.PublishHeader(
            name=request.config.adapter,
            base_model_hash=self._base_model_hash(request),
            config_json=trained.content.config_json,
            parent_name=base.name if base else "",
            parent_version=base.version if base else 0,
            job_id=claim.job_id,
            publish_key=claim.job_id,
            claim_epoch=claim.claim_epoch,
            attach=request.config.attach,
            metrics_json=version_metrics(request, trained.metrics),
            data_sha256=data_sha256(request),
            owner=request.owner,
        )

    def _wait_for(
        self,
        call: Callable[[], T],
        num_done: Callable[[], int] = lambda: 0,
        check: Callable[[], None] | None = None,
    ) -> T:
        """Call until the service answers; patience begins anew whenever `num_done` has grown.

        `check` raises what ends the waiting, by default what ends the job.
        """
        last_done = num_done()
        deadline_s = time.monotonic() + self._patience_s
        wait_s = _FIRST_WAIT_S
        waiting_for = ""  # so that one outage is one line in the log
        while True:
            try:
                return call()
            except KilnError as error:
                if not isinstance(error, WeightsLost) and error.kind not in _PASSING:
                    raise
                if num_done() > last_done:
                    last_done, wait_s = num_done(), _FIRST_WAIT_S
                    deadline_s = time.monotonic() + self._patience_s
                if time.monotonic() + wait_s > deadline_s:
                    raise
                if error.code != waiting_for:
                    log.warning("job_waits_for_service", code=error.code, reason=str(error))
                    waiting_for = error.code
            (check or self._job.check)()
            if self._stopping.wait(wait_s):
                raise WorkerStopping
            wait_s = min(2 * wait_s, _LAST_WAIT_S)


def _check_base_model(request: trainer_pb2.SubmitRequest, version: registry_pb2.AdapterVersion) -> None:
    wanted = request.base_model_hash
    if wanted and version.base_model_hash != wanted:
        raise AdapterMismatch(
            f"{version.name}@{version.version} was trained on base model {version.base_model_hash[:12]}, "
            f"the job is for {wanted[:12]}"
        )
