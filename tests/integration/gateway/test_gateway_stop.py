"""A gateway told to stop: what runs may end, and what cannot ends with an error, never cut off."""

import asyncio

import httpx

from kiln_gateway.server import GatewayServer
from tests.support.gateway import build_rig, parse_events, served

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def _stream(http, address):
    async with http.stream(
        "POST", f"{address}/v1/chat/completions", json={**CHAT, "stream": True}
    ) as response:
        return response.status_code, parse_events((await response.aread()).decode())


async def test_answers_that_outlast_the_grace_time_end_with_an_error(tmp_path):
    rig = build_rig(tmp_path)
    rig.engine.pause_after = 2
    async with httpx.AsyncClient(timeout=20) as http:
        async with served(rig) as address:
            streamed = asyncio.create_task(_stream(http, address))
            whole = asyncio.create_task(http.post(f"{address}/v1/chat/completions", json=CHAT))
            while len(rig.engine.requests) < 2:
                await asyncio.sleep(0.01)
            await rig.engine.paused.wait()
        status, events = await streamed
        assert status == 200
        assert events[-1]["error"]["code"] == "gateway_stopping"
        response = await whole
        assert (response.status_code, response.json()["error"]["code"]) == (503, "gateway_stopping")
        assert response.headers["Retry-After"] == "1"


async def test_answers_that_end_in_time_are_whole(tmp_path):
    rig = build_rig(tmp_path)
    rig.engine.pause_after = 2
    async with httpx.AsyncClient(timeout=20) as http:
        async with served(rig, grace_s=10) as address:
            streamed = asyncio.create_task(_stream(http, address))
            await rig.engine.paused.wait()
            asyncio.get_running_loop().call_later(0.3, rig.engine.go_on.set)
        status, events = await streamed
        assert (status, events[-1]) == (200, "[DONE]")


def test_idle_connections_outlive_the_clients_own_patience(tmp_path):
    # httpx closes idle connections after 5 seconds; the server must not do so at the same moment.
    rig = build_rig(tmp_path)
    assert GatewayServer(rig.app, host="127.0.0.1", port=0, grace_s=0).config.timeout_keep_alive > 60
