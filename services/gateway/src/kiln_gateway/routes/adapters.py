"""Adapters: list, attach, detach, roll back, delete, upload, download."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from kiln_common.adapter_names import AdapterReference, check_adapter_name, parse_reference
from kiln_common.errors import AdapterNotFound, IdempotencyConflict, InvalidValue, KilnError
from kiln_common.pb import registry_pb2
from kiln_gateway.adapters.adapter_view import Resident, adapter_object, version_object
from kiln_gateway.adapters.archive import pack_adapter
from kiln_gateway.adapters.publish_key import publish_key
from kiln_gateway.adapters.upload import receive_upload
from kiln_gateway.adapters.visible_adapters import VisibleAdapters
from kiln_gateway.auth import Caller, require, require_scope
from kiln_gateway.errors import AdapterPinned
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.request_query import refuse_unknown_query
from kiln_gateway.schemas.adapters import AttachBody, EmptyBody, RollbackBody

router = APIRouter()
_READ = Depends(require(None))
_TRAIN = Depends(require("train"))
_ADMIN = Depends(require("admin"))


@router.get("/v1/adapters")
async def list_adapters(request: Request, caller: Caller = _READ) -> Response:
    """Every name with its versions."""
    gateway = gateway_of(request)
    adapters, resident_on = await asyncio.gather(_visible(gateway, caller).list(), _residents(gateway))
    return json_response(
        {"object": "list", "data": [adapter_object(adapter, resident_on) for adapter in adapters]}
    )


@router.get("/v1/adapters/{name}")
async def get_adapter(request: Request, name: str, caller: Caller = _READ) -> Response:
    """One name with its versions."""
    gateway = gateway_of(request)
    adapter, resident_on = await asyncio.gather(_visible(gateway, caller).get(name), _residents(gateway))
    return json_response(adapter_object(adapter, resident_on))


@router.post("/v1/adapters/{name}/attach")
async def attach_adapter(request: Request, name: str, caller: Caller = _ADMIN) -> Response:
    """Make a version the default that answers for the base model's id; the latest unless one is named."""
    gateway = gateway_of(request)
    body = await gateway.parse_optional(request, AttachBody)
    base_model = await gateway.engines.base_model()
    if body.version is None:
        found = await gateway.resolver.version(name, base_model.model_hash, "name", caller)
    else:
        found = await _certain_version(gateway, name, body.version, base_model.model_hash, caller)
    attached = await gateway.clients.registry.set_default(f"{found.name}@{found.version}", actor=caller.owner)
    return json_response({"attached": version_object(attached) if attached is not None else None})


@router.post("/v1/adapters/detach")
async def detach_adapter(request: Request, caller: Caller = _ADMIN) -> Response:
    """Let the bare base model answer for the base model's id again."""
    gateway = gateway_of(request)
    await gateway.parse_optional(request, EmptyBody)
    await gateway.clients.registry.set_default("", actor=caller.owner)
    return json_response({"attached": None})


@router.post("/v1/adapters/{name}/rollback")
async def roll_back_adapter(request: Request, name: str, caller: Caller = _TRAIN) -> Response:
    """Let a name mean an earlier version again from the next request on, and the default with it.

    The next version that is trained or uploaded counts again.
    """
    gateway = gateway_of(request)
    body = await gateway.parse(request, RollbackBody)
    base_model = await gateway.engines.base_model()
    found = await _certain_version(gateway, name, body.version, base_model.model_hash, caller)
    rolled_back = await gateway.clients.registry.roll_back(
        found.name, found.version, may_move_default="admin" in caller.scopes, actor=caller.owner
    )
    return json_response(
        {
            "object": "adapter.rollback",
            "version": version_object(rolled_back.version),
            "default_moved": rolled_back.has_moved_default,
        }
    )


@router.delete("/v1/adapters/{reference}")
async def delete_adapter(request: Request, reference: str, caller: Caller = _TRAIN) -> Response:
    """Delete a name with all its versions, or one version of it; 409 while it is attached or requests run on it."""
    gateway = gateway_of(request)
    wanted = parse_reference(reference)
    await _visible(gateway, caller).get(wanted.name)
    _refuse_pinned(await _residents(gateway), wanted)
    num_deleted = await gateway.clients.registry.delete(wanted.name, wanted.version or 0, actor=caller.owner)
    return json_response({"id": reference, "object": "adapter", "deleted": True, "versions": num_deleted})


@router.get("/v1/adapters/{name}/download", dependencies=[Depends(refuse_unknown_query)])
async def download_adapter(
    request: Request,
    name: str,
    version: Annotated[int | None, Query(ge=1)] = None,
    caller: Caller = _READ,
) -> Response:
    """A version's PEFT folder as tar.gz; the latest unless one is named."""
    gateway = gateway_of(request)
    reference = name if version is None else f"{name}@{version}"
    found = await _visible(gateway, caller).resolve(reference)
    safetensors = await gateway.clients.registry.fetch(found.sha256)
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
        await gateway.clients.registry.check_publish(upload.name, caller.owner)
        sha256 = await asyncio.to_thread(_file_sha256, upload.safetensors_path)
        header = registry_pb2.PublishHeader(
            name=upload.name,
            base_model_hash=base_model.model_hash,
            config_json=upload.config_json,
            publish_key=publish_key("upload", caller.owner, key),
            attach=upload.attach,
            sha256=sha256,
            owner=caller.owner,
        )
        version = await gateway.clients.registry.publish(header, upload.safetensors_path)
    if (version.name, version.source_sha256 or version.sha256) != (upload.name, sha256):
        raise IdempotencyConflict(
            f"the Idempotency-Key {key!r} was used for {version.name}@{version.version}"
        )
    return json_response(version_object(version), status=201)


async def _certain_version(
    gateway: Gateway, name: str, version: int, model_hash: str, caller: Caller
) -> registry_pb2.AdapterVersion:
    """Raises AdapterNotFound, AdapterMismatch: `param` is the one at fault of name and version."""
    try:
        return await gateway.resolver.version(f"{name}@{version}", model_hash, "version", caller)
    except AdapterNotFound as error:
        if all(adapter.name != name for adapter in await _visible(gateway, caller).list()):
            error.param = "name"
        raise


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _visible(gateway: Gateway, caller: Caller) -> VisibleAdapters:
    return VisibleAdapters(gateway.clients.registry, caller)


def _refuse_pinned(residents: Mapping[str, Sequence[Resident]], wanted: AdapterReference) -> None:
    """Raises AdapterPinned while requests run on a version that `wanted` means."""
    for label, holders in residents.items():
        is_meant = label == str(wanted) or (wanted.version is None and label.startswith(f"{wanted.name}@"))
        num_pins = sum(holder.num_pins for holder in holders)
        if is_meant and num_pins:
            raise AdapterPinned(label, num_pins)


async def _residents(gateway: Gateway) -> dict[str, list[Resident]]:
    """Who holds each version now, by "name@version"."""
    residents: dict[str, list[Resident]] = {}
    for seat in list(gateway.engines.seats):
        if not seat.is_answering or seat.info is None:
            continue
        try:
            stats = await asyncio.wait_for(seat.client.get_stats(), 2.0)
        except (KilnError, TimeoutError):
            continue
        for resident in stats.resident_adapters:
            name = f"{resident.adapter.name}@{resident.adapter.version}"
            residents.setdefault(name, []).append(Resident(seat.info.boot_id, resident.num_pins))
    return residents
