"""The engine's gRPC service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import structlog

from kiln_common import tracing
from kiln_common.errors import InvalidValue, KilnError
from kiln_common.pb import engine_pb2, engine_pb2_grpc
from kiln_common.rpc.keys import current_caller
from kiln_engine.domain.ports import AdapterResidency, BaseWeights
from kiln_engine.domain.result import FinishReason, SequenceEvent
from kiln_engine.servicer.intake import RequestIntake
from kiln_engine.servicer.messages import sequence_output, step_outputs
from kiln_engine.servicer.outbox import Outbox
from kiln_engine.servicer.stats import EngineFigures
from kiln_engine.servicer.traces import AwaitedVersions, SessionTraces
from kiln_engine.servicer.validation import parse_adapter_version

log = structlog.get_logger()


# What clients from outside need for each method; "admin" for those that are not here.
CLIENT_SCOPES = dict.fromkeys(("Generate", "Session", "GetInfo", "GetStats"), "infer")


class EngineServicer(engine_pb2_grpc.EngineServicer):
    """Translates between the wire and the engine's parts; decides nothing about steps.

    `outbox_steps` is how many steps a client may lag behind before its requests are cancelled.
    """

    def __init__(
        self,
        *,
        info: engine_pb2.EngineInfo,
        intake: RequestIntake,
        adapters: AdapterResidency,
        weights: BaseWeights,
        figures: EngineFigures,
        outbox_steps: int = 1024,
    ) -> None:
        self._info = info
        self._intake = intake
        self._adapters = adapters
        self._weights = weights
        self._figures = figures
        self._awaited = AwaitedVersions()
        self._outbox_steps = outbox_steps

    async def Session(
        self,
        request_iterator: AsyncIterator[engine_pb2.SessionRequest],
        context: grpc.aio.ServicerContext,
    ) -> AsyncIterator[engine_pb2.StepOutputs]:
        outbox = Outbox(self._outbox_steps)
        traces = self._open_traces()
        reader = asyncio.create_task(self._read_session(request_iterator, outbox, traces))
        try:
            while (events := await outbox.take()) is not None:
                if traces is not None:
                    traces.saw(events)
                yield step_outputs(events)
        finally:
            reader.cancel()
            self._intake.abort_all(outbox)
            if traces is not None:
                traces.close()

    async def Generate(
        self, request: engine_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[engine_pb2.SequenceOutput]:
        outbox = Outbox(self._outbox_steps)
        traces = self._open_traces()
        _salt(request)
        self._intake.submit(request, outbox, _adapter_owner())
        if traces is not None:
            traces.began(request)
        try:
            while (events := await outbox.take()) is not None:
                if traces is not None:
                    traces.saw(events)
                for event in events:
                    if event.error is not None:
                        raise event.error
                    yield sequence_output(event)
                    if event.finish_reason is not None:
                        return
        finally:
            outbox.close()
            self._intake.abort_all(outbox)
            if traces is not None:
                traces.close()

    async def GetInfo(
        self, request: engine_pb2.GetInfoRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineInfo:
        return self._info

    async def GetStats(
        self, request: engine_pb2.GetStatsRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.EngineStats:
        stats = self._figures.read()
        if _adapter_owner() is not None:
            stats.ClearField("resident_adapters")
        return stats

    async def ShareWeights(
        self, request: engine_pb2.ShareWeightsRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.ShareWeightsResponse:
        return engine_pb2.ShareWeightsResponse(
            socket_path=self._weights.socket_path,
            boot_id=self._info.boot_id,
            model_hash=self._info.base_model.model_hash,
        )

    async def ChecksumWeights(
        self, request: engine_pb2.ChecksumWeightsRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.ChecksumWeightsResponse:
        sha256 = await asyncio.to_thread(self._weights.checksum)
        return engine_pb2.ChecksumWeightsResponse(sha256=sha256, num_bytes=self._weights.num_bytes)

    async def PrepareAdapter(
        self, request: engine_pb2.PrepareAdapterRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.PrepareAdapterResponse:
        version = parse_adapter_version(request.adapter)
        started_s = self._intake.clock.now()
        with tracing.span("engine.swap", attributes={"kiln.adapter": version.reference}):
            slot, was_loaded = await self._adapters.prepare(version)
            self._awaited.expect(version.sha256, tracing.current_traceparent())
        return engine_pb2.PrepareAdapterResponse(
            slot=slot, was_loaded=was_loaded, seconds=self._intake.clock.now() - started_s
        )

    async def Drain(
        self, request: engine_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> engine_pb2.DrainResponse:
        if not 0 <= request.deadline_s <= 3600:
            raise InvalidValue(f"deadline_s is {request.deadline_s}; it must be between 0 and 3600")
        num_finished, num_handed_back = await self._intake.drain(request.deadline_s)
        return engine_pb2.DrainResponse(num_finished=num_finished, num_aborted=num_handed_back)

    def _open_traces(self) -> SessionTraces | None:
        return SessionTraces(self._awaited) if tracing.is_on() else None

    async def _read_session(
        self,
        messages: AsyncIterator[engine_pb2.SessionRequest],
        outbox: Outbox,
        traces: SessionTraces | None,
    ) -> None:
        try:
            async for message in messages:
                if message.HasField("submit"):
                    self._submit(message.submit, outbox, traces)
                elif message.HasField("abort"):
                    self._intake.abort(message.abort, outbox)
        finally:
            outbox.close()  # the client has said its last word: the session ends

    def _submit(
        self, message: engine_pb2.GenerateRequest, outbox: Outbox, traces: SessionTraces | None
    ) -> None:
        try:
            _salt(message)
            self._intake.submit(message, outbox, _adapter_owner())
            if traces is not None:
                traces.began(message)
        except KilnError as error:
            refusal = SequenceEvent(message.request_id, finish_reason=FinishReason.ERROR, error=error)
            outbox.offer([refusal])


def _salt(message: engine_pb2.GenerateRequest) -> None:
    """Keys from outside share no cached prefixes: their timing would tell what others asked."""
    caller = current_caller()
    if caller is not None:
        message.cache_salt = caller.owner + message.cache_salt


def _adapter_owner() -> str | None:
    """Whose adapters the call may use and see; None, for services and admins, is everyone's."""
    caller = current_caller()
    return None if caller is None or "admin" in caller.scopes else caller.owner
