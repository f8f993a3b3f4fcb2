"""Training jobs: listed, read, watched, cancelled, done again."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_common.adapter_names import check_adapter_name
from kiln_common.errors import RegistryUnavailable
from kiln_gateway import sse
from kiln_gateway.auth import Caller, require
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.ports import closing
from kiln_gateway.request_query import refuse_unknown_query
from kiln_gateway.schemas.training import CancelBody, RetryBody
from kiln_gateway.training.gate import resolved_gate
from kiln_gateway.training.job_rights import visible_job
from kiln_gateway.training.job_view import event_object, job_object
from kiln_gateway.training.receipt import receipt
from kiln_gateway.training.retry import retry_request

router = APIRouter(prefix="/v1/train/jobs")
_TRAIN = Depends(require("train"))
_KEEPALIVE_S = 15.0
_ACCEPTED = 202

JobStatus = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@router.get("", dependencies=[Depends(refuse_unknown_query)])
async def list_jobs(
    request: Request,
    limit: int = Query(100, ge=1, le=1000),
    status: list[JobStatus] = Query([]),
    caller: Caller = _TRAIN,
) -> Response:
    """The newest jobs first; `status` may be given several times."""
    owner = None if "admin" in caller.scopes else caller.owner
    jobs = await gateway_of(request).clients.trainer.list(limit, status, owner)
    return json_response({"object": "list", "data": [job_object(job) for job in jobs]})


@router.get("/{job_id}")
async def get_job(request: Request, job_id: str, caller: Caller = _TRAIN) -> Response:
    """One job: status, progress, metrics, history, error or result."""
    return json_response(job_object(await visible_job(gateway_of(request).clients.trainer, job_id, caller)))


@router.post("/{job_id}/cancel")
async def cancel_job(request: Request, job_id: str, caller: Caller = _TRAIN) -> Response:
    """Cancel: at once while queued, at the next step boundary while running."""
    gateway = gateway_of(request)
    body = await gateway.parse_optional(request, CancelBody)
    await visible_job(gateway.clients.trainer, job_id, caller)
    job = await gateway.clients.trainer.cancel(job_id, discards=body.published == "discard")
    return json_response(job_object(job))


@router.get("/{job_id}/receipt")
async def job_receipt(request: Request, job_id: str, caller: Caller = _TRAIN) -> Response:
    """What an ended job was made of and what came out: enough to do it again and compare."""
    return json_response(receipt(await visible_job(gateway_of(request).clients.trainer, job_id, caller)))


@router.post("/{job_id}/retry", status_code=_ACCEPTED)
async def retry_job(request: Request, job_id: str, caller: Caller = _TRAIN) -> Response:
    """Do a job that has ended again as a new one: same data and starting version, settings as far as given."""
    gateway = gateway_of(request)
    body = await gateway.parse_optional(request, RetryBody)
    trainer = gateway.clients.trainer
    job = await visible_job(trainer, job_id, caller)
    key, made_id = await gateway.idempotency.find(request, caller.owner)
    if made_id:
        return json_response(job_object(await trainer.get(made_id)), status=_ACCEPTED)
    if body.adapter is not None:
        check_adapter_name(body.adapter, reserved=await gateway.base_ids())
    with contextlib.suppress(RegistryUnavailable):  # it refuses the result, too
        await gateway.clients.registry.check_publish(body.adapter or job.config.adapter, caller.owner)
    if body.base_adapter is not None:
        model_hash = (await gateway.engines.base_model()).model_hash
        await gateway.resolver.version(body.base_adapter, model_hash, "base_adapter", caller)
    gate = await resolved_gate(body.gate, caller.owner, gateway.clients.evaluations)
    again = await trainer.retry(retry_request(job, body, caller, key, gate))
    await gateway.idempotency.remember(request, key, again.id)
    return json_response(job_object(again), status=_ACCEPTED)


@router.get("/{job_id}/events")
async def job_events(request: Request, job_id: str, caller: Caller = _TRAIN) -> Response:
    """What happens to a job, as server-sent events; Last-Event-ID goes on where a stream broke off."""
    trainer = gateway_of(request).clients.trainer
    await visible_job(trainer, job_id, caller)  # an unknown job is a 404, not an empty stream
    after = request.headers.get("last-event-id", "")

    async def events() -> AsyncGenerator[bytes]:
        async with closing(trainer.watch(job_id, after)) as watched:
            async for event in watched:
                yield sse.frame(event_object(event), event=event.type, event_id=event.id)

    return await sse.stream(request, events(), keepalive_s=_KEEPALIVE_S)
