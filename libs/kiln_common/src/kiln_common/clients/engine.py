"""Client of the engine service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from kiln_common.errors import DeadlineExceeded, DuplicateRequestId, EngineUnavailable, KilnError
from kiln_common.pb import common_pb2, engine_pb2, engine_pb2_grpc
from kiln_common.rpc import from_rpc_error, open_channel

_Outputs = asyncio.Queue[engine_pb2.SequenceOutput | KilnError]


class EngineClient:
    """Typed calls to one engine; errors come back as KilnError with the engine's code.

    All generations of a client share one Session stream. When it breaks (the engine restarted),
    what runs on it ends with EngineUnavailable, and the next generation opens a new one. Every call
    may raise EngineUnavailable. `timeout_s` bounds the short calls.
    """

    def __init__(self, address: str, *, timeout_s: float = 10.0) -> None:
        self.address = address
        self._channel = open_channel(address)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        self._timeout_s = timeout_s
        self._session: _Session | None = None

    async def close(self) -> None:
        """End the session, and with it what it generates, and the channel."""
        if self._session is not None:
            await self._session.close()
        await self._channel.close()

    def end_session(self, reason: str) -> None:
        """End what runs with EngineUnavailable; the next generation opens a new session."""
        if self._session is not None:
            self._session.end(EngineUnavailable(reason))

    async def generate(self, request: engine_pb2.GenerateRequest) -> AsyncIterator[engine_pb2.SequenceOutput]:
        """What each step adds to the sequence; the last output has a finish reason.

        A request that the engine refuses or fails ends with an output whose reason is ERROR and
        whose `error` says why. Closing the iterator, or cancelling its task, aborts the request.

        Raises:
            EngineUnavailable: the engine is away, or went away before the sequence ended.
            DeadlineExceeded: nothing ended the sequence, `timeout_s` after its own deadline.
            DuplicateRequestId: this client already generates under that request id.
        """
        if self._session is None or self._session.is_broken:
            self._session = _Session(self._stub)
        session = self._session
        outputs = session.submit(request)
        has_ended = False
        late = self._end_late(request.timeout_s, outputs) if request.timeout_s > 0 else None
        try:
            while not has_ended:
                output = await outputs.get()
                if isinstance(output, KilnError):
                    has_ended = session.is_broken
                    raise output
                has_ended = output.finish_reason != engine_pb2.FINISH_REASON_UNSPECIFIED
                yield output
        finally:
            if late is not None:
                late.cancel()
            session.forget(request.request_id, must_abort=not has_ended)

    async def get_info(self) -> engine_pb2.EngineInfo:
        """What the engine serves; its boot_id changes when it is restarted."""
        return await self._call(self._stub.GetInfo, engine_pb2.GetInfoRequest(), self._timeout_s)

    async def get_stats(self) -> engine_pb2.EngineStats:
        return await self._call(self._stub.GetStats, engine_pb2.GetStatsRequest(), self._timeout_s)

    async def share_weights(self) -> engine_pb2.ShareWeightsResponse:
        """Where a process on the engine's host can map the base weights."""
        return await self._call(self._stub.ShareWeights, engine_pb2.ShareWeightsRequest(), self._timeout_s)

    async def checksum(self, *, timeout_s: float = 300.0) -> engine_pb2.ChecksumWeightsResponse:
        """sha256 of the weights' bytes, computed now: a minute for a large model."""
        return await self._call(self._stub.ChecksumWeights, engine_pb2.ChecksumWeightsRequest(), timeout_s)

    async def prepare_adapter(
        self, adapter: common_pb2.AdapterRef, *, timeout_s: float = 60.0
    ) -> engine_pb2.PrepareAdapterResponse:
        """Return once the next step can use the version. Idempotent.

        Raises adapter_not_found, adapter_unavailable, adapter_slots_full.
        """
        request = engine_pb2.PrepareAdapterRequest(adapter=adapter)
        return await self._call(self._stub.PrepareAdapter, request, timeout_s)

    async def drain(self, deadline_s: float) -> engine_pb2.DrainResponse:
        """Stop the engine from taking requests; returns when the running ones have ended."""
        request = engine_pb2.DrainRequest(deadline_s=deadline_s)
        return await self._call(self._stub.Drain, request, 2 * deadline_s + self._timeout_s)

    def _end_late(self, timeout_s: float, outputs: _Outputs) -> asyncio.TimerHandle:
        """End a request that outlives its deadline by far: the engine, which keeps it, hangs."""
        error = DeadlineExceeded(f"the engine did not end the request within {timeout_s:g} s")
        return asyncio.get_running_loop().call_later(timeout_s + self._timeout_s, outputs.put_nowait, error)

    async def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error, "engine", EngineUnavailable) from error


class _Session:
    """One Session stream and the generations that run on it."""

    def __init__(self, stub: engine_pb2_grpc.EngineStub) -> None:
        self._call = stub.Session()
        self._commands: asyncio.Queue[engine_pb2.SessionRequest] = asyncio.Queue()
        self._outputs: dict[str, _Outputs] = {}
        self._broken: KilnError | None = None
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    @property
    def is_broken(self) -> bool:
        return self._broken is not None

    def submit(self, request: engine_pb2.GenerateRequest) -> _Outputs:
        """Send a request; its outputs, or the error that broke the stream, go to the queue."""
        if request.request_id in self._outputs:
            raise DuplicateRequestId(request.request_id)
        outputs: _Outputs = asyncio.Queue()
        self._outputs[request.request_id] = outputs
        self._commands.put_nowait(engine_pb2.SessionRequest(submit=request))
        return outputs

    def forget(self, request_id: str, *, must_abort: bool) -> None:
        """Nobody waits for this request's outputs any more."""
        self._outputs.pop(request_id, None)
        if must_abort and not self.is_broken:
            self._commands.put_nowait(engine_pb2.SessionRequest(abort=request_id))

    def end(self, error: KilnError) -> None:
        """Leave the stream: the engine, if it lives, gives up what runs on it."""
        self._break(error)
        self._call.cancel()

    async def close(self) -> None:
        self.end(EngineUnavailable("the engine client was closed"))
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _write(self) -> None:
        # The reader learns why the stream ended; here it is enough to stop.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while not self.is_broken:
                await self._call.write(await self._commands.get())

    async def _read(self) -> None:
        try:
            async for step in self._call:
                for output in step.outputs:
                    outputs = self._outputs.get(output.request_id)
                    if outputs is not None:
                        outputs.put_nowait(output)
            self._break(EngineUnavailable("the engine ended the session"))
        except grpc.RpcError as error:
            self._break(from_rpc_error(error, "engine", EngineUnavailable))

    def _break(self, error: KilnError) -> None:
        if self._broken is None:
            self._broken = error
            for outputs in self._outputs.values():
                outputs.put_nowait(error)
            self._tasks[0].cancel()  # it may wait for a command that will never come
