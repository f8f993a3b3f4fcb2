"""A published version reaches the engines that announce themselves too, and those that do not serve it are named."""

import asyncio

import pytest

from kiln_common.bus.connect import connect_async
from kiln_common.bus.engine_presence import EngineWord, say, withdraw
from kiln_common.pb import common_pb2
from kiln_trainer import publishing
from kiln_trainer.publishing import EngineDirectory
from tests.support.fake_engine import running_engine
from tests.support.redis_server import private_redis

VERSION = common_pb2.AdapterRef(name="helper", version=1, sha256="ab" * 32)


@pytest.fixture
async def redis(tmp_path):
    with private_redis(tmp_path) as server:
        client = connect_async(server.url, timeout_s=1.0)
        client.server = server
        yield client
        await client.aclose()


def word_of(engine, **fields):
    defaults = {"address": engine.address, "model_hash": engine.base_model.model_hash, "is_draining": False}
    return EngineWord(
        boot_id=engine.boot_id, page_tokens=16, num_running=0, num_waiting=0, **{**defaults, **fields}
    )


async def test_every_announced_engine_of_the_model_serves_a_version(redis):
    async with (
        running_engine("boot_1") as own,
        running_engine("boot_2") as other,
        running_engine("x") as alien,
    ):
        directory = EngineDirectory([own.address], info_timeout_s=10, live_timeout_s=2, redis=redis)
        await say(redis, word_of(own, address="localhost:1"))  # by a name nobody configured
        await say(redis, word_of(other))
        await say(redis, word_of(alien, model_hash="another"))
        assert await directory.prepare(VERSION, "all") == ()
        assert (own.prepared, other.prepared, alien.prepared) == (["helper@1"], ["helper@1"], [])
        # What only its sampler needs, the others do not wait for.
        await directory.prepare(VERSION, "sampler")
        assert len(other.prepared) == 1
        other.refuses = True
        assert await directory.prepare(VERSION, "all") == ("boot_2",)
        await say(redis, word_of(other, is_draining=True))
        assert await directory.prepare(VERSION, "all") == ()
        await withdraw(redis, other.boot_id)
        assert await directory.prepare(VERSION, "all") == ()
        await directory.close()


async def test_an_announced_engine_that_is_gone_is_named(redis, tmp_path):
    async with running_engine() as own:
        directory = EngineDirectory([own.address], info_timeout_s=10, live_timeout_s=2, redis=redis)
        gone = f"unix:{tmp_path}/gone.sock"
        await say(redis, EngineWord(gone, "boot_9", own.base_model.model_hash, 16, 0, 0))
        assert await directory.prepare(VERSION, "all") == (gone,)
        await directory.close()


async def test_without_redis_the_engines_known_so_far_are_asked(redis):
    async with running_engine("boot_1") as own, running_engine("boot_2") as other:
        directory = EngineDirectory([own.address], info_timeout_s=10, live_timeout_s=10, redis=redis)
        await say(redis, word_of(other))
        await directory.prepare(VERSION, "all")
        redis.server.kill()
        await directory.prepare(VERSION, "all")
        assert len(other.prepared) == 2
        await directory.close()


async def test_the_trainers_own_engine_does_not_wait_for_the_others_to_be_found(monkeypatch):
    async with running_engine() as own:
        is_prepared = asyncio.Event()

        async def read_words(redis):
            await is_prepared.wait()
            return []

        class Prepared(list):
            def append(self, reference):
                super().append(reference)
                is_prepared.set()

        own.prepared = Prepared()
        monkeypatch.setattr(publishing, "read_words", read_words)
        directory = EngineDirectory([own.address], info_timeout_s=10, live_timeout_s=10, redis=object())
        async with asyncio.timeout(10):
            assert await directory.prepare(VERSION, "all") == ()
        assert own.prepared == ["helper@1"]
        await directory.close()
