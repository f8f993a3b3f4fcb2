"""Keys by their hash, replaced while the gateway runs, and limits that hold over several gateways."""

import asyncio
import json
import math
import subprocess
import sys
import time

import pytest
import redis.asyncio
import structlog

from kiln_common.api_keys import ApiKey, InvalidApiKey, KeyLimits, KeyRing, KeysFileUnusable, digest_of
from kiln_gateway.errors import LimitsNeedRedis
from kiln_gateway.evals.evaluator import Evaluator
from tests.support.gateway import gateway_rig
from tests.support.redis_server import private_redis

OLD, NEW = "old-key-0123456789", "new-key-0123456789"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def entry(key, name="team", **fields):
    return {"name": name, "sha256": digest_of(key), **fields}


def write(path, entries):
    """As an editor does: a new file in the old one's place."""
    partial = path.with_suffix(".new")
    partial.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    partial.replace(path)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


async def status_of(rig, key):
    return (await rig.post("/v1/chat/completions", CHAT, headers=bearer(key))).status_code


@pytest.fixture
def soon(monkeypatch):
    """Look at the file at every request."""
    monkeypatch.setattr("kiln_common.api_keys._LOOK_AGAIN_S", 0.0)


async def test_keys_are_replaced_while_the_gateway_runs(tmp_path, soon):
    path = tmp_path / "keys.json"
    write(path, [entry(OLD)])
    async with gateway_rig(tmp_path, api_keys_file=path) as rig:
        assert (await status_of(rig, OLD), await status_of(rig, NEW)) == (200, 401)
        write(path, [entry(OLD), entry(NEW)])
        assert (await status_of(rig, OLD), await status_of(rig, NEW)) == (200, 200)
        # One owner: what the old key kept is the new one's, and nobody else's.
        assert len({request.cache_salt for request in rig.engine.requests}) == 1
        write(path, [entry(NEW)])
        assert (await status_of(rig, OLD), await status_of(rig, NEW)) == (401, 200)


@pytest.mark.parametrize(
    "broken",
    ["not JSON", json.dumps([{"name": "a", "key": "in-the-clear-0123456789"}]), json.dumps([{"name": "a"}]),
     json.dumps([entry(NEW) | {"sk-secret-0123456789": 1}])],
)  # fmt: skip
async def test_a_file_that_cannot_be_read_leaves_the_keys_as_they_were(tmp_path, soon, broken):
    path = tmp_path / "keys.json"
    write(path, [entry(OLD)])
    ring = KeyRing(file=path)
    write(path, broken)
    with structlog.testing.capture_logs() as lines:
        for _ in range(3):
            assert ring.authenticate(f"Bearer {OLD}").scopes == {"infer"}
            with pytest.raises(InvalidApiKey):
                ring.authenticate(f"Bearer {NEW}")
    assert [line["event"] for line in lines] == ["keys_file_not_read"]
    assert "0123456789" not in repr(lines)
    with pytest.raises(KeysFileUnusable):
        KeyRing(file=path)


def test_a_file_of_no_keys_lets_nobody_in(tmp_path):
    path = tmp_path / "keys.json"
    write(path, [])
    with pytest.raises(InvalidApiKey):
        KeyRing(file=path).authenticate(f"Bearer {OLD}")
    with pytest.raises(KeysFileUnusable):
        KeyRing(file=tmp_path / "missing.json")


