"""Whether the gateway and what it needs are well: /healthz, /readyz, /health, /v1/stats, /metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.errors import KilnError
from kiln_common.pb import engine_pb2, registry_pb2, trainer_pb2
from kiln_common.service_names import service_name
from kiln_gateway.adapters.visible_adapters import visible_engines
from kiln_gateway.auth import Caller, require
from kiln_gateway.engine_pool import PROBE_TIMEOUT_S
from kiln_gateway.engine_seat import EngineSeat
from kiln_gateway.gateway import Gateway, answers, gateway_of
from kiln_gateway.json_response import json_response
from kiln_gateway.trainer_pool import STATUS_TIMEOUT_S
from kiln_gateway.training.job_rights import visible_running_job

router = APIRouter()
_ANY_KEY = Depends(require(None))
# More than any one engine or trainer is given: those that hang must not speak for those that answer.
_CHECK_TIMEOUT_S = max(PROBE_TIMEOUT_S, STATUS_TIMEOUT_S) + 0.5
# Fields of EngineStats as clients name them, where that differs from dropping "num_".
_STAT_NAMES = {
    "num_prompt_tokens": "prompt_tokens_total",
    "num_generated_tokens": "generated_tokens_total",
    "num_cached_tokens": "cached_tokens_total",
    "num_steps": "steps_total",
    "num_preemptions": "preemptions_total",
    "num_tokens_lost_for_want_of_checkpoint": "tokens_lost_for_want_of_checkpoint_total",
    "num_pages": "pages_total",
    "num_state_slots": "state_slots_total",
}
_OF_THE_DEVICE = ("device_bytes", "device_bytes_free")
_PART_NAMES = {"states": "state", "adapters": "adapter"}


@router.get("/healthz")
async def healthz() -> Response:
    """The process is alive."""
    return json_response({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 when inference can be served; what else is missing is named as degraded."""
    gateway = gateway_of(request)
    states = await _dependency_states(gateway)
    # The bare base model needs the engine alone.
    is_ready = states["engine"]
    body = {
        "status": "ready" if is_ready else "not_ready",
        "dependencies": {name: "ok" if is_ok else "degraded" for name, is_ok in states.items()},
    }
    headers = {} if is_ready else {"Retry-After": "1"}
    return json_response(body, status=200 if is_ready else 503, headers=headers)


@router.get("/health")
async def health(request: Request, caller: Caller = _ANY_KEY) -> Response:
    """The whole picture in one answer; 503 when inference cannot be served."""
    gateway = gateway_of(request)
    states, stats = await asyncio.gather(_dependency_states(gateway), engine_stats(gateway))
    try:
        model = await gateway.served_model_id() if states["engine"] else gateway.settings.served_model_name
    except KilnError:
        model = gateway.settings.served_model_name
    adapters = await _adapters(gateway)
    engines = [engine_object(seat, found) for seat, found in stats]
    body = {
        "status": ("ok" if all(states.values()) else "degraded") if states["engine"] else "unavailable",
        "uptime_s": round(time.monotonic() - gateway.started_at, 3),
        "model": model or None,
        "dependencies": {name: "ok" if is_ok else "degraded" for name, is_ok in states.items()},
        "engines": visible_engines(engines, adapters, caller),
        "training": await _visible_training(gateway, caller),
        "adapters": _adapters_object(gateway, adapters),
    }
    return json_response(body, status=200 if states["engine"] else 503)


@router.get("/v1/stats")
async def stats(request: Request, caller: Caller = _ANY_KEY) -> Response:
    """Counters and gauges as JSON; `engine` adds up all engines, and counts a device they share once."""
    gateway = gateway_of(request)
    found = await engine_stats(gateway)
    training = await _visible_training(gateway, caller)
    engines = [stats_object(stats) for _, stats in found]
    return json_response({"engine": engine_totals(found), "engines": engines, "training": training})


@router.get("/metrics", dependencies=[_ANY_KEY])
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    gateway = gateway_of(request)
    engines, trainers = await asyncio.gather(engine_stats(gateway), gateway.clients.trainer.statuses())
    gateway.metrics.services.show(
        {seat.name: found for seat, found in engines},
        {service_name("trainer", number): found for number, found in enumerate(trainers)},
    )
    return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _dependency_states(gateway: Gateway) -> dict[str, bool]:
    return await answers(
        {
            "engine": _any_engine(gateway),
            "registry": _succeeds(gateway.clients.registry.get_default()),
            "trainer": _any_trainer(gateway),
            "redis": gateway.rollouts.is_reachable(),
        },
        _CHECK_TIMEOUT_S,
    )


async def _any_engine(gateway: Gateway) -> bool:
    await gateway.engines.probe()
    return any(seat.is_answering for seat in gateway.engines.seats)


async def _any_trainer(gateway: Gateway) -> bool:
    return any(status is not None for status in await gateway.clients.trainer.statuses())


async def _succeeds(call: Any) -> bool:
    await call
    return True


async def engine_stats(gateway: Gateway) -> list[tuple[EngineSeat, engine_pb2.EngineStats | None]]:
    """What every engine says of itself, in their order; None for one that does not answer."""

    async def one(seat: EngineSeat) -> tuple[EngineSeat, engine_pb2.EngineStats | None]:
        try:
            return seat, await asyncio.wait_for(seat.client.get_stats(), _CHECK_TIMEOUT_S)
        except (KilnError, TimeoutError):
            return seat, None

    return await asyncio.gather(*map(one, gateway.engines.seats))


