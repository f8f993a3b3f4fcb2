"""GET /v1/models: the base model first, then every adapter and each of its versions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.errors import KilnError
from kiln_common.pb import registry_pb2
from kiln_gateway.adapters.visible_adapters import VisibleAdapters
from kiln_gateway.auth import Caller, require
from kiln_gateway.errors import ModelNotFound
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response

router = APIRouter()
_INFER = Depends(require("infer"))


@router.get("/v1/models")
async def list_models(request: Request, caller: Caller = _INFER) -> Response:
    """Names that requests may put in `model`."""
    gateway = gateway_of(request)
    base = await _base_entry(gateway)
    model_hash = (await gateway.engines.base_model()).model_hash
    entries = [base]
    for adapter in await VisibleAdapters(gateway.clients.registry, caller).list():
        entries += _adapter_entries(adapter, base["id"], model_hash)
    return json_response({"object": "list", "data": entries})


@router.get("/v1/models/{model:path}")
async def get_model(request: Request, model: str, caller: Caller = _INFER) -> Response:
    """One of them."""
    gateway = gateway_of(request)
    base = await _base_entry(gateway)
    model_hash = (await gateway.engines.base_model()).model_hash
    if model in await gateway.base_ids() or model == "base":
        return json_response(base)
    try:
        adapter = await VisibleAdapters(gateway.clients.registry, caller).get(model.partition("@")[0])
    except KilnError as error:
        if error.kind.http_status < 500:
            raise ModelNotFound(model) from error
        raise
    for entry in _adapter_entries(adapter, base["id"], model_hash):
        if entry["id"] == model:
            return json_response(entry)
    raise ModelNotFound(model)


async def _base_entry(gateway: Gateway) -> dict[str, Any]:
    base_model = await gateway.engines.base_model()
    return {
        "id": await gateway.served_model_id(),
        "object": "model",
        "created": 0,
        "owned_by": "kiln",
        "root": base_model.model_id,
        "parent": None,
        "max_model_len": base_model.max_model_len,
    }


def _adapter_entries(adapter: registry_pb2.Adapter, base_id: str, model_hash: str) -> list[dict[str, Any]]:
    """The name (its latest version), then "name@version" for each; those for the served model only."""
    versions = {
        version.version: version for version in adapter.versions if version.base_model_hash == model_hash
    }
    latest = versions.get(adapter.latest_version)
    named = [(adapter.name, latest)] if latest is not None else []
    named += [(f"{adapter.name}@{number}", version) for number, version in versions.items()]
    return [
        {
            "id": model_id,
            "object": "model",
            "created": int(version.created_at_s),
            "owned_by": "kiln",
            "root": adapter.name,
            "parent": base_id,
            "version": version.version,
        }
        for model_id, version in named
    ]