def test_the_command_makes_a_key_and_shows_only_its_hash(tmp_path):
    command = [sys.executable, "-m", "kiln_common.new_key", "team", "--scopes", "infer,train"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    key = done.stderr.strip()
    assert key not in done.stdout
    write(tmp_path / "keys.json", f"[{done.stdout}]")
    assert KeyRing(file=tmp_path / "keys.json").authenticate(f"Bearer {key}").scopes == {"infer", "train"}


@pytest.fixture
def store_url(tmp_path):
    with private_redis(tmp_path) as server:
        yield server.url


async def refusal(rig, key):
    response = await rig.post("/v1/chat/completions", CHAT, headers=bearer(key))
    assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limited")
    return int(response.headers["Retry-After"]), response.json()["error"]["message"]


async def test_requests_are_counted_over_all_gateways_together(tmp_path, store_url):
    keys = [
        ApiKey(key=OLD, name="limited", requests_per_minute=6),
        ApiKey(key=NEW, name="limited", requests_per_minute=6),
        ApiKey(key="free-key-0123456789", scopes=("infer", "train")),
    ]
    async with (
        gateway_rig(tmp_path / "a", api_keys=keys, redis=redis.asyncio.from_url(store_url)) as first,
        gateway_rig(tmp_path / "b", api_keys=keys, redis=redis.asyncio.from_url(store_url)) as second,
    ):
        began_s = time.monotonic()
        attempts = [status_of(rig, key) for rig in (first, second) for key in (OLD, NEW) for _ in range(5)]
        statuses = await asyncio.gather(*attempts)
        refilled = math.ceil((time.monotonic() - began_s) * 6 / 60)
        assert 6 <= statuses.count(200) <= 6 + refilled
        assert statuses.count(200) + statuses.count(429) == 20
        retry_after_s, message = await refusal(first, OLD)
        assert 1 <= retry_after_s <= 10
        assert "6 requests per minute" in message
        assert await status_of(first, "free-key-0123456789") == 200
        # Only what does something counts.
        assert (await first.http.get("/v1/models", headers=bearer(OLD))).status_code == 200


async def test_tokens_are_charged_when_they_were_used(tmp_path, store_url):
    keys = [ApiKey(key=OLD, name="quota", tokens_per_day=30)]
    async with gateway_rig(tmp_path, api_keys=keys, redis=redis.asyncio.from_url(store_url)) as rig:
        rig.engine.script = lambda request: "Hello there, thank you for the friendly reply!"
        answer = (await rig.post("/v1/chat/completions", CHAT, headers=bearer(OLD))).json()
        assert answer["usage"]["total_tokens"] > 30
        await rig.app.state.gateway.limits.settle()
        retry_after_s, message = await refusal(rig, OLD)
        # The debt is paid first: 30 tokens flow in over a day.
        owed = answer["usage"]["total_tokens"] - 30 + 1
        assert retry_after_s == pytest.approx(owed * 24 * 3600 / 30, abs=5)
        assert "30 tokens per day" in message


def test_an_owners_limits_are_the_lowest_of_its_keys():
    keys = [ApiKey(key=OLD, name="a", tokens_per_day=30, requests_per_minute=5)]
    keys += [ApiKey(key=NEW, name="a", tokens_per_day=20), ApiKey(key="free-key-0123456789")]
    ring = KeyRing(keys)
    owner, _, free = (key.caller().owner for key in keys)
    assert ring.limits_of(owner) == KeyLimits(requests_per_minute=5, tokens_per_day=20)
    assert ring.limits_of(free) == ring.limits_of("nobody") == KeyLimits()


async def test_an_evaluation_is_held_to_the_token_limits_of_its_key(tmp_path, store_url, monkeypatch):
    monkeypatch.setattr("kiln_gateway.evals.evaluator._PATIENCE_S", 0.0)
    keys = [
        ApiKey(key=OLD, name="quota", scopes=("infer", "train"), requests_per_minute=3, tokens_per_day=30)
    ]
    async with gateway_rig(tmp_path, api_keys=keys, redis=redis.asyncio.from_url(store_url)) as rig:
        case = {"prompt": "Hi", "scorer": {"type": "exact", "target": "Hello there!"}}
        suite = {"name": "many", "cases": [case] * 20}
        assert (await rig.post("/v1/evals/suites", suite, headers=bearer(OLD))).status_code == 201
        run = await rig.post("/v1/evals/runs", {"suite": "many"}, headers=bearer(OLD))
        gateway = rig.app.state.gateway
        evaluator = Evaluator(gateway, gateway.clients.evaluations, concurrency=1, poll_s=0.01)
        async with evaluator.working(), asyncio.timeout(60):
            while (found := await _run(rig, run.json()["id"]))["status"] not in ("succeeded", "failed"):
                await asyncio.sleep(0.01)
        assert (found["status"], found["error"]["code"]) == ("failed", "rate_limited")
        assert "30 tokens per day" in found["error"]["message"]
        assert 1 <= len(rig.engine.requests) < 20


async def _run(rig, run_id):
    return (await rig.http.get(f"/v1/evals/runs/{run_id}", headers=bearer(OLD))).json()


async def test_a_stream_that_is_left_is_charged_for_what_it_had(tmp_path, store_url):
    keys = [ApiKey(key=OLD, name="quota", tokens_per_minute=10)]
    async with gateway_rig(tmp_path, api_keys=keys, redis=redis.asyncio.from_url(store_url)) as rig:
        rig.engine.fail_after = 3
        response = await rig.post("/v1/chat/completions", {**CHAT, "stream": True}, headers=bearer(OLD))
        assert "engine_unavailable" in response.text
        await rig.app.state.gateway.limits.settle()
        await refusal(rig, OLD)


async def test_without_redis_requests_go_on_unlimited_and_the_log_says_so(tmp_path):
    keys = [ApiKey(key=OLD, requests_per_minute=1)]
    nowhere = redis.asyncio.from_url(f"unix://{tmp_path}/nothing.sock")
    async with gateway_rig(tmp_path, api_keys=keys, redis=nowhere) as rig:
        with structlog.testing.capture_logs() as lines:
            assert [await status_of(rig, OLD) for _ in range(3)] == [200] * 3
        assert [line["event"] for line in lines].count("limits_not_checked") == 1
    with pytest.raises(LimitsNeedRedis):
        async with gateway_rig(tmp_path / "none", api_keys=keys):
            pass


async def test_nothing_is_kept_by_default_where_that_was_chosen(tmp_path, store_url):
    store = redis.asyncio.from_url(store_url)
    async with gateway_rig(tmp_path, redis=store, store_default=False) as rig:
        await rig.post("/v1/chat/completions", CHAT)
        created = (await rig.post("/v1/responses", {"input": "Hi"})).json()
        assert created["store"] is False
        assert (await rig.http.get(f"/v1/responses/{created['id']}")).status_code == 404
        assert await store.keys("*") == []
        await rig.post("/v1/chat/completions", {**CHAT, "store": True})
        assert any(key.startswith(b"kiln:rollout:") for key in await store.keys("*"))
