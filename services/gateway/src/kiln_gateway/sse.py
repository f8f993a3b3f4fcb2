"""Server-sent events: framing, errors inside a stream, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse

from kiln_common.errors import KilnError
from kiln_gateway.http_errors import error_body, request_id_of, unexpected

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
    for that long (the first one at once, so that a quiet stream opens).
    """
    request_id = request_id_of(request)
    first: bytes | None = None
    if keepalive_s is None:
        first = await until_disconnect(request, _first(events))
    body = _with_errors(first, events, request_id, keepalive_s)
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


async def _with_errors(
    first: bytes | None, events: AsyncGenerator[bytes], request_id: str, keepalive_s: float | None
) -> AsyncGenerator[bytes]:
    async with contextlib.aclosing(events):
        try:
            if first is not None:
                yield first
            source = events if keepalive_s is None else _with_keepalive(events, keepalive_s)
            async with contextlib.aclosing(source):
                async for event in source:
                    yield event
        except KilnError as error:
            yield frame(error_body(error, request_id))
        except Exception as error:  # noqa: BLE001 the status is sent: a bug becomes an error event
            yield frame(error_body(unexpected(error), request_id))


async def _with_keepalive(events: AsyncGenerator[bytes], keepalive_s: float) -> AsyncGenerator[bytes]:
    yield _KEEPALIVE
    pending: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events, None))
            done, _ = await asyncio.wait({pending}, timeout=keepalive_s)
            if not done:
                yield _KEEPALIVE
                continue
            event, pending = pending.result(), None
            if event is None:
                return
            yield event
    finally:
        if pending is not None:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)
