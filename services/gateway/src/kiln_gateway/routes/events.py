"""GET /v1/events: everything the dashboard shows, as one stream."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Iterable
from pathlib import Path
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.errors import KilnError
from kiln_gateway import sse
from kiln_gateway.adapters.adapter_view import adapter_object
from kiln_gateway.adapters.visible_adapters import is_visible, visible_engines
from kiln_gateway.auth import Caller, require
from kiln_gateway.gateway import Gateway, gateway_of
from kiln_gateway.insight.feed import Feed, Snapshot
from kiln_gateway.insight.log_tail import LogTail
from kiln_gateway.ports import closing
from kiln_gateway.training import job_rights
from kiln_gateway.training.job_view import job_object

router = APIRouter()
_ANY_KEY = Depends(require(None))
_KEEPALIVE_S = 15.0


@router.get("/v1/events")
async def events(request: Request, caller: Caller = _ANY_KEY) -> Response:
    """How everything stands, as server-sent events: samples every second, and what changed."""
    return await sse.stream(
        request, _frames(gateway_of(request), request.app.state.feed, caller), keepalive_s=_KEEPALIVE_S
    )


async def _frames(gateway: Gateway, feed: Feed, caller: Caller) -> AsyncGenerator[bytes]:
    changes = _Changes()
    logs = _log_tail(gateway, caller)
    yield sse.frame(await _hello(gateway, caller, feed, has_logs=logs is not None), event="hello")
    owner = None if "admin" in caller.scopes else caller.owner
    async with closing(feed.watch(owner)) as snapshots:
        async for snapshot in snapshots:
            for name, body in _parts(snapshot, caller, changes):
                yield sse.frame(body, event=name)
            if logs is not None and (lines := await asyncio.to_thread(logs.read)):
                yield sse.frame(lines, event="logs")


def _parts(snapshot: Snapshot, caller: Caller, changes: _Changes) -> Iterable[tuple[str, Any]]:
    """The events of one snapshot, as far as they are the caller's; only what is new."""
    yield "sample", snapshot.sample
    requests = _requests(snapshot, caller)
    if changes.is_new("requests", requests):
        yield "requests", requests
    status = _status(snapshot, caller)
    if changes.is_new("status", status):
        yield "status", status
    adapters = _adapters(snapshot, caller)
    if adapters is not None and changes.is_new("adapters", adapters):
        yield "adapters", adapters
    if snapshot.jobs is not None and "train" in caller.scopes:
        jobs = [job_object(job) for job in snapshot.jobs if job_rights.is_visible(job, caller)]
        new_jobs = [job for job in jobs if changes.is_new(job["id"], job)]
        if new_jobs:
            yield "jobs", new_jobs


def _requests(snapshot: Snapshot, caller: Caller) -> dict[str, list[dict[str, Any]]]:
    is_admin = "admin" in caller.scopes
    return {
        state: [view for owner, view in requests if is_admin or owner == caller.owner]
        for state, requests in snapshot.requests.items()
    }


def _status(snapshot: Snapshot, caller: Caller) -> dict[str, Any]:
    training = snapshot.status["training"]
    if training is not None and "admin" not in caller.scopes:
        visible = {job.id for job in snapshot.jobs or () if job_rights.is_visible(job, caller)}
        running = training["running_job_id"]
        training = {**training, "running_job_id": running if running in visible else None}
    engines = visible_engines(snapshot.status["engines"], snapshot.adapters, caller)
    return {"engines": engines, "training": training}


def _adapters(snapshot: Snapshot, caller: Caller) -> list[dict[str, Any]] | None:
    if snapshot.adapters is None:
        return None
    visible = [adapter for adapter in snapshot.adapters if is_visible(adapter.owner, caller)]
    adapters = [adapter_object(adapter, {}) for adapter in visible]
    for version in (version for adapter in adapters for version in adapter["versions"]):
        version["resident_on"] = snapshot.resident_on.get(version["id"], [])
    return adapters


class _Changes:
    """Remembers what a stream was sent last, by name."""

    def __init__(self) -> None:
        self._sent: dict[str, bytes] = {}

    def is_new(self, name: str, body: Any) -> bool:
        digest = hashlib.sha256(orjson.dumps(body)).digest()
        is_new = self._sent.get(name) != digest
        self._sent[name] = digest
        return is_new


def _log_tail(gateway: Gateway, caller: Caller) -> LogTail | None:
    folder = gateway.settings.log_dir
    return LogTail(Path(folder)) if folder and "admin" in caller.scopes else None


async def _hello(gateway: Gateway, caller: Caller, feed: Feed, *, has_logs: bool) -> dict[str, Any]:
    try:
        model = await gateway.served_model_id()
    except KilnError:
        model = gateway.settings.served_model_name
    return {
        "model": model or None,
        "scopes": sorted(caller.scopes),
        "has_logs": has_logs,
        "history": list(feed.history),
    }
