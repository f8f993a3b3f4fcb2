"""Trainer RPCs: the queue's only writer, and a window on the jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

import grpc
import redis
import redis.asyncio
import structlog

from kiln_common.bus.connect import REDIS_AWAY
from kiln_common.errors import KilnError, QueueUnavailable
from kiln_common.ids import new_id
from kiln_common.pb import trainer_pb2 as pb
from kiln_common.pb import trainer_pb2_grpc
from kiln_common.rpc.keys import current_caller
from kiln_trainer.client_rights import ClientRights
from kiln_trainer.device_memory import num_device_bytes
from kiln_trainer.jobs.capacity_check import check_capacity
from kiln_trainer.jobs.durability import check_durable
from kiln_trainer.jobs.errors import PayloadTooLarge
from kiln_trainer.jobs.events import watch_events
from kiln_trainer.jobs.ports import JobBackend
from kiln_trainer.jobs.retry import retried
from kiln_trainer.jobs.store import JobStore
from kiln_trainer.jobs.submit_stream import gather_request
from kiln_trainer.jobs.teacher_check import Teachers, settle_teacher
from kiln_trainer.jobs.validation import check_request
from kiln_trainer.jobs.worker import Worker
from kiln_trainer.publishing import EngineDirectory
from kiln_trainer.webhooks.addresses import Network, check_webhook

log = structlog.get_logger()
T = TypeVar("T")

_RESOLVE_TIMEOUT_S = 5.0

# A Redis that is full, read-only or cannot write its file answers with one of these.
_REFUSALS = ("OOM", "MISCONF", "READONLY", "NOREPLICAS")


# What clients from outside need for each method; "admin" for those that are not here.
CLIENT_SCOPES = dict.fromkeys(
    (
        *("Submit", "SubmitStream", "RetryJob", "GetJob", "ListJobs", "CancelJob", "WatchJob"),
        "GetStatus",
    ),
    "train",
)


class TrainerServicer(trainer_pb2_grpc.TrainerServicer):
    """Serves one queue. Redis calls run on threads, but for the tailing of events."""

    def __init__(
        self,
        trainer_id: str,
        client: redis.Redis,
        tail_client: redis.asyncio.Redis,
        store: JobStore,
        worker: Worker,
        backend: JobBackend,
        engines: EngineDirectory,
        teachers: Teachers,
        rights: ClientRights,
        *,
        max_payload_bytes: int,
        webhook_networks: Sequence[Network] = (),
    ) -> None:
        self._trainer_id = trainer_id
        self._client = client
        self._tail_client = tail_client
        self._store = store
        self._worker = worker
        self._backend = backend
        self._engines = engines
        self._teachers = teachers
        self._rights = rights
        self._max_payload_bytes = max_payload_bytes
        self._webhook_networks = webhook_networks

    async def Submit(self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        request.ClearField("retry_of")
        return await self._submit(request)

    async def SubmitStream(
        self, request_iterator: AsyncIterator[pb.SubmitPart], context: grpc.aio.ServicerContext
    ) -> pb.Job:
        return await self.Submit(await gather_request(request_iterator, self._max_payload_bytes), context)

    async def RetryJob(self, request: pb.RetryJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        job = await self._visible_job(request.id)
        accepted = await _on_redis(lambda: self._store.read_payload(request.id))
        return await self._submit(retried(job, accepted, request))

    async def _submit(self, request: pb.SubmitRequest) -> pb.Job:
        num_bytes = request.ByteSize()
        if num_bytes > self._max_payload_bytes:
            raise PayloadTooLarge(f"the job has {num_bytes} bytes, at most {self._max_payload_bytes}")
        if (caller := current_caller()) is not None:
            await self._rights.make_own(request, caller)
        if request.HasField("webhook"):
            checking = asyncio.to_thread(check_webhook, request.webhook, self._webhook_networks)
            with contextlib.suppress(TimeoutError):  # a name that is not known now may be later
                await asyncio.wait_for(checking, _RESOLVE_TIMEOUT_S)
        info = await self._engines.info()
        await settle_teacher(request, info, self._teachers)
        await asyncio.to_thread(check_request, request, info)
        await asyncio.to_thread(check_capacity, request, info, self._backend.capacity)
        job_id = await _on_redis(lambda: self._accept(request))
        log.info("job_accepted", job_id=job_id, adapter=request.config.adapter, num_bytes=num_bytes)
        return await _on_redis(lambda: self._store.get(job_id))

    async def GetJob(self, request: pb.GetJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        return await self._visible_job(request.id)

    async def ListJobs(
        self, request: pb.ListJobsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListJobsResponse:
        owner = request.owner if request.HasField("owner") else None
        if (caller := current_caller()) is not None and "admin" not in caller.scopes:
            owner = caller.owner
        jobs = await _on_redis(lambda: self._store.list_jobs(request.limit, request.statuses, owner))
        return pb.ListJobsResponse(jobs=jobs)

    async def ListQueue(
        self, request: pb.ListQueueRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListJobsResponse:
        return pb.ListJobsResponse(jobs=await _on_redis(self._store.list_open))

    async def CancelJob(self, request: pb.CancelJobRequest, context: grpc.aio.ServicerContext) -> pb.Job:
        await self._visible_job(request.id)
        await _on_redis(lambda: self._store.cancel(request.id, discards=request.discard_published))
        log.info("job_cancel_requested", job_id=request.id)
        return await _on_redis(lambda: self._store.get(request.id))

    async def WatchJob(
        self, request: pb.WatchJobRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.JobEvent]:
        if current_caller() is not None:
            await self._visible_job(request.id)
        try:
            async for event in watch_events(self._tail_client, request.id, request.after_event_id):
                yield event
        except REDIS_AWAY as error:
            raise _unavailable(error) from error

    async def GetStatus(
        self, request: pb.GetTrainerStatusRequest, context: grpc.aio.ServicerContext
    ) -> pb.TrainerStatus:
        mapped, gpu_use = self._backend.mapped_model, self._backend.gpu_use
        totals = self._worker.totals
        return pb.TrainerStatus(
            trainer_id=self._trainer_id,
            running_job_id=self._worker.running_job_id,
            num_queued=await _on_redis(self._store.num_queued),
            engine_boot_id=mapped.engine_boot_id,
            model_hash=mapped.model_hash,
            num_borrowed_bytes=mapped.num_borrowed_bytes,
            num_allocated_base_bytes=mapped.num_allocated_base_bytes,
            gpu_sharing=gpu_use.mode,
            gpu_share=gpu_use.share,
            gpu_sms=gpu_use.num_sms,
            num_jobs_ended=totals.num_jobs_ended,
            num_trained_tokens=totals.num_trained_tokens,
            step_seconds=totals.step_seconds.to_proto(),
            swap_seconds=totals.swap_seconds.to_proto(),
            metrics=totals.metrics,
            num_device_bytes=num_device_bytes(),
        )

    async def _visible_job(self, job_id: str) -> pb.Job:
        """Raises JobNotFound, also for a job that whoever calls may not see."""
        job = await _on_redis(lambda: self._store.get(job_id))
        self._rights.check_visible(job, current_caller())
        return job

    def _accept(self, request: pb.SubmitRequest) -> str:
        check_durable(self._client)
        job_id = new_id("job")
        try:
            return self._store.submit(request, job_id)
        except REDIS_AWAY as error:
            # The answer may have been lost after the job was stored: look before refusing, since
            # the caller would submit a refused job again.
            if self._store.status(job_id) is None:
                raise _unavailable(error) from error
            return job_id


async def _on_redis(call: Callable[[], T]) -> T:
    """Run on a thread. Raises QueueUnavailable while Redis is away or refuses writes."""
    try:
        return await asyncio.to_thread(call)
    except REDIS_AWAY as error:
        raise _unavailable(error) from error
    except redis.ResponseError as error:
        if str(error).lstrip("-").startswith(_REFUSALS) or isinstance(error, redis.OutOfMemoryError):
            raise _unavailable(error) from error
        raise


def _unavailable(error: Exception) -> KilnError:
    return QueueUnavailable(f"Redis cannot keep jobs now: {error}")
