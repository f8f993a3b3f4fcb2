"""Evaluation RPCs; database work runs on threads."""

from __future__ import annotations

import asyncio
import time

import grpc
import structlog

from kiln_common.pb import evaluations_pb2 as pb
from kiln_common.pb import evaluations_pb2_grpc
from kiln_registry.evaluations.store import EvaluationStore

log = structlog.get_logger()


class EvaluationServicer(evaluations_pb2_grpc.EvaluationsServicer):
    """Serves one store."""

    def __init__(self, store: EvaluationStore) -> None:
        self._store = store

    async def PutSuite(self, request: pb.PutSuiteRequest, context: grpc.aio.ServicerContext) -> pb.EvalSuite:
        suite = await asyncio.to_thread(self._store.put_suite, request, time.time())
        log.info("eval_suite_kept", suite=f"{suite.name}@{suite.version}", num_cases=suite.num_cases)
        return suite

    async def GetSuite(self, request: pb.GetSuiteRequest, context: grpc.aio.ServicerContext) -> pb.EvalSuite:
        return await asyncio.to_thread(
            self._store.get_suite, request.owner, request.reference, with_content=request.with_content
        )

    async def ListSuites(
        self, request: pb.ListSuitesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListSuitesResponse:
        return pb.ListSuitesResponse(suites=await asyncio.to_thread(self._store.list_suites, request.owner))

    async def SubmitRun(self, request: pb.SubmitRunRequest, context: grpc.aio.ServicerContext) -> pb.EvalRun:
        run = await asyncio.to_thread(self._store.submit_run, request, time.time())
        log.info("eval_run_accepted", run_id=run.id, adapter=run.adapter, job_id=run.job_id or None)
        return run

    async def GetRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.EvalRun:
        return await asyncio.to_thread(
            self._store.get_run, request.id, request.owner, with_cases=request.with_cases
        )

    async def ListRuns(
        self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListRunsResponse:
        return pb.ListRunsResponse(runs=await asyncio.to_thread(self._store.list_runs, request))

    async def DeleteRun(
        self, request: pb.DeleteRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteRunResponse:
        await asyncio.to_thread(self._store.delete_run, request.id, request.owner)
        log.info("eval_run_deleted", run_id=request.id)
        return pb.DeleteRunResponse()

    async def ClaimRun(
        self, request: pb.ClaimRunRequest, context: grpc.aio.ServicerContext
    ) -> pb.ClaimRunResponse:
        run = await asyncio.to_thread(self._store.claim_run, request.lease_s, time.time())
        return pb.ClaimRunResponse(run=run)

    async def ReportCases(
        self, request: pb.ReportCasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReportCasesResponse:
        await asyncio.to_thread(self._store.report_cases, request, time.time())
        return pb.ReportCasesResponse()

    async def FinishRun(self, request: pb.FinishRunRequest, context: grpc.aio.ServicerContext) -> pb.EvalRun:
        run = await asyncio.to_thread(self._store.finish_run, request, time.time())
        log.info("eval_run_ended", run_id=run.id, status=run.status, code=run.error.code or None)
        return run