def stats_object(stats: engine_pb2.EngineStats | None) -> dict[str, float]:
    """Numbers by name; empty for an engine that does not answer."""
    if stats is None:
        return {}
    return {
        _STAT_NAMES.get(field.name, field.name.removeprefix("num_")): getattr(stats, field.name)
        for field in stats.DESCRIPTOR.fields
        if isinstance(getattr(stats, field.name), int | float)
    }


def engine_totals(found: Sequence[tuple[EngineSeat, engine_pb2.EngineStats | None]]) -> dict[str, float]:
    """The numbers of all engines added up; those of a device once, however many engines are on it."""
    total: dict[str, float] = {}
    devices = set[str]()
    for seat, stats in found:
        device_id = seat.info.device_id if seat.info is not None else ""
        is_counted = device_id in devices
        if stats is not None and device_id:
            devices.add(device_id)
        for name, value in stats_object(stats).items():
            if not (is_counted and name in _OF_THE_DEVICE):
                total[name] = total.get(name, 0) + value
    return total


def engine_object(seat: EngineSeat, stats: engine_pb2.EngineStats | None) -> dict[str, Any]:
    """One engine: `id` is its name: in logs and pids of `kiln up`, in the metrics and in the gateway's log."""
    info = seat.info
    body: dict[str, Any] = {"id": seat.name, "address": seat.address, "status": _state(stats)}
    if info is not None:
        body |= {
            "boot_id": info.boot_id,
            "device": info.device,
            "device_id": info.device_id,
            "dtype": info.dtype,
            "max_model_len": info.base_model.max_model_len,
            "model_hash": info.base_model.model_hash,
            "max_running": info.max_running,
            "num_adapter_slots": info.num_adapter_slots,
        }
    if stats is not None:
        body["memory"] = _memory_object(stats)
        body["scheduler"] = stats_object(stats)
        body["resident_adapters"] = [
            f"{resident.adapter.name}@{resident.adapter.version}" for resident in stats.resident_adapters
        ]
    return body


def _state(stats: engine_pb2.EngineStats | None) -> str:
    if stats is None:
        return "unavailable"
    return "draining" if stats.is_draining else "ok"


def _memory_object(stats: engine_pb2.EngineStats) -> dict[str, int]:
    """Bytes by what holds them, and of the whole device."""
    sizes = {f"{_PART_NAMES.get(part.name, part.name)}_bytes": part.num_bytes for part in stats.memory_parts}
    return {**sizes, "device_bytes": stats.num_device_bytes}


async def training_object(gateway: Gateway) -> dict[str, Any] | None:
    """What the trainers do; None when none answers."""
    found = [status for status in await gateway.clients.trainer.statuses() if status is not None]
    return training_summary(found) if found else None


def training_summary(found: Sequence[trainer_pb2.TrainerStatus]) -> dict[str, Any]:
    """One that works, if any does, stands for all; what they hold is added up. `trainers` has each."""
    status = next((status for status in found if status.running_job_id), found[0])
    return {
        "trainer_id": status.trainer_id,
        "running_job_id": status.running_job_id or None,
        "queued": status.num_queued,
        "engine_boot_id": status.engine_boot_id or None,
        "borrowed_bytes": sum(each.num_borrowed_bytes for each in found),
        "allocated_base_bytes": sum(each.num_allocated_base_bytes for each in found),
        "gpu_sharing": status.gpu_sharing or None,
        "gpu_share": status.gpu_share,
        "gpu_sms": status.gpu_sms,
        "device_bytes": sum(each.num_device_bytes for each in found),
        "trainers": [
            {
                "trainer_id": each.trainer_id,
                "status": "running" if each.running_job_id else "idle",
                "engine_boot_id": each.engine_boot_id or None,
                "gpu_sharing": each.gpu_sharing or None,
                "gpu_share": each.gpu_share,
                "gpu_sms": each.gpu_sms,
            }
            for each in found
        ],
    }


async def _visible_training(gateway: Gateway, caller: Caller) -> dict[str, Any] | None:
    training = await training_object(gateway)
    if training is not None:
        running = training["running_job_id"] or ""
        training["running_job_id"] = await visible_running_job(gateway.clients.trainer, running, caller)
    return training


async def _adapters(gateway: Gateway) -> list[registry_pb2.Adapter] | None:
    try:
        return await gateway.clients.registry.list()
    except KilnError:
        return None


def _adapters_object(gateway: Gateway, adapters: list[registry_pb2.Adapter] | None) -> dict[str, Any] | None:
    if adapters is None:
        return None
    attached = next((v for a in adapters for v in a.versions if v.version == a.attached_version), None)
    hashes = {seat.info.base_model.model_hash for seat in gateway.engines.seats if seat.info is not None}
    return {
        "count": len(adapters),
        "attached": f"{attached.name}@{attached.version}" if attached is not None else None,
        # Made for another base model than the served one: requests are answered without it.
        "is_attached_ignored": attached is not None
        and bool(hashes)
        and attached.base_model_hash not in hashes,
    }
