"""The table of OpenAI's fields in the docs says what the gateway does; KILN_WRITE_DOCS=1 writes it anew."""

import os

import pytest
import redis.asyncio

from tests.support import openai_fields
from tests.support.gateway import REPOSITORY, gateway_rig
from tests.support.redis_server import private_redis

PAGE = REPOSITORY / "docs" / "openai-fields.md"


@pytest.fixture
async def rig(tmp_path):
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url)
        async with gateway_rig(tmp_path, redis=store) as rig:
            rig.registry.add("helpful")
            yield rig
        await store.aclose()


async def test_every_field_works_or_is_inert_or_is_refused_as_the_docs_say(rig):
    for route, samples in openai_fields.SAMPLES.items():
        missing = set(openai_fields.client_fields(route)) - samples.keys()
        assert not missing, f"{route}: say in tests/support/openai_fields.py how to try {sorted(missing)}"
    page = await openai_fields.page(rig)
    if os.environ.get("KILN_WRITE_DOCS"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "out of date, run make docs"
