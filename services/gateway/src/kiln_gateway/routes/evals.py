"""Evaluation: suites, runs over adapter versions, and comparisons of two runs."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_common.pb import evaluations_pb2
from kiln_gateway.auth import Caller, require
from kiln_gateway.evals.report import comparison_object, run_object, suite_object
from kiln_gateway.evals.suite import parse_suite, to_jsonl
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query
from kiln_gateway.schemas.evals import CompareBody, RunBody, SuiteBody

router = APIRouter()
_TRAIN = Depends(require("train"))
_CREATED, _ACCEPTED = 201, 202
_MOST_LISTED = 500
_MOST_REFERENCE_CHARS = 160
RunStatus = Literal["queued", "running", "succeeded", "failed"]


@router.post("/v1/evals/suites", status_code=_CREATED)
async def put_suite(request: Request, caller: Caller = _TRAIN) -> Response:
    """Keep a suite as the next version of its name; the same cases again are the version they were."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, SuiteBody)
    content = body.jsonl if body.jsonl is not None else to_jsonl(body.cases or [])
    param = "jsonl" if body.jsonl is not None else "cases"
    cases = await asyncio.to_thread(parse_suite, content, param=param)
    suite = await gateway.clients.evaluations.put_suite(caller.owner, body.name, content, len(cases))
    return json_response(suite_object(suite), status=_CREATED)


@router.get("/v1/evals/suites")
async def list_suites(request: Request, caller: Caller = _TRAIN) -> Response:
    """The newest version of each suite."""
    suites = await gateway_of(request).clients.evaluations.list_suites(caller.owner)
    return json_response({"object": "list", "data": [suite_object(suite) for suite in suites]})


@router.post("/v1/evals/runs", status_code=_ACCEPTED)
async def start_run(request: Request, caller: Caller = _TRAIN) -> Response:
    """Answer a suite's cases with one adapter version, and score the answers."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, RunBody)
    store = gateway.clients.evaluations
    key, run_id = await gateway.idempotency.find(request, caller.owner)
    if run_id:
        return json_response(run_object(await store.get_run(run_id, caller.owner)), status=_ACCEPTED)
    suite = await store.get_suite(caller.owner, body.suite)
    target = await gateway.resolver.resolve(
        None,
        caller=caller,
        base_ids=await gateway.base_ids(),
        model_hash=(await gateway.engines.base_model()).model_hash,
        adapter=body.adapter,
        is_adapter_given=body.is_adapter_given,
    )
    run = await store.submit_run(
        evaluations_pb2.SubmitRunRequest(
            owner=caller.owner,
            suite_id=suite.id,
            adapter=target.label,
            settings_json=body.sampling.model_dump_json(),
            idempotency_key=key,
        )
    )
    await gateway.idempotency.remember(request, key, run.id)
    return json_response(run_object(run), status=_ACCEPTED)


@router.get("/v1/evals/runs", dependencies=[Depends(refuse_unknown_query)])
async def list_runs(
    request: Request,
    adapter: str | None = Query(
        None, max_length=_MOST_REFERENCE_CHARS, description='"name", "name@version" or "base"'
    ),
    status: RunStatus | None = Query(None),
    limit: int = Query(100, ge=1, le=_MOST_LISTED),
    caller: Caller = _TRAIN,
) -> Response:
    """The newest runs first, without their cases: all of them, or those on an adapter."""
    runs = await gateway_of(request).clients.evaluations.list_runs(
        caller.owner, (adapter,) if adapter else (), (status,) if status else (), limit
    )
    return json_response({"object": "list", "data": [run_object(run) for run in runs]})


@router.delete("/v1/evals/runs/{run_id}")
async def delete_run(request: Request, run_id: str, caller: Caller = _TRAIN) -> Response:
    """Forget a run and its cases; one that is not over ends, and a job's gate that waits for it is not passed."""
    await gateway_of(request).clients.evaluations.delete_run(run_id, caller.owner)
    return json_response({"id": run_id, "object": "eval.run", "deleted": True})


@router.get("/v1/evals/runs/{run_id}", dependencies=[Depends(refuse_unknown_query)])
async def get_run(
    request: Request, run_id: str, cases: bool = Query(False), caller: Caller = _TRAIN
) -> Response:
    """One run: status, progress, score with its interval; every case's answer with `cases=true`."""
    store = gateway_of(request).clients.evaluations
    run = await store.get_run(run_id, caller.owner, with_cases=cases)
    return json_response(run_object(run, has_cases=cases))


@router.post("/v1/evals/compare")
async def compare_runs(request: Request, caller: Caller = _TRAIN) -> Response:
    """Two finished runs over the same suite, case by case: the difference and how sure it is."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, CompareBody)
    baseline, candidate = [
        await gateway.clients.evaluations.get_run(run_id, caller.owner, with_cases=True)
        for run_id in (body.baseline, body.candidate)
    ]
    return json_response(await asyncio.to_thread(comparison_object, baseline, candidate))
