"""The trainers behind the gateway: all of them serve one queue, so any that answers will do."""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from kiln_common.clients.trainer import TrainerClient
from kiln_common.errors import KilnError, TrainerUnavailable
from kiln_common.ids import new_id
from kiln_common.pb import trainer_pb2
from kiln_gateway.ports import closing

# Of all trainers together: who watches a server asks often, and wants to know of those that answer.
STATUS_TIMEOUT_S = 2.0
T = TypeVar("T")


class TrainerPool:
    """A TrainerPort. A call goes to the trainer that answered last, and on to the others where it does not.

    Every call may raise TrainerUnavailable: none of them answered.
    """

    def __init__(self, trainers: Sequence[TrainerClient]) -> None:
        self._trainers = [*trainers]
        self._chosen = 0

    async def close(self) -> None:
        for trainer in self._trainers:
            await trainer.close()

    async def submit(self, request: trainer_pb2.SubmitRequest) -> trainer_pb2.Job:
        """A trainer that gave no answer may have accepted the job: by its key another one knows it."""
        request.idempotency_key = request.idempotency_key or new_id("submit")
        return await self._ask(lambda trainer: trainer.submit(request))

    async def retry(self, request: trainer_pb2.RetryJobRequest) -> trainer_pb2.Job:
        request.idempotency_key = request.idempotency_key or new_id("retry")
        return await self._ask(lambda trainer: trainer.retry(request))

    async def get(self, job_id: str) -> trainer_pb2.Job:
        return await self._ask(lambda trainer: trainer.get(job_id))

    async def list(
        self, limit: int = 0, statuses: Sequence[str] = (), owner: str | None = None
    ) -> list[trainer_pb2.Job]:
        return await self._ask(lambda trainer: trainer.list(limit, statuses, owner))

    async def queue(self) -> builtins.list[trainer_pb2.Job]:
        return await self._ask(lambda trainer: trainer.queue())

    async def cancel(self, job_id: str, *, discards: bool = False) -> trainer_pb2.Job:
        return await self._ask(lambda trainer: trainer.cancel(job_id, discards=discards))

    async def watch(self, job_id: str, after_event_id: str = "") -> AsyncIterator[trainer_pb2.JobEvent]:
        """Where a trainer goes away, another one tells what happens after the last event."""
        num_silent = 0
        while True:
            chosen = self._chosen
            try:
                async with closing(self._trainers[chosen].watch(job_id, after_event_id)) as events:
                    async for event in events:
                        after_event_id, num_silent = event.id, 0
                        yield event
                return
            except TrainerUnavailable:
                num_silent += 1
                self._pass_over(chosen)
                if num_silent == len(self._trainers):
                    raise

    async def status(self) -> trainer_pb2.TrainerStatus:
        return await self._ask(lambda trainer: trainer.status())

    async def statuses(self) -> builtins.list[trainer_pb2.TrainerStatus | None]:
        """What each says of itself, in their order; None for one that does not answer.

        Calls to come begin with one that does.
        """
        chosen = self._chosen
        found = await asyncio.gather(*map(_status_or_none, self._trainers))
        if found[chosen] is None and any(status is not None for status in found):
            self._pass_over(chosen)
        return found

    async def _ask(self, call: Callable[[TrainerClient], Awaitable[T]]) -> T:
        num_silent = 0
        while True:
            chosen = self._chosen
            try:
                return await call(self._trainers[chosen])
            except TrainerUnavailable:
                num_silent += 1
                self._pass_over(chosen)
                if num_silent == len(self._trainers):
                    raise

    def _pass_over(self, silent: int) -> None:
        """Begin with the next one from now on, unless another call has seen to that."""
        if self._chosen == silent:
            self._chosen = (silent + 1) % len(self._trainers)


async def _status_or_none(trainer: TrainerClient) -> trainer_pb2.TrainerStatus | None:
    try:
        return await asyncio.wait_for(trainer.status(), STATUS_TIMEOUT_S)
    except (KilnError, TimeoutError):
        return None
