"""adapter_policy latest: the answer says which tokens came from which version, and so does its rollout."""

from __future__ import annotations

import pytest
import redis.asyncio

from kiln_common.bus import keys
from kiln_common.pb import common_pb2, engine_pb2
from kiln_gateway.rollouts import Rollout
from tests.support.gateway import gateway_rig
from tests.support.redis_server import private_redis

SECOND = [common_pb2.AdapterRef(name="helpful", version=2, sha256="helpful2")]
THIRD = [common_pb2.AdapterRef(name="helpful", version=3, sha256="helpful3")]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
async def store(redis_url):
    client = redis.asyncio.from_url(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
async def rig(tmp_path, store):
    async with gateway_rig(tmp_path, redis=store) as rig:
        rig.registry.add("helpful", attach=True)
        rig.engine.script = lambda request: list(range(40, 50))
        yield rig


def span(start: int, end: int, version: int, index: int = 0) -> dict:
    return {"index": index, "start": start, "end": end, "adapter": f"helpful@{version}"}


async def test_the_answer_says_which_version_drew_which_tokens(rig):
    rig.engine.moves = {4: SECOND, 7: THIRD}
    response = await rig.chat(adapter_policy="latest", max_tokens=10, n=2)
    spans = [span(0, 4, 1), span(4, 7, 2), span(7, 10, 3)]
    assert response.json()["kiln"]["version_spans"] == spans + [{**each, "index": 1} for each in spans]
    assert response.headers["X-Kiln-Adapter"] == "helpful@1"  # what it began with
    assert {request.adapter_policy for request in rig.engine.requests} == {engine_pb2.ADAPTER_POLICY_LATEST}


@pytest.mark.parametrize(
    ("path", "fields"), [(CHAT, {"messages": [{"role": "user", "content": "Hi"}]}), (TEXT, {"prompt": "Hi"})]
)
async def test_a_stream_says_it_with_the_last_chunk_of_each_choice(rig, path, fields):
    rig.engine.moves = {4: SECOND}
    body = {**fields, "model": "helpful", "adapter_policy": "latest", "max_tokens": 10, "n": 2}
    chunks = (await rig.stream(path, body))[:-1]
    telling = [chunk for chunk in chunks if "version_spans" in chunk["kiln"]]
    assert all(chunk["choices"][0]["finish_reason"] == "length" for chunk in telling)
    found = sorted((chunk["kiln"]["version_spans"] for chunk in telling), key=lambda spans: spans[0]["index"])
    assert found == [[span(0, 4, 1, i), span(4, 10, 2, i)] for i in range(2)]
    whole = (await rig.post(path, body)).json()
    assert whole["kiln"]["version_spans"] == found[0] + found[1]


async def test_one_that_moved_before_its_first_token_names_the_new_version_alone(rig):
    rig.engine.moves = {0: SECOND}
    answer = (await rig.chat(adapter_policy="latest", max_tokens=10)).json()
    assert answer["kiln"]["version_spans"] == [span(0, 10, 2)]


async def test_a_request_keeps_its_version_unless_it_says_otherwise(rig):
    for fields in ({}, {"adapter_policy": "pin"}):
        answer = (await rig.chat(max_tokens=10, **fields)).json()
        assert answer["kiln"] == {"adapter": "helpful@1"}
    assert {request.adapter_policy for request in rig.engine.requests} == {engine_pb2.ADAPTER_POLICY_PIN}


async def test_rollouts_of_several_versions_are_kept_as_such_and_train(rig, store):
    rig.engine.moves = {4: SECOND}
    answer = (await rig.chat(adapter_policy="latest", max_tokens=10, n=2, temperature=1.0)).json()
    kept = Rollout.from_json(await store.get(keys.rollout(answer["id"], 1)))
    assert kept.version_spans == [
        {"start": 0, "end": 4, "adapter": "helpful@1"},
        {"start": 4, "end": 10, "adapter": "helpful@2"},
    ]
    rollouts = [{"completion_id": answer["id"], "index": index, "reward": index} for index in range(2)]
    response = await rig.post("/v1/train/grpo", {"adapter": "helpful", "groups": [{"rollouts": rollouts}]})
    assert response.status_code == 202, response.text
    sent = rig.trainer.submitted[-1].grpo.groups[0].rollouts
    assert {rollout.adapter_version for rollout in sent} == {"helpful@1,helpful@2"}
    # What each token was drawn with, whoever drew it.
    assert list(sent[0].behaviour_logprobs) == [rig.engine.logprob_of(i) / 2 for i in range(10)]
