"""The gateway's own Redis client while Redis is away: an answer must not wait for it."""

import asyncio

from kiln_gateway.bootstrap import open_clients
from kiln_gateway.rollouts import RolloutStore
from kiln_gateway.settings import GatewaySettings
from tests.support.gateway import write_model_folder


async def test_nothing_is_tried_again_while_an_answer_waits(tmp_path, monkeypatch):
    connect, attempts = asyncio.open_unix_connection, []

    async def counted(*arguments, **options):
        attempts.append(options)
        return await connect(*arguments, **options)

    monkeypatch.setattr(asyncio, "open_unix_connection", counted)
    model_path = write_model_folder(tmp_path / "model")
    url = f"unix://{tmp_path}/nobody.sock"
    async with open_clients(GatewaySettings(model_path=str(model_path), redis_url=url)) as clients:
        store = RolloutStore(clients.redis, ttl_s=60, max_bytes=10_000)
        assert not await store.is_reachable()
        assert len(attempts) == 1
        # A save whose answer was lost may have taken effect: it must not be repeated either.
        assert clients.redis.get_retry()._retries == 0
