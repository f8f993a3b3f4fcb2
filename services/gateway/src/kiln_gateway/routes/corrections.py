"""Corrections: kept by completion id, listed, deleted; POST /v1/train/sft learns them."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_gateway.auth import Caller, require
from kiln_gateway.corrections import MAX_AT_ONCE, Correction, correct
from kiln_gateway.errors import RolloutNotFound
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query
from kiln_gateway.schemas.corrections import CorrectionBody

router = APIRouter(prefix="/v1/corrections")
_TRAIN = Depends(require("train"))
_CREATED = 201


def correction_object(correction: Correction) -> dict[str, Any]:
    return {
        "id": correction.id,
        "object": "correction",
        "completion_id": correction.completion_id,
        "index": correction.index,
        "answer": correction.answer,
        "correction": correction.correction,
        "status": correction.status,
        "job": correction.used_by or correction.reserved_by or None,
        "created_at": correction.created_at_s,
    }


@router.post("", status_code=_CREATED)
async def add_correction(request: Request, caller: Caller = _TRAIN) -> Response:
    """Keep what the answer of a kept completion should have been."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, CorrectionBody)
    key, made_id = await gateway.idempotency.find(request, caller.owner)
    if made_id:
        made = await gateway.corrections.get(made_id, caller.owner)
        return json_response(correction_object(made), status=_CREATED)
    rollout = await gateway.rollouts.find(body.completion_id, body.index, caller.owner)
    if rollout is None:
        raise RolloutNotFound(
            f"there is no rollout {body.completion_id!r} with index {body.index}", param="completion_id"
        )
    correction = await asyncio.to_thread(correct, rollout, body.correction, gateway.tokenizer)
    await gateway.corrections.add(correction)
    await gateway.idempotency.remember(request, key, correction.id)
    return json_response(correction_object(correction), status=_CREATED)


@router.get("", dependencies=[Depends(refuse_unknown_query)])
async def list_corrections(
    request: Request,
    status: Literal["unused", "reserved", "used"] | None = Query(None),
    limit: int = Query(100, ge=1, le=MAX_AT_ONCE),
    caller: Caller = _TRAIN,
) -> Response:
    """The newest corrections first: unused, reserved by a job that is learning them, or used by one."""
    found = await gateway_of(request).corrections.newest(caller.owner, status, limit)
    return json_response({"object": "list", "data": [correction_object(each) for each in found]})


@router.delete("/{correction_id}")
async def delete_correction(request: Request, correction_id: str, caller: Caller = _TRAIN) -> Response:
    """Forget a correction; a job that is learning it goes on."""
    corrections = gateway_of(request).corrections
    await corrections.delete(await corrections.get(correction_id, caller.owner))
    return json_response({"id": correction_id, "object": "correction", "deleted": True})
