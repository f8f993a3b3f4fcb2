"""The private Redis: durable through a SIGKILL, one server to a folder, no root."""

import pytest

from kiln_common.bus.connect import connect
from kiln_common.bus.private_server import PrivateRedis, RedisServerFailed
from tests.support.redis_server import private_redis


def test_acknowledged_entries_survive_a_sigkill(tmp_path):
    with private_redis(tmp_path) as server:
        client = connect(server.url)
        for number in range(50):
            client.xadd("stream", {"number": number})
        server.kill()
        server.start()
        assert client.xlen("stream") == 50


def test_a_second_server_over_the_same_folder_is_refused(tmp_path):
    with private_redis(tmp_path), pytest.raises(RedisServerFailed, match="already uses"):
        PrivateRedis(tmp_path / "redis").start()


def test_a_folder_deeper_than_a_socket_path_may_be_long_works(tmp_path):
    deep = tmp_path / ("d" * 120)
    with private_redis(deep) as server:
        assert connect(server.url).ping()


def test_the_server_keeps_jobs_and_lets_rollouts_go_when_memory_is_full(tmp_path):
    with private_redis(tmp_path) as server:
        client = connect(server.url)
        client.set("job", b"x" * 1000)
        for number in range(90):
            client.set(f"rollout:{number}", b"x" * 1_000_000, ex=3600)
        assert client.get("job") == b"x" * 1000
        assert client.exists("rollout:0", "rollout:1", "rollout:2", "rollout:89") < 4
