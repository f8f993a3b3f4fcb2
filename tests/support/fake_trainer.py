"""A trainer in memory that accepts jobs and never runs them."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Sequence

from kiln_common.errors import JobNotFound, KilnError, TrainerUnavailable
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.records import sampled_by
from kiln_trainer.jobs.retry import retried


class FakeTrainer:
    """Accepts jobs and never runs them; `events` is what watch tells."""

    def __init__(self) -> None:
        self.submitted: list[trainer_pb2.SubmitRequest] = []
        self.cancels: list[tuple[str, bool]] = []
        self.retries: list[trainer_pb2.RetryJobRequest] = []
        self.jobs: dict[str, trainer_pb2.Job] = {}
        self.events: list[trainer_pb2.JobEvent] = []
        self.is_up = True
        self.running_job_id = ""
        self.refusal: KilnError | None = None

    def _check(self) -> None:
        if not self.is_up:
            raise TrainerUnavailable("the trainer is down")

    async def submit(self, request: trainer_pb2.SubmitRequest) -> trainer_pb2.Job:
        self._check()
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(request)
        job = trainer_pb2.Job(
            id=f"job_{len(self.submitted)}",
            kind=request.WhichOneof("recipe"),
            status="queued",
            config=request.config,
            queue_position=len(self.submitted) - 1,
            grpo_loss=request.grpo.loss,
            opd_settings=request.opd.settings,
            created_at_s=100.0,
            owner=request.owner,
            retry_of=request.retry_of,
            dataset=request.dataset,
            correction_ids=request.correction_ids,
        )
        if request.HasField("webhook"):
            job.webhook.CopyFrom(trainer_pb2.WebhookState(url=request.webhook.url, status="pending"))
        grpo = [rollout for group in request.grpo.groups for rollout in group.rollouts]
        for rollout in [*grpo, *request.opd.rollouts]:
            job.sources[rollout.source] += 1
        job.sampled_by.update(sampled_by(request))
        self.jobs[job.id] = job
        return job

    async def get(self, job_id: str) -> trainer_pb2.Job:
        self._check()
        if job_id not in self.jobs:
            raise JobNotFound(f"no job {job_id!r}")
        return self.jobs[job_id]

    async def list(
        self, limit: int = 0, statuses: Sequence[str] = (), owner: str | None = None
    ) -> list[trainer_pb2.Job]:
        self._check()
        newest_first = [*reversed(self.jobs.values())]
        return [
            job
            for job in newest_first
            if (not statuses or job.status in statuses) and owner in (None, job.owner)
        ][: limit or 100]

    async def queue(self) -> builtins.list[trainer_pb2.Job]:
        self._check()
        return [job for job in self.jobs.values() if job.status in ("running", "queued")]

    async def retry(self, request: trainer_pb2.RetryJobRequest) -> trainer_pb2.Job:
        self.retries.append(request)
        accepted = self.submitted[[*self.jobs].index(request.id)]
        return await self.submit(retried(await self.get(request.id), accepted, request))

    async def cancel(self, job_id: str, *, discards: bool = False) -> trainer_pb2.Job:
        job = await self.get(job_id)
        self.cancels.append((job_id, discards))
        job.status = "cancelled"
        return job

    async def watch(self, job_id: str, after_event_id: str = "") -> AsyncIterator[trainer_pb2.JobEvent]:
        await self.get(job_id)
        for event in self.events:
            if event.id > after_event_id:
                yield event

    async def statuses(self) -> builtins.list[trainer_pb2.TrainerStatus | None]:
        try:
            return [await self.status()]
        except KilnError:
            return [None]

    async def status(self) -> trainer_pb2.TrainerStatus:
        self._check()
        return trainer_pb2.TrainerStatus(
            trainer_id="trainer-1",
            running_job_id=self.running_job_id,
            num_queued=len(self.jobs),
            gpu_sharing="mps",
            gpu_share=0.5,
            gpu_sms=64,
        )
