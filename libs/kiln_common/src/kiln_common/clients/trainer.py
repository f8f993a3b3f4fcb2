"""Client of the trainer service."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from kiln_common.errors import TrainerUnavailable
from kiln_common.pb import trainer_pb2, trainer_pb2_grpc
from kiln_common.rpc import from_rpc_error, open_channel

STATUS_TIMEOUT_S = 2.0


class TrainerClient:
    """Typed calls to one trainer; errors come back as KilnError with the trainer's code.

    Every call may raise TrainerUnavailable, and queue_unavailable while Redis is away. `timeout_s` bounds
    what changes a job, `read_timeout_s` what only asks: longer than a trainer waits for Redis (5 s), so
    that it can say which of the two is away.
    """

    def __init__(self, address: str, *, timeout_s: float = 15.0, read_timeout_s: float = 6.0) -> None:
        self._channel = open_channel(address)
        self._stub = trainer_pb2_grpc.TrainerStub(self._channel)
        self._timeout_s = timeout_s
        self._read_timeout_s = min(read_timeout_s, timeout_s)

    async def close(self) -> None:
        await self._channel.close()

    async def submit(self, request: trainer_pb2.SubmitRequest) -> trainer_pb2.Job:
        """Hand over a job; when this returns, the job is durable."""
        return await self._call(self._stub.Submit, request)

    async def get(self, job_id: str) -> trainer_pb2.Job:
        """One job with its history. Raises job_not_found."""
        return await self._ask(self._stub.GetJob, trainer_pb2.GetJobRequest(id=job_id))

    async def list(
        self, limit: int = 0, statuses: Sequence[str] = (), owner: str | None = None
    ) -> list[trainer_pb2.Job]:
        """The newest `limit` jobs (0 means 100), without their histories.

        `statuses` and `owner` narrow them down; none of either means all.
        """
        request = trainer_pb2.ListJobsRequest(limit=limit, statuses=statuses, owner=owner)
        return [*(await self._ask(self._stub.ListJobs, request)).jobs]

    async def queue(self) -> builtins.list[trainer_pb2.Job]:
        """Running jobs, then queued ones in the order in which they will run."""
        answer = await self._ask(self._stub.ListQueue, trainer_pb2.ListQueueRequest())
        return [*answer.jobs]

    async def retry(self, request: trainer_pb2.RetryJobRequest) -> trainer_pb2.Job:
        """Do a job that has ended again, as a new one. Raises job_not_found, job_not_ended, payload_gone."""
        return await self._call(self._stub.RetryJob, request)

    async def cancel(self, job_id: str, *, discards: bool = False) -> trainer_pb2.Job:
        """Cancel: at once while queued, at the next step boundary while running.

        `discards`: delete the versions that the job has published on the way.
        """
        request = trainer_pb2.CancelJobRequest(id=job_id, discard_published=discards)
        return await self._call(self._stub.CancelJob, request)

    async def watch(self, job_id: str, after_event_id: str = "") -> AsyncIterator[trainer_pb2.JobEvent]:
        """Events after `after_event_id`, then new ones until the job has ended.

        The call is cancelled when the iterator is closed.
        """
        request = trainer_pb2.WatchJobRequest(id=job_id, after_event_id=after_event_id)
        call = self._stub.WatchJob(request)
        try:
            async for event in call:
                yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error, "trainer", TrainerUnavailable) from error
        finally:
            call.cancel()

    async def status(self) -> trainer_pb2.TrainerStatus:
        """What it does now, within STATUS_TIMEOUT_S: a trainer that works says so at once."""
        request = trainer_pb2.GetTrainerStatusRequest()
        return await self._call(self._stub.GetStatus, request, min(STATUS_TIMEOUT_S, self._read_timeout_s))

    async def _ask(self, method: Any, request: Any) -> Any:
        return await self._call(method, request, self._read_timeout_s)

    async def _call(self, method: Any, request: Any, timeout_s: float = 0.0) -> Any:
        try:
            return await method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "trainer", TrainerUnavailable) from error
