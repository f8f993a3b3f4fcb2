"""Completions of a job, drawn from an engine: tried again where what went wrong passes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from kiln_common import tracing
from kiln_common.errors import EngineUnavailable, ErrorKind, KilnError
from kiln_common.ids import new_id
from kiln_common.pb import engine_pb2
from kiln_common.rpc import from_error_detail

log = structlog.get_logger()

_PASSING = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RATE_LIMITED, ErrorKind.TIMEOUT})
_FIRST_WAIT_S, _LAST_WAIT_S = 0.2, 5.0
_MAX_DRAWING = 64  # completions of a job that run at once


class Generator(Protocol):
    """What a draw needs of kiln_common's EngineClient."""

    def generate(self, request: engine_pb2.GenerateRequest) -> AsyncIterator[engine_pb2.SequenceOutput]: ...


async def draw(
    engine: Generator,
    request: engine_pb2.GenerateRequest,
    patience_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[engine_pb2.SequenceOutput]:
    """All outputs of a request, which ended by itself.

    An engine that is away, full or late is asked again for `patience_s` seconds after the first
    failure, and once more in any case. The seed is the request's, so what is drawn is the same.

    Raises:
        KilnError: what the engine refuses, or what was still in the way at the end.
    """
    deadline_s: float | None = None
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return await _outputs(engine, request)
        except KilnError as error:
            if error.kind not in _PASSING or (deadline_s is not None and clock() + wait_s > deadline_s):
                raise
            if deadline_s is None:
                deadline_s = clock() + patience_s
                log.warning("draw_tried_again", code=error.code, reason=str(error))
            wait_s = max(wait_s, min(error.retry_after_s, _LAST_WAIT_S))
        await sleep(wait_s)
        wait_s = min(2 * wait_s, _LAST_WAIT_S)
        # An engine may still hold the one it gave no answer to.
        again = engine_pb2.GenerateRequest()
        again.CopyFrom(request)
        again.request_id = new_id("opd")
        request = again


async def draw_all(
    engine: Generator, requests: Sequence[engine_pb2.GenerateRequest], timeout_s: float, patience_s: float
) -> list[list[engine_pb2.SequenceOutput]]:
    """Every request's outputs, in order; each may take `timeout_s`.

    Each is tried again by itself, so that one failure does not cost the others' completions; one that
    stays ends all.
    """
    room = asyncio.Semaphore(_MAX_DRAWING)

    async def one(request: engine_pb2.GenerateRequest) -> list[engine_pb2.SequenceOutput]:
        request.timeout_s = timeout_s
        request.traceparent = tracing.current_traceparent()
        async with room:
            return await draw(engine, request, patience_s)

    running = [asyncio.create_task(one(request)) for request in requests]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _outputs(engine: Generator, request: engine_pb2.GenerateRequest) -> list[engine_pb2.SequenceOutput]:
    outputs = [output async for output in engine.generate(request)]
    last = outputs[-1]
    if last.finish_reason == engine_pb2.FINISH_REASON_ERROR:
        raise from_error_detail(last.error)
    if last.finish_reason == engine_pb2.FINISH_REASON_ABORT:
        raise EngineUnavailable("the engine gave a completion up")
    return outputs
