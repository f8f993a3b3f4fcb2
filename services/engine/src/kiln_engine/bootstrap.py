"""Where the engine's parts meet."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from kiln_common.clients.registry import RegistryClient
from kiln_common.ending import end_tasks
from kiln_common.errors import KilnError
from kiln_common.pb import engine_pb2, engine_pb2_grpc
from kiln_common.rpc import RpcServer
from kiln_common.rpc.client_listener import client_server
from kiln_engine.adapters.events import AdapterEvents
from kiln_engine.adapters.handover import Inbox, serve_handovers
from kiln_engine.adapters.holds import AdapterHolds
from kiln_engine.adapters.manager import AdapterManager
from kiln_engine.adapters.publications import Publications
from kiln_engine.adapters.refresh import AdapterRefresh
from kiln_engine.adapters.slots import AdapterSlots
from kiln_engine.clock import MonotonicClock
from kiln_engine.domain.batch_sizes import decode_ladder
from kiln_engine.domain.device_memory import DeviceMemory
from kiln_engine.domain.ports import AdapterStore, BaseWeights, GrammarCompiler, Runner
from kiln_engine.loop import EngineLoop
from kiln_engine.presence import Presence, advertised_address
from kiln_engine.scheduling import Scheduler, SchedulerLimits
from kiln_engine.servicer.intake import RequestIntake
from kiln_engine.servicer.servicer import CLIENT_SCOPES, EngineServicer
from kiln_engine.servicer.stats import EngineFigures
from kiln_engine.servicer.validation import RequestLimits
from kiln_engine.settings import EngineSettings
from kiln_engine.speculation.speculator import DraftSpeculator

log = structlog.get_logger()

_STOP_GRACE_S = 0.5
_ANNOUNCE_RETRY_S = 1.0
_ANNOUNCE_AGAIN_S = 30.0


class ClosableWeights(BaseWeights, Protocol):
    def close(self) -> None:
        """End every lease."""
        ...


@dataclass(frozen=True)
class EngineParts:
    """What stands on the device: `load_device_side` makes it, tests bring their own."""

    runner: Runner
    adapter_store: AdapterStore
    weights: ClosableWeights
    limits: SchedulerLimits
    info: engine_pb2.EngineInfo
    inbox: Inbox | None = None
    # None where the model folder has no tokenizer: requests with grammars are refused.
    grammars: GrammarCompiler | None = None
    memory: DeviceMemory = field(default_factory=DeviceMemory)


@dataclass
class RunningEngine:
    """An engine that serves; stop it once. `has_failed` is set when it must be started again."""

    server: RpcServer
    client_server: RpcServer | None
    loop: EngineLoop
    intake: RequestIntake
    adapters: AdapterManager
    weights: ClosableWeights
    inbox: Inbox | None
    grammars: GrammarCompiler | None
    registry: RegistryClient | None
    background: list[asyncio.Task[None]]
    has_failed: asyncio.Event
    drain_timeout_s: float

    async def stop(self) -> None:
        """Let running requests end within `drain_timeout_s`, hand back the rest, take everything down."""
        await self.server.set_serving(False)
        timeout_s = 0.0 if self.has_failed.is_set() else self.drain_timeout_s
        num_finished, num_handed_back = await self.intake.drain(timeout_s)
        log.info("engine_drained", finished=num_finished, handed_back=num_handed_back)
        await self.server.stop(_STOP_GRACE_S)
        if self.client_server is not None:
            await self.client_server.stop(_STOP_GRACE_S)
        await end_tasks(*self.background)
        await self.adapters.close()
        if self.inbox is not None:
            await asyncio.to_thread(self.inbox.close)
        await asyncio.to_thread(self.loop.stop)
        if self.grammars is not None:
            self.grammars.close()
        if self.registry is not None:
            await self.registry.close()
        await asyncio.to_thread(self.weights.close)


async def start_engine(settings: EngineSettings, parts: EngineParts) -> RunningEngine:
    """Wire the parts, start the loop and serve. The registry and Redis may come later."""
    clock = MonotonicClock()
    speculator = make_speculator(settings, parts.limits)
    scheduler = Scheduler(parts.limits, frozenset(parts.info.base_model.eos_token_ids), speculator)
    has_failed = asyncio.Event()
    ended = _LateCallback()
    loop = EngineLoop(
        scheduler,
        parts.runner,
        clock,
        run_ahead=_run_ahead(settings, parts.info.device),
        on_ended=ended,
        on_unhealthy=_on_this_loop(has_failed.set),
    )
    registry = RegistryClient(settings.registry_address) if settings.registry_address else None
    adapters = AdapterManager(
        AdapterSlots(parts.info.num_adapter_slots),
        parts.adapter_store,
        registry,
        loop,
        slot_wait_s=settings.adapter_slot_wait_s,
    )
    limits = RequestLimits(parts.info.base_model.vocab_size, parts.limits.max_num_tokens)
    intake = RequestIntake(loop, adapters, limits, clock, parts.grammars)
    ended.target = intake.ended
    adapters.on_resident = intake.follow
    servicer = EngineServicer(
        info=parts.info,
        intake=intake,
        adapters=adapters,
        weights=parts.weights,
        figures=EngineFigures(
            parts.info,
            loop,
            intake,
            adapters,
            parts.weights,
            adapters.load_seconds,
            parts.memory,
            speculator,
            clock.now(),
        ),
        outbox_steps=settings.outbox_steps,
    )
    server = RpcServer(settings.listen)
    clients = client_server(settings, CLIENT_SCOPES)
    loop.start()
    for each in filter(None, (server, clients)):
        engine_pb2_grpc.add_EngineServicer_to_server(servicer, each.grpc)
        await each.start()
        await each.set_serving(True)
    presence = None
    if settings.redis_url:
        presence = Presence(
            settings.redis_url,
            advertised_address(settings.advertise_address, settings.listen, server.port, socket.gethostname),
            parts.info,
            parts.limits.page_tokens,
            loop=loop,
            intake=intake,
            adapters=adapters,
        )
        intake.on_draining = presence.say_now
    jobs: list[Coroutine[Any, Any, None]] = [] if presence is None else [presence.run()]
    if registry is not None:
        publications = Publications(registry, adapters)
        adapters.on_ahead = publications.expect
        jobs.append(publications.run())
        jobs.append(_announce_base_model(registry, parts.info))
        model_hash = parts.info.base_model.model_hash
        jobs.append(AdapterHolds(registry, adapters, parts.info.boot_id).run())
        jobs.append(AdapterRefresh(registry, adapters, model_hash, settings.adapter_refresh_s).run())
        if settings.redis_url:
            jobs.append(AdapterEvents(settings.redis_url, adapters).run())
    if parts.inbox is not None:
        serve_handovers(parts.inbox, adapters)
    background = [asyncio.create_task(_logged(job)) for job in jobs]
    log.info("engine_ready", listen=settings.listen, port=server.port, boot_id=parts.info.boot_id)
    return RunningEngine(
        server,
        clients,
        loop,
        intake,
        adapters,
        parts.weights,
        parts.inbox,
        parts.grammars,
        registry,
        background,
        has_failed,
        settings.drain_timeout_s,
    )


def make_speculator(settings: EngineSettings, limits: SchedulerLimits) -> DraftSpeculator | None:
    """Who decides about drafts, if there are any."""
    if settings.speculation == "none" or not limits.max_draft_tokens:
        return None
    return DraftSpeculator(
        limits.max_draft_tokens,
        decode_ladder(limits.num_most_running),
        drafts_on_device=settings.speculation == "mtp",
        is_adaptive=settings.adaptive_drafts,
    )


def _run_ahead(settings: EngineSettings, device: str) -> int:
    if settings.run_ahead is not None:
        return settings.run_ahead
    return int(device.startswith("cuda"))


class _LateCallback:
    """Stands for the intake, which needs the loop that needs it."""

    def __init__(self) -> None:
        self.target: Callable[[list[str]], None] = lambda _: None

    def __call__(self, request_ids: list[str]) -> None:
        self.target(request_ids)


def _on_this_loop(function: Callable[[], Any]) -> Callable[[], None]:
    """A version of `function` that any thread may call."""
    running = asyncio.get_running_loop()

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            running.call_soon_threadsafe(function)

    return call


async def _logged(job: Coroutine[Any, Any, None]) -> None:
    """Serving goes on when a background job fails, but not in silence."""
    try:
        await job
    except Exception as error:
        log.error("background_job_failed", job=str(job), exc_info=error)


async def _announce_base_model(registry: RegistryClient, info: engine_pb2.EngineInfo) -> None:
    """Tell the registry what is served, as soon as it answers, and again now and then."""
    base_model = info.base_model
    is_announced: bool | None = None
    while True:
        try:
            await registry.register_base_model(base_model, max_adapter_rank=info.max_adapter_rank)
        except KilnError as error:
            if is_announced is not False:
                log.warning("base_model_not_announced", code=error.code, reason=str(error))
            is_announced = False
            await asyncio.sleep(_ANNOUNCE_RETRY_S)
        else:
            if not is_announced:
                log.info("base_model_announced", model=base_model.model_id, hash=base_model.model_hash)
            is_announced = True
            await asyncio.sleep(_ANNOUNCE_AGAIN_S)
