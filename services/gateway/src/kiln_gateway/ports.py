"""What the gateway needs of the other services; kiln_common.clients has the real ones."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from kiln_common.pb import dataset_pb2, engine_pb2, evaluations_pb2, registry_pb2, trainer_pb2

Item = TypeVar("Item")


def closing(iterator: AsyncIterator[Item]) -> contextlib.aclosing[Any]:
    """`async with closing(...) as items`: what a client streams, ended with the block."""
    return contextlib.aclosing(cast(Any, iterator))


class EnginePort(Protocol):
    address: str

    def generate(self, request: engine_pb2.GenerateRequest) -> AsyncIterator[engine_pb2.SequenceOutput]:
        """Closing the iterator before its end aborts the request."""
        ...

    async def get_info(self) -> engine_pb2.EngineInfo: ...

    async def get_stats(self) -> engine_pb2.EngineStats: ...

    def end_session(self, reason: str) -> None:
        """What runs ends with EngineUnavailable; what comes next begins anew."""
        ...

    async def close(self) -> None:
        """What runs ends with EngineUnavailable. May be called again."""
        ...


class RegistryPort(Protocol):
    async def check_publish(self, name: str, owner: str) -> None: ...

    async def list_audit(
        self, *, name: str = "", before_id: int = 0, limit: int = 0
    ) -> builtins.list[registry_pb2.AuditEntry]: ...

    async def resolve(self, reference: str) -> registry_pb2.AdapterVersion: ...

    async def get(self, name: str) -> registry_pb2.Adapter: ...

    async def list(self) -> list[registry_pb2.Adapter]: ...

    async def get_default(self) -> registry_pb2.AdapterVersion | None: ...

    async def set_default(self, reference: str, *, actor: str = "") -> registry_pb2.AdapterVersion | None: ...

    async def roll_back(
        self, name: str, version: int, *, may_move_default: bool, actor: str = ""
    ) -> registry_pb2.RollBackResponse: ...

    async def compare(self, earlier: str, later: str) -> registry_pb2.CompareResponse: ...

    async def merge(self, request: registry_pb2.MergeRequest) -> registry_pb2.AdapterVersion: ...

    async def delete(self, name: str, version: int = 0, *, actor: str = "") -> int: ...

    async def fetch(self, sha256: str) -> bytes: ...

    async def publish(
        self, header: registry_pb2.PublishHeader, safetensors: bytes | Path
    ) -> registry_pb2.AdapterVersion: ...


class TrainerPort(Protocol):
    async def submit(self, request: trainer_pb2.SubmitRequest) -> trainer_pb2.Job: ...

    async def get(self, job_id: str) -> trainer_pb2.Job: ...

    async def list(
        self, limit: int = 0, statuses: Sequence[str] = (), owner: str | None = None
    ) -> builtins.list[trainer_pb2.Job]: ...

    async def queue(self) -> builtins.list[trainer_pb2.Job]: ...

    async def retry(self, request: trainer_pb2.RetryJobRequest) -> trainer_pb2.Job: ...

    async def cancel(self, job_id: str, *, discards: bool = False) -> trainer_pb2.Job: ...

    def watch(self, job_id: str, after_event_id: str = "") -> AsyncIterator[trainer_pb2.JobEvent]: ...

    async def status(self) -> trainer_pb2.TrainerStatus:
        """Of one that answers."""
        ...

    async def statuses(self) -> builtins.list[trainer_pb2.TrainerStatus | None]:
        """One entry a trainer, None for one that does not answer in time."""
        ...


class DatasetPort(Protocol):
    async def put(self, header: dataset_pb2.DatasetHeader, path: Path) -> dataset_pb2.Dataset: ...

    async def get(self, dataset_id: str) -> dataset_pb2.Dataset: ...

    async def list(self, owner: str | None = None) -> builtins.list[dataset_pb2.Dataset]: ...

    def fetch(self, dataset_id: str) -> AsyncIterator[bytes]: ...

    async def delete(self, dataset_id: str) -> None: ...


class EvaluationsPort(Protocol):
    async def put_suite(
        self, owner: str, name: str, content: str, num_cases: int
    ) -> evaluations_pb2.EvalSuite: ...

    async def get_suite(
        self, owner: str, reference: str, *, with_content: bool = False
    ) -> evaluations_pb2.EvalSuite: ...

    async def list_suites(self, owner: str) -> builtins.list[evaluations_pb2.EvalSuite]: ...

    async def submit_run(self, request: evaluations_pb2.SubmitRunRequest) -> evaluations_pb2.EvalRun: ...

    async def get_run(
        self, run_id: str, owner: str, *, with_cases: bool = False
    ) -> evaluations_pb2.EvalRun: ...

    async def list_runs(
        self, owner: str, adapters: Sequence[str] = (), statuses: Sequence[str] = (), limit: int = 0
    ) -> builtins.list[evaluations_pb2.EvalRun]: ...

    async def delete_run(self, run_id: str, owner: str) -> None: ...

    async def claim_run(self, lease_s: float) -> evaluations_pb2.EvalRun | None: ...

    async def report_cases(
        self, run_id: str, claim_epoch: int, cases: Sequence[evaluations_pb2.EvalCase], lease_s: float
    ) -> None: ...

    async def finish_run(
        self,
        run_id: str,
        claim_epoch: int,
        *,
        summary_json: str = "",
        error: evaluations_pb2.EvalError | None = None,
    ) -> evaluations_pb2.EvalRun: ...


@dataclass(frozen=True)
class Clients:
    """Every leaf behind the gateway.

    `engines` are the configured ones. `redis` is a redis.asyncio client, or None without Redis.
    `connect` opens a client of an engine that announced itself, by its address.
    """

    engines: Sequence[EnginePort]
    registry: RegistryPort
    trainer: TrainerPort
    datasets: DatasetPort
    evaluations: EvaluationsPort
    redis: Any = None
    connect: Callable[[str], EnginePort] | None = None
