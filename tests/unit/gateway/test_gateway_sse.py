"""Server-sent events stay open while nothing happens, and end cleanly."""

import asyncio
from types import SimpleNamespace

from kiln_common.errors import EngineUnavailable
from kiln_gateway import sse


def request(is_stopping=None):
    gateway = SimpleNamespace(is_stopping=is_stopping or asyncio.Event())
    app = SimpleNamespace(state=SimpleNamespace(gateway=gateway))
    url = SimpleNamespace(path="/v1/train/jobs/x/events")
    return SimpleNamespace(state=SimpleNamespace(request_id="req_1"), app=app, url=url)


async def body_of(events, **options):
    response = await sse.stream(request(), events, **options)
    return [part async for part in response.body_iterator]


async def test_a_quiet_stream_is_kept_open_by_comments():
    go_on = asyncio.Event()

    async def events():
        await go_on.wait()
        yield sse.frame({"a": 1}, event="step", event_id="1-0")

    response = await sse.stream(request(), events(), keepalive_s=0.01)
    parts = response.body_iterator
    assert [await anext(parts) for _ in range(3)] == [b": keepalive\n\n"] * 3
    go_on.set()
    rest = [part async for part in parts if part != b": keepalive\n\n"]
    assert rest == [b'id: 1-0\nevent: step\ndata: {"a":1}\n\n']


async def test_an_error_inside_a_stream_is_its_last_event():
    async def events():
        yield b"data: 1\n\n"
        raise EngineUnavailable("gone")

    first, second = [part for part in await body_of(events(), keepalive_s=1) if part[:1] != b":"]
    assert first == b"data: 1\n\n"
    assert b'"code":"engine_unavailable"' in second
    assert b'"request_id":"req_1"' in second


async def test_a_bug_inside_a_stream_does_not_tell_its_text():
    async def events():
        raise RuntimeError("secret")
        yield b""

    parts = await body_of(events(), keepalive_s=1)
    assert b'"code":"internal_error"' in parts[-1]
    assert b"secret" not in b"".join(parts)


async def test_a_quiet_stream_ends_when_the_gateway_stops():
    is_stopping, was_closed = asyncio.Event(), asyncio.Event()

    async def events():
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            was_closed.set()

    response = await sse.stream(request(is_stopping), events(), keepalive_s=60)
    parts = response.body_iterator
    assert await anext(parts) == b": keepalive\n\n"
    ending = asyncio.ensure_future(anext(parts))
    await asyncio.sleep(0)
    is_stopping.set()
    assert b'"code":"gateway_stopping"' in await asyncio.wait_for(ending, 60)
    assert [part async for part in parts] == []
    assert was_closed.is_set()
