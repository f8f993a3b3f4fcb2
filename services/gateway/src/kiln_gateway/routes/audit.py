"""GET /v1/audit: who did what to the adapters."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_gateway.auth import require
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query

router = APIRouter(dependencies=[Depends(require("admin")), Depends(refuse_unknown_query)])


@router.get("/v1/audit")
async def list_audit(
    request: Request,
    adapter: Annotated[str, Query(max_length=128)] = "",
    before: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """The newest entries first; `before` the id of the last one goes on with those before it."""
    registry = gateway_of(request).clients.registry
    entries = await registry.list_audit(name=adapter, before_id=before, limit=limit)
    shown = [
        {
            "id": entry.id,
            "object": "audit.entry",
            "at": entry.at_s,
            "actor": entry.actor or None,
            "action": entry.action,
            "adapter": entry.name or None,
            "version": entry.version or None,
            "detail": json.loads(entry.detail_json),
        }
        for entry in entries
    ]
    return json_response({"object": "list", "data": shown})
