"""What is computed from adapters: how two versions differ, and several merged into one."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_common.adapter_names import check_adapter_name
from kiln_common.errors import AdapterNotFound, KilnError
from kiln_common.pb import registry_pb2
from kiln_gateway.adapters.adapter_view import version_object
from kiln_gateway.adapters.diff_view import BASE, diff_object
from kiln_gateway.adapters.publish_key import publish_key
from kiln_gateway.adapters.visible_adapters import VisibleAdapters
from kiln_gateway.auth import Caller, require
from kiln_gateway.gateway import gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query
from kiln_gateway.schemas.adapters import MergeBody

router = APIRouter()
_READ = Depends(require(None))
_TRAIN = Depends(require("train"))
_DEFAULT_DENSITY = 0.5
_CREATED = 201


@router.get("/v1/adapters/{name}/diff", dependencies=[Depends(refuse_unknown_query)])
async def diff_adapter(
    request: Request,
    name: str,
    earlier: Annotated[int | None, Query(alias="from", ge=1)] = None,
    later: Annotated[int | None, Query(alias="to", ge=1)] = None,
    caller: Caller = _READ,
) -> Response:
    """What changed from one version of a name to another: norms and cosines of the updates, metrics, scores.

    `to` is the latest version unless one is named, `from` its parent; one without a parent is compared
    with the bare base model.
    """
    clients = gateway_of(request).clients
    registry = clients.registry
    visible = VisibleAdapters(registry, caller)
    to = await visible.resolve(name if later is None else f"{name}@{later}")
    parent = await _parent(visible, to)
    start = f"{name}@{earlier}" if earlier is not None else parent
    label = f"{to.name}@{to.version}"
    found = await registry.compare(start, label)
    from_parent = found if parent else None
    if parent and start != parent:
        from_parent = await registry.compare(parent, label)
    runs = await clients.evaluations.list_runs(caller.owner, (start or BASE, label), ("succeeded",))
    return json_response(diff_object(found, from_parent, runs))


@router.post("/v1/adapters/merge", status_code=_CREATED)
async def merge_adapters(request: Request, caller: Caller = _TRAIN) -> Response:
    """Publish several adapters, merged into one, as a new version of `output`; the registry computes it."""
    gateway = gateway_of(request)
    body = await gateway.parse(request, MergeBody)
    key, made_before = await gateway.idempotency.find(request, caller.owner)
    registry = gateway.clients.registry
    if made_before:
        return json_response(version_object(await registry.resolve(made_before)), status=_CREATED)
    check_adapter_name(body.output, reserved=await gateway.base_ids(), param="output")
    model_hash = (await gateway.engines.base_model()).model_hash
    merge = registry_pb2.MergeRequest(
        mode=body.mode,
        output=body.output,
        density=body.density or _DEFAULT_DENSITY,
        publish_key=publish_key("merge", caller.owner, key),
        owner=caller.owner,
    )
    for source in body.sources:
        found = await gateway.resolver.version(source.name, model_hash, "sources", caller)
        merge.sources.add(name=found.name, version=found.version, weight=source.weight)
    merged = await registry.merge(merge)
    await gateway.idempotency.remember(request, key, f"{merged.name}@{merged.version}")
    return json_response(version_object(merged), status=_CREATED)


async def _parent(visible: VisibleAdapters, version: registry_pb2.AdapterVersion) -> str:
    """The version's parent as a reference; "" where it has none, or none that the caller sees."""
    if not version.parent_version:
        return ""
    try:
        parent = await visible.resolve(f"{version.parent_name}@{version.parent_version}")
    except KilnError as error:
        if error.code != AdapterNotFound.code:
            raise
        return ""
    return f"{parent.name}@{parent.version}"
