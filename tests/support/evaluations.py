"""The registry's store of evaluations in this process, behind the client's interface."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from kiln_common.pb import evaluations_pb2 as pb
from kiln_registry.evaluations.store import EvaluationStore
from kiln_registry.schema import open_engine


class LocalEvaluations:
    """An EvaluationsPort over a SQLite file in `folder`, opened when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.skipped_s = 0.0  # time that has passed besides the real one
        self.failure: Exception | None = None

    @functools.cached_property
    def store(self) -> EvaluationStore:
        return EvaluationStore(open_engine("", self._folder))

    def _now_s(self) -> float:
        if self.failure is not None:
            raise self.failure
        return time.time() + self.skipped_s

    async def put_suite(self, owner: str, name: str, content: str, num_cases: int) -> pb.EvalSuite:
        request = pb.PutSuiteRequest(owner=owner, name=name, content=content, num_cases=num_cases)
        return self.store.put_suite(request, self._now_s())

    async def get_suite(self, owner: str, reference: str, *, with_content: bool = False) -> pb.EvalSuite:
        return self.store.get_suite(owner, reference, with_content=with_content)

    async def list_suites(self, owner: str) -> list[pb.EvalSuite]:
        return self.store.list_suites(owner)

    async def submit_run(self, request: pb.SubmitRunRequest) -> pb.EvalRun:
        return self.store.submit_run(request, self._now_s())

    async def get_run(self, run_id: str, owner: str, *, with_cases: bool = False) -> pb.EvalRun:
        return self.store.get_run(run_id, owner, with_cases=with_cases)

    async def list_runs(
        self, owner: str, adapters: Any = (), statuses: Any = (), limit: int = 0
    ) -> list[pb.EvalRun]:
        request = pb.ListRunsRequest(owner=owner, adapters=adapters, statuses=statuses, limit=limit)
        return self.store.list_runs(request)

    async def delete_run(self, run_id: str, owner: str) -> None:
        self.store.delete_run(run_id, owner)

    async def claim_run(self, lease_s: float) -> pb.EvalRun | None:
        return self.store.claim_run(lease_s, self._now_s())

    async def report_cases(self, run_id: str, claim_epoch: int, cases: Any, lease_s: float) -> None:
        request = pb.ReportCasesRequest(run_id=run_id, claim_epoch=claim_epoch, cases=cases, lease_s=lease_s)
        self.store.report_cases(request, self._now_s())

    async def finish_run(self, run_id: str, claim_epoch: int, **fields: Any) -> pb.EvalRun:
        request = pb.FinishRunRequest(run_id=run_id, claim_epoch=claim_epoch, **fields)
        return self.store.finish_run(request, self._now_s())
