"""Client of the evaluations that the registry keeps."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import Any

import grpc

from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import evaluations_pb2, evaluations_pb2_grpc
from kiln_common.rpc import from_rpc_error, open_channel


class EvaluationsClient:
    """Typed calls to one registry; errors come back as KilnError with the registry's code.

    Every call may raise RegistryUnavailable. `timeout_s` bounds a call.
    """

    def __init__(self, address: str, *, timeout_s: float = 30.0) -> None:
        self._channel = open_channel(address)
        self._stub = evaluations_pb2_grpc.EvaluationsStub(self._channel)
        self._timeout_s = timeout_s

    async def close(self) -> None:
        await self._channel.close()

    async def put_suite(
        self, owner: str, name: str, content: str, num_cases: int
    ) -> evaluations_pb2.EvalSuite:
        """Keep a suite as the next version of its name. Raises invalid_suite_name."""
        request = evaluations_pb2.PutSuiteRequest(
            owner=owner, name=name, content=content, num_cases=num_cases
        )
        return await self._call(self._stub.PutSuite, request)

    async def get_suite(
        self, owner: str, reference: str, *, with_content: bool = False
    ) -> evaluations_pb2.EvalSuite:
        """A suite by "name", "name@2" or id. Raises eval_suite_not_found."""
        request = evaluations_pb2.GetSuiteRequest(owner=owner, reference=reference, with_content=with_content)
        return await self._call(self._stub.GetSuite, request)

    async def list_suites(self, owner: str) -> builtins.list[evaluations_pb2.EvalSuite]:
        answer = await self._call(self._stub.ListSuites, evaluations_pb2.ListSuitesRequest(owner=owner))
        return [*answer.suites]

    async def submit_run(self, request: evaluations_pb2.SubmitRunRequest) -> evaluations_pb2.EvalRun:
        """Queue a run. Raises eval_suite_not_found."""
        return await self._call(self._stub.SubmitRun, request)

    async def get_run(self, run_id: str, owner: str, *, with_cases: bool = False) -> evaluations_pb2.EvalRun:
        """Raises eval_run_not_found."""
        request = evaluations_pb2.GetRunRequest(id=run_id, owner=owner, with_cases=with_cases)
        return await self._call(self._stub.GetRun, request)

    async def list_runs(
        self, owner: str, adapters: Sequence[str] = (), statuses: Sequence[str] = (), limit: int = 0
    ) -> builtins.list[evaluations_pb2.EvalRun]:
        """The owner's newest runs, newest first, without cases; see ListRunsRequest for what chooses."""
        request = evaluations_pb2.ListRunsRequest(
            owner=owner, adapters=adapters, statuses=statuses, limit=limit
        )
        return [*(await self._call(self._stub.ListRuns, request)).runs]

    async def delete_run(self, run_id: str, owner: str) -> None:
        """Forget a run and its cases. Raises eval_run_not_found."""
        request = evaluations_pb2.DeleteRunRequest(id=run_id, owner=owner)
        await self._call(self._stub.DeleteRun, request)

    async def claim_run(self, lease_s: float) -> evaluations_pb2.EvalRun | None:
        """The oldest run that nobody carries out, now the caller's for `lease_s` seconds."""
        answer = await self._call(self._stub.ClaimRun, evaluations_pb2.ClaimRunRequest(lease_s=lease_s))
        return answer.run if answer.HasField("run") else None

    async def report_cases(
        self, run_id: str, claim_epoch: int, cases: Sequence[evaluations_pb2.EvalCase], lease_s: float
    ) -> None:
        """Add results and renew the lease; a lease of 0 gives the run back. Raises eval_claim_lost."""
        request = evaluations_pb2.ReportCasesRequest(
            run_id=run_id, claim_epoch=claim_epoch, cases=cases, lease_s=lease_s
        )
        await self._call(self._stub.ReportCases, request)

    async def finish_run(
        self,
        run_id: str,
        claim_epoch: int,
        *,
        summary_json: str = "",
        error: evaluations_pb2.EvalError | None = None,
    ) -> evaluations_pb2.EvalRun:
        """End a run, well unless `error` is given. Raises eval_claim_lost."""
        request = evaluations_pb2.FinishRunRequest(
            run_id=run_id, claim_epoch=claim_epoch, summary_json=summary_json, error=error
        )
        return await self._call(self._stub.FinishRun, request)

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "registry", RegistryUnavailable) from error
