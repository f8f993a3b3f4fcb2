"""One Redis for the tests of this folder that do not harm it; each test finds it empty."""

import pytest

from kiln_common.bus.connect import connect
from kiln_trainer.jobs.store import JobStore
from tests.support.redis_server import private_redis


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    with private_redis(tmp_path_factory.mktemp("jobs")) as server:
        yield server


@pytest.fixture
def redis_client(redis_server):
    client = connect(redis_server.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def store(redis_client):
    return JobStore(redis_client, "trainer_a", retention_s=60)


@pytest.fixture
def other_store(redis_client, store):
    """The same queue as another trainer sees it."""
    return JobStore(redis_client, "trainer_b", retention_s=60)
