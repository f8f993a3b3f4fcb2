"""What clients that call the trainer themselves may do with jobs: what their key may do over HTTP."""

from __future__ import annotations

import asyncio

from kiln_common.adapter_names import BASE_NAME
from kiln_common.api_keys import Caller, require_scope
from kiln_common.clients.evaluations import EvaluationsClient
from kiln_common.clients.registry import RegistryClient
from kiln_common.errors import AdapterNotFound, JobNotFound
from kiln_common.pb import trainer_pb2
from kiln_trainer.jobs.errors import CorrectionsTaken
from kiln_trainer.jobs.store import JobStore


class ClientRights:
    """Makes jobs the caller's own, and refuses what belongs to another key. Admins see everyone's."""

    def __init__(self, store: JobStore, registry: RegistryClient, evaluations: EvaluationsClient) -> None:
        self._store = store
        self._registry = registry
        self._evaluations = evaluations

    def check_visible(self, job: trainer_pb2.Job, caller: Caller | None) -> None:
        """Raises JobNotFound for another key's job; services (None) see all."""
        if caller is not None and not _is_admin(caller) and job.owner != caller.owner:
            raise JobNotFound(f"there is no job {job.id[:80]!r}")

    async def make_own(self, request: trainer_pb2.SubmitRequest, caller: Caller) -> None:
        """Put the caller's name to a job, whatever the request says, once all that it names may be used.

        Raises:
            ScopeMissing: it attaches, or goes before others, without `admin`.
            AdapterNameTaken, AdapterNotFound, EvalSuiteNotFound, CorrectionsTaken: another key's.
            RegistryUnavailable: nobody can say whose things are.
        """
        config = request.config
        if config.attach or config.priority < 0:
            require_scope(caller, "admin")
        request.owner = caller.owner
        if config.HasField("gate"):
            config.gate.owner = caller.owner
        if request.idempotency_key:
            request.idempotency_key = f"{caller.owner}:grpc:{request.idempotency_key}"
        await self._registry.check_publish(config.adapter, caller.owner)
        if not _is_admin(caller):
            await self._check_named(request, caller)
        if not request.retry_of:  # those of a job that may be seen were checked with it
            await asyncio.to_thread(self._check_corrections, request, caller)

    async def _check_named(self, request: trainer_pb2.SubmitRequest, caller: Caller) -> None:
        config = request.config
        if config.base_adapter:
            await self._check_adapter(config.base_adapter, caller)
        if (teacher := request.opd.settings.teacher) not in ("", BASE_NAME):
            await self._check_adapter(teacher, caller)
        if config.HasField("gate"):
            await self._evaluations.get_suite(caller.owner, config.gate.suite_id)

    async def _check_adapter(self, reference: str, caller: Caller) -> None:
        if (await self._registry.resolve(reference)).owner != caller.owner:
            raise AdapterNotFound(f"there is no adapter {reference[:160]!r}")

    def _check_corrections(self, request: trainer_pb2.SubmitRequest, caller: Caller) -> None:
        for correction_id in request.correction_ids:
            if self._store.correction_owner(correction_id) != caller.owner:
                raise CorrectionsTaken(
                    f"the correction {correction_id[:80]!r} is not free", param="corrections"
                )


def _is_admin(caller: Caller) -> bool:
    return "admin" in caller.scopes
