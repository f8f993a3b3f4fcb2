"""Adapters: list, attach, detach, roll back, delete, upload, download."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_common.adapter_names import check_adapter_name, parse_reference
from kiln_common.errors import AdapterNotFound, IdempotencyConflict, InvalidValue, KilnError
from kiln_common.pb import registry_pb2
from kiln_gateway.adapters.adapter_view import adapter_object, version_object
from kiln_gateway.adapters.archive import pack_adapter
from kiln_gateway.adapters.publish_key import publish_key
from kiln_gateway.adapters.upload import receive_upload
from kiln_gateway.auth import Caller, require, require_scope
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query
from kiln_gateway.schemas.adapters import AttachBody, EmptyBody, RollbackBody

router = APIRouter()
_READ = Depends(require(None))
_TRAIN = Depends(require("train"))
_ADMIN = Depends(require("admin"))


@router.get("/v1/adapters", dependencies=[_READ])
async def list_adapters(request: Request) -> Response:
    """Every name with its versions."""
    gateway = gateway_of(request)
    adapters, resident_on = await asyncio.gather(gateway.clients.registry.list(), _residents(gateway))
    return json_response(
        {"object": "list", "data": [adapter_object(adapter, resident_on) for adapter in adapters]}
    )


@router.get("/v1/adapters/{name}", dependencies=[_READ])
async def get_adapter(request: Request, name: str) -> Response:
    """One name with its versions."""
    gateway = gateway_of(request)
    adapter, resident_on = await asyncio.gather(gateway.clients.registry.get(name), _residents(gateway))
    return json_response(adapter_object(adapter, resident_on))


@router.post("/v1/adapters/{name}/attach", dependencies=[_ADMIN])
async def attach_adapter(request: Request, name: str) -> Response:
    """Make a version the default that answers for the base model's id; the latest unless one is named."""
    gateway = gateway_of(request)
    body = await gateway.parse_optional(request, AttachBody)
    base_model = await gateway.engines.base_model()
    if body.version is None:
        found = await gateway.resolver.version(name, base_model.model_hash, "name")
    else:
        found = await _certain_version(gateway, name, body.version, base_model.model_hash)
    attached = await gateway.clients.registry.set_default(f"{found.name}@{found.version}")
    return json_response({"attached": version_object(attached) if attached is not None else None})


@router.post("/v1/adapters/detach", dependencies=[_ADMIN])
async def detach_adapter(request: Request) -> Response:
    """Let the bare base model answer for the base model's id again."""
    gateway = gateway_of(request)
    await gateway.parse_optional(request, EmptyBody)
    await gateway.clients.registry.set_default("")
    return json_response({"attached": None})


@router.post("/v1/adapters/{name}/rollback")
async def roll_back_adapter(request: Request, name: str, caller: Caller = _TRAIN) -> Response:
    """Let a name mean an earlier version again from the next request on, and the default with it.

    The next version that is trained or uploaded counts again.
    """
    gateway = gateway_of(request)
    body = await gateway.parse(request, RollbackBody)
    base_model = await gateway.engines.base_model()
    found = await _certain_version(gateway, name, body.version, base_model.model_hash)
    rolled_back = await gateway.clients.registry.roll_back(
        found.name, found.version, may_move_default="admin" in caller.scopes
    )
    return json_response(
        {
            "object": "adapter.rollback",
            "version": version_object(rolled_back.version),
            "default_moved": rolled_back.has_moved_default,
        }
    )


@router.delete("/v1/adapters/{reference}", dependencies=[_ADMIN])
async def delete_adapter(request: Request, reference: str) -> Response:
    """Delete a name with all its versions, or one version of it; 409 while it is attached."""
    wanted = parse_reference(reference)
    num_deleted = await gateway_of(request).clients.registry.delete(wanted.name, wanted.version or 0)
    return json_response({"id": reference, "object": "adapter", "deleted": True, "versions": num_deleted})


@router.get("/v1/adapters/{name}/download", dependencies=[_READ, Depends(refuse_unknown_query)])
async def download_adapter(
    request: Request, name: str, version: Annotated[int | None, Query(ge=1)] = None
) -> Response:
    """A version's PEFT folder as tar.gz; the latest unless one is named."""
    registry = gateway_of(request).clients.registry
    found = await registry.resolve(name if version is None else f"{name}@{version}")
    safetensors = await registry.fetch(found.sha256)
    folder_name = f"{found.name}-{found.version}"
    packed = await asyncio.to_thread(pack_adapter, found.config_json, safetensors, folder_name)
    headers = {"Content-Disposition": f'attachment; filename="{folder_name}.tar.gz"'}
    return Response(packed, media_type="application/gzip", headers=headers)


@router.post("/v1/adapters/upload", status_code=201)
async def upload_adapter(request: Request, caller: Caller = _TRAIN) -> Response:
    """Publish a PEFT adapter as a new version of a name; the registry checks it against the base model."""
    gateway = gateway_of(request)
    key = request.headers.get("idempotency-key", "")
    if len(key) > 128:
        raise InvalidValue("the Idempotency-Key has more than 128 characters", param="Idempotency-Key")
    base_model = await gateway.engines.base_model()
    with tempfile.TemporaryDirectory(prefix="kiln-upload-") as folder:
        upload = await receive_upload(request, Path(folder), gateway.settings.max_upload_bytes)
        check_adapter_name(upload.name, reserved=await gateway.base_ids(), param="name")
        if upload.attach:
            require_scope(caller, "admin")
        sha256 = await asyncio.to_thread(_file_sha256, upload.safetensors_path)
        header = registry_pb2.PublishHeader(
            name=upload.name,
            base_model_hash=base_model.model_hash,
            config_json=upload.config_json,
            publish_key=publish_key("upload", caller.owner, key),
            attach=upload.attach,
            sha256=sha256,
        )
        version = await gateway.clients.registry.publish(header, upload.safetensors_path)
    if (version.name, version.source_sha256 or version.sha256) != (upload.name, sha256):
        raise IdempotencyConflict(
            f"the Idempotency-Key {key!r} was used for {version.name}@{version.version}"
        )
    return json_response(version_object(version), status=201)


async def _certain_version(
    gateway: Gateway, name: str, version: int, model_hash: str
) -> registry_pb2.AdapterVersion:
    """Raises AdapterNotFound, AdapterMismatch: `param` is the one at fault of name and version."""
    try:
        return await gateway.resolver.version(f"{name}@{version}", model_hash, "version")
    except AdapterNotFound as error:
        if all(adapter.name != name for adapter in await gateway.clients.registry.list()):
            error.param = "name"
        raise


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _residents(gateway: Gateway) -> dict[str, list[str]]:
    """Boot ids of the engines that hold each version now, by "name@version"."""
    residents: dict[str, list[str]] = {}
    for seat in gateway.engines.seats:
        if not seat.is_answering or seat.info is None:
            continue
        try:
            stats = await asyncio.wait_for(seat.client.get_stats(), 2.0)
        except (KilnError, TimeoutError):
            continue
        for resident in stats.resident_adapters:
            name = f"{resident.adapter.name}@{resident.adapter.version}"
            residents.setdefault(name, []).append(seat.info.boot_id)
    return residents
