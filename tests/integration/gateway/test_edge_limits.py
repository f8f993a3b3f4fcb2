"""What the edge allows a connection, and what it tells browsers."""

import asyncio

import pytest
import structlog

from tests.support.gateway import build_rig, gateway_rig, served

IN_TIME_S = 1.0  # in which a request that was sent at once arrives on a busy machine too
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
async def address(tmp_path):
    rig = build_rig(tmp_path, header_timeout_s=0.3, body_pause_s=0.3)
    async with served(rig) as url:
        host, port = url.removeprefix("http://").split(":")
        yield host, int(port)


async def answer_to(address, *pieces, pause_s=0.0):
    """All that comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)  # the pause is what is tested
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat/comp", HEAD])
async def test_headers_that_do_not_end_close_the_connection(address, begun):
    assert await answer_to(address, begun) == b""


async def test_headers_that_drip_close_the_connection_after_an_answer_too(tmp_path):
    rig = build_rig(tmp_path, header_timeout_s=IN_TIME_S)
    async with served(rig) as url:
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"GET /hea")
        assert (await asyncio.wait_for(reader.read(), 60)).endswith(b'"ok"}')
        writer.close()


async def test_headers_that_are_too_large_are_refused(address):
    long = HEAD + b"Connection: close\r\nX-Long: " + b"a" * 40_000 + b"\r\n\r\n"
    answer = await answer_to(address, long)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"headers_too_large" in answer
    endless = await answer_to(address, HEAD + b"X-Long: " + b"a" * 100_000)
    assert endless.startswith(b"HTTP/1.1 400")


async def test_a_body_that_pauses_is_refused(address):
    answer = await answer_to(address, HEAD + b"Content-Length: 100\r\n\r\n", b'{"messages"')
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"body_too_slow" in answer


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/datasets"])
async def test_a_client_that_leaves_within_its_body_is_no_fault_of_ours(tmp_path, route):
    rig = build_rig(tmp_path)
    async with served(rig) as url:
        with structlog.testing.capture_logs() as lines:
            _, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
            head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
            writer.write(head.encode() + b'{"messages"')
            await writer.drain()
            writer.close()
            counted = f'kiln_gateway_requests_total{{method="POST",route="{route}",status='
            async with asyncio.timeout(60):
                while counted not in (shown := rig.app.state.gateway.metrics.render().decode()):
                    await asyncio.sleep(0.01)
        assert f'{counted}"499"}} 1.0' in shown
        assert lines == []


async def test_an_upload_may_take_longer_than_a_completion(tmp_path):
    rig = build_rig(tmp_path, request_timeout_s=0.2, body_pause_s=600)
    rows = [b'{"prompt": "Hi", "completion": "Hello"}\n'] * 3
    async with served(rig) as url:
        host, port = url.removeprefix("http://").split(":")
        for route, pieces, status in (("/v1/datasets", rows, 201), ("/v1/completions", rows[:1], 400)):
            head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {sum(map(len, rows))}\r\n"
            head += "Connection: close\r\n\r\n"
            answer = await answer_to((host, port), head.encode(), *pieces, pause_s=0.15)
            assert answer.startswith(f"HTTP/1.1 {status}".encode()), answer


async def test_answers_may_take_longer_than_headers(tmp_path):
    rig = build_rig(tmp_path, header_timeout_s=IN_TIME_S, body_pause_s=IN_TIME_S)
    rig.engine.pause_after = 1
    async with served(rig) as url:
        host, port = url.removeprefix("http://").split(":")
        body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
        await rig.engine.paused.wait()
        await asyncio.sleep(1.2 * IN_TIME_S)  # past both
        rig.engine.go_on.set()
        assert b"[DONE]" in await asyncio.wait_for(reader.read(), 60)
        writer.close()


async def test_browsers_are_told_to_run_and_frame_nothing(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        for path in ("/healthz", "/v1/models", "/nowhere"):
            headers = (await rig.http.get(path)).headers
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert "access-control-allow-origin" not in headers
        refused = await rig.http.get("/healthz", headers={"Host": "evil.example"})
        assert refused.headers["X-Frame-Options"] == "DENY"
        policy = (await rig.http.get("/")).headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        assert "script-src *" not in policy
        preflight = await rig.http.options("/v1/chat/completions", headers={"Origin": "https://evil.example"})
        assert preflight.status_code == 403
