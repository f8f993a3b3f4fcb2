"""Engines on Redis: they say where they are, gateways find them, and a missing Redis changes nothing."""

import asyncio
from dataclasses import replace

import pytest

from kiln_common.bus import keys
from kiln_common.bus.connect import connect_async
from kiln_common.bus.engine_presence import EngineWord, read_words, say
from kiln_common.clients.engine import EngineClient
from kiln_common.prefix_path import path_names, root_name
from kiln_engine.presence import advertised_address
from kiln_gateway.engine_discovery import discovering
from kiln_gateway.engine_pool import EnginePool
from tests.support.engine_server import StubbornRunner, collect, generate_request, make_parts, running_engine
from tests.support.redis_server import private_redis


@pytest.fixture
def redis_server(tmp_path):
    with private_redis(tmp_path) as server:
        yield server


async def until(condition):
    async with asyncio.timeout(60):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
    return found


async def test_an_engine_says_where_it_is_and_what_it_holds(tmp_path, redis_server):
    redis = connect_async(redis_server.url)
    parts = make_parts(StubbornRunner())
    async with running_engine(parts, tmp_path, redis_url=redis_server.url) as (engine, client):
        [word] = await until(lambda: read_words(redis))
        assert word.address == engine.server.address
        assert (word.boot_id, word.page_tokens) == (parts.info.boot_id, 16)
        prompt = list(range(10, 50))
        await collect(client, generate_request("a", prompt))
        names = path_names(root_name([], ""), prompt, 16)

        async def holds_both_pages():
            [word] = await read_words(redis)
            return names[1] in word.prefixes

        await until(holds_both_pages)
        assert await redis.pttl(keys.engine(word.boot_id)) > 1000
    # It took its word back.
    assert await read_words(redis) == []
    await redis.aclose()


async def test_a_stopping_engine_says_so_at_once(tmp_path, redis_server, monkeypatch):
    # No renewal comes before the test has ended.
    monkeypatch.setattr("kiln_engine.presence.RENEW_S", 300.0)
    monkeypatch.setattr("kiln_common.bus.engine_presence.LEASE_S", 600.0)
    redis = connect_async(redis_server.url)
    runner = StubbornRunner()
    async with running_engine(make_parts(runner), tmp_path, redis_url=redis_server.url) as (_, client):
        await until(lambda: read_words(redis))
        runner.hold()
        answer = asyncio.create_task(collect(client, generate_request("a")))
        assert await asyncio.to_thread(runner.wait_until_held, 60)
        draining = asyncio.create_task(client.drain(60.0))

        async def says_so():
            return [word for word in await read_words(redis) if word.is_draining]

        await until(says_so)
        runner.let_go()
        assert (await answer)[-1].finish_reason
        assert (await draining).num_finished == 1
    await redis.aclose()


async def test_a_word_that_is_not_renewed_is_forgotten(redis_server, monkeypatch):
    monkeypatch.setattr("kiln_common.bus.engine_presence.LEASE_S", 0.1)
    redis = connect_async(redis_server.url)
    word = EngineWord("a:1", "boot-1", "ff", 16, 3, 4, True, frozenset({"aa"}), frozenset({b"12345678"}))
    await say(redis, word)
    assert await read_words(redis) == [word]

    async def is_gone():
        return await read_words(redis) == []

    await until(is_gone)
    assert await redis.smembers(keys.ENGINES) == set()
    await redis.aclose()


async def test_words_of_another_version_are_passed_over(redis_server):
    redis = connect_async(redis_server.url)
    await say(redis, EngineWord("a:1", "good", "ff", 16, 0, 0))
    for boot_id, text in {"x": b"{}", "y": b"no json", "z": b'{"prefixes": 3}'}.items():
        await redis.set(keys.engine(boot_id), text)
        await redis.sadd(keys.ENGINES, boot_id)
    assert [word.boot_id for word in await read_words(redis)] == ["good"]
    await redis.aclose()


async def test_a_gateway_finds_engines_and_keeps_them_while_redis_is_away(tmp_path, redis_server):
    redis = connect_async(redis_server.url, timeout_s=1.0)
    parts = make_parts(StubbornRunner())
    pool = EnginePool([], EngineClient)
    async with (
        running_engine(parts, tmp_path, redis_url=redis_server.url),
        discovering(redis, pool),
    ):

        async def is_found():
            return [seat for seat in pool.seats if seat.is_answering]

        await until(is_found)
        redis_server.kill()
        await asyncio.sleep(1.2)  # one more look, which fails
        outputs = [output async for output in pool.generate(generate_request("a"))]
        assert outputs[-1].finish_reason
        redis_server.start()
        # The server has forgotten the word, or kept it: in both cases it stands again soon.
        await until(lambda: read_words(redis))
        assert len(pool.seats) == 1
    await pool.close()
    await redis.aclose()


async def test_an_engine_taken_away_under_load_fails_no_request(tmp_path, redis_server):
    """Two engines, then one: it finishes what it has begun, and leaves the rest to the other."""
    redis = connect_async(redis_server.url)
    pool = EnginePool([], EngineClient)
    first, second = (make_parts(StubbornRunner(), num_pages=512) for _ in range(2))
    second = replace(second, info=type(second.info)())  # a copy of its own
    second.info.CopyFrom(first.info)
    second.info.boot_id = "another boot"
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    stop = asyncio.Event()
    ends = []

    async def ask(client_number):
        number = 0
        while not stop.is_set():
            request = generate_request(f"{client_number}-{number}", [client_number] * 40, max_tokens=20)
            outputs = [output async for output in pool.generate(request)]
            ends.append(sum(len(output.token_ids) for output in outputs))
            number += 1

    async with running_engine(first, folders[0], redis_url=redis_server.url), discovering(redis, pool):

        async def num_seats(count=1):
            return len([seat for seat in pool.seats if seat.is_answering]) == count

        await until(num_seats)
        clients = [asyncio.create_task(ask(number)) for number in range(16)]
        async with running_engine(second, folders[1], redis_url=redis_server.url, drain_timeout_s=10) as (
            leaving,
            _,
        ):
            await until(lambda: num_seats(2))

            async def is_at_work():
                return leaving.loop.stats.num_generated_tokens > 200

            await until(is_at_work)
        num_before = len(ends)

        async def goes_on():
            return len(ends) > num_before + 20

        await until(goes_on)
        stop.set()
        await asyncio.gather(*clients)  # raises what a request ended with
    assert set(ends) == {20}
    await pool.close()
    await redis.aclose()


@pytest.mark.parametrize(
    ("configured", "listen", "found"),
    [
        ("", "unix:/run/e.sock", "unix:/run/e.sock"),
        ("", "127.0.0.1:0", "127.0.0.1:1234"),
        ("", "0.0.0.0:8430", "host-7:1234"),
        ("", "[::]:8430", "host-7:1234"),
        ("engine.example:9", "0.0.0.0:8430", "engine.example:9"),
    ],
)
def test_others_reach_an_engine_by_its_own_address(configured, listen, found):
    assert advertised_address(configured, listen, 1234, lambda: "host-7") == found
