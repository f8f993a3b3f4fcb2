"""Server-sent events: framing, errors inside a stream, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse

from kiln_common.errors import KilnError
from kiln_gateway.errors import GatewayStopping
from kiln_gateway.http_errors import body_for, request_id_of, unexpected

Result = TypeVar("Result")

DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": keepalive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientLeft(Exception):
    """The client closed the connection before its answer was there."""


def frame(body: Any, *, event: str = "", event_id: str = "") -> bytes:
    """One event: its JSON, and where given its type and id."""
    head = (f"id: {event_id}\n" if event_id else "") + (f"event: {event}\n" if event else "")
    return head.encode() + b"data: " + orjson.dumps(body) + b"\n\n"


async def stream(
    request: Request,
    events: AsyncGenerator[bytes],
    *,
    headers: Mapping[str, str] | None = None,
    keepalive_s: float | None = None,
) -> StreamingResponse:
    """Answer with `events`, once the first is there: an error before it keeps its own HTTP status.

    A later error is one event, and then the end. `keepalive_s` sends a comment where nothing happens
    for that long (the first one at once, so that a quiet stream opens). Such a stream may outlive
    any patience, so it ends as soon as the gateway is told to stop.
    """
    request_id = request_id_of(request)
    first: bytes | None = None
    if keepalive_s is None:
        first = await until_disconnect(request, _first(events))
    else:
        events = _with_keepalive(events, keepalive_s, request.app.state.gateway.is_stopping)
    write_error = _error_writer(request.url.path, request_id)
    body = _with_errors(first, events, write_error)
    return StreamingResponse(body, media_type="text/event-stream", headers={**_HEADERS, **(headers or {})})


async def until_disconnect(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientLeft: it left; there is nobody to answer.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for pending in (task, watcher):
            pending.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _first(events: AsyncGenerator[bytes]) -> bytes | None:
    try:
        return await anext(events, None)
    except BaseException:
        await events.aclose()
        raise


def _error_writer(path: str, request_id: str) -> Callable[[KilnError], bytes]:
    """The last event of a stream that fails; Anthropic's clients look for its type."""
    error_body = body_for(path)

    def write(error: KilnError) -> bytes:
        body = error_body(error, request_id)
        return frame(body, event=body.get("type", ""))

    return write


async def _with_errors(
    first: bytes | None, events: AsyncGenerator[bytes], write_error: Callable[[KilnError], bytes]
) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(events):
        try:
            if first is not None:
                yield first
            async for event in events:
                yield event
        except KilnError as error:
            yield write_error(error)
        except Exception as error:  # noqa: BLE001 the status is sent: a bug becomes an error event
            yield write_error(unexpected(error))


async def _with_keepalive(
    events: AsyncGenerator[bytes], keepalive_s: float, is_stopping: asyncio.Event
) -> AsyncGenerator[bytes]:
    stopping: asyncio.Future[Any] = asyncio.ensure_future(is_stopping.wait())
    pending: asyncio.Future[Any] | None = None
    try:
        yield _KEEPALIVE
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events, None))
            await asyncio.wait({pending, stopping}, timeout=keepalive_s, return_when=asyncio.FIRST_COMPLETED)
            if not pending.done():
                if stopping.done():
                    raise GatewayStopping("the gateway is stopping, so the stream ends here")
                yield _KEEPALIVE
                continue
            event, pending = pending.result(), None
            if event is None:
                return
            yield event
    finally:
        waiting = [task for task in (stopping, pending) if task is not None]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await events.aclose()
