"""Keys, scopes, hosts and origins."""

import pytest
from pydantic import ValidationError

from kiln_gateway.settings import ApiKey, GatewaySettings
from tests.support.gateway import gateway_rig

KEYS = (
    ApiKey(key="infer-key-0123456789", scopes=("infer",)),
    ApiKey(key="train-key-0123456789", scopes=("infer", "train")),
    ApiKey(key="admin-key-0123456789", scopes=("infer", "train", "admin")),
)
GRPO = {"adapter": "a", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path, api_keys=KEYS) as rig:
        yield rig


def bearer(name):
    return {"Authorization": f"Bearer {name}-key-0123456789"}


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}])
async def test_without_a_known_key_there_is_no_answer(rig, headers):
    for path in ("/v1/chat/completions", "/v1/train/grpo"):
        response = await rig.post(path, {}, headers=headers)
        error = response.json()["error"]
        assert (response.status_code, error["type"]) == (401, "authentication_error")
    assert (await rig.http.get("/healthz")).status_code == 200
    assert (await rig.http.get("/health")).status_code == 401


async def test_keys_do_what_their_scopes_say(rig):
    assert (await rig.chat()).status_code == 401
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert (await rig.post("/v1/chat/completions", body, headers=bearer("infer"))).status_code == 200
    refused = await rig.post("/v1/train/grpo", GRPO, headers=bearer("infer"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")
    refused = await rig.post("/v1/adapters/detach", headers=bearer("train"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
    assert (await rig.post("/v1/adapters/detach", headers=bearer("admin"))).status_code == 200


async def test_only_admins_attach_what_they_train(rig):
    for name, fields, attach in (
        ("train", {}, False),
        ("admin", {}, True),
        ("train", {"attach": True}, None),
    ):
        response = await rig.post("/v1/train/grpo", {**GRPO, **fields}, headers=bearer(name))
        if attach is None:
            assert response.json()["error"]["code"] == "scope_missing"
        else:
            assert response.json()["effective_config"]["attach"] is attach


async def test_jobs_belong_to_their_key_and_admins_see_all(rig):
    mine = (await rig.post("/v1/train/grpo", GRPO, headers=bearer("admin"))).json()["id"]
    path = f"/v1/train/jobs/{mine}"
    for method, suffix in (
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/receipt"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
    ):
        answer = await rig.http.request(method, path + suffix, headers=bearer("train"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    theirs = (await rig.post("/v1/train/grpo", GRPO, headers=bearer("train"))).json()["id"]
    for route in ("jobs", "queue"):
        for name, ids in (("train", {theirs}), ("admin", {mine, theirs})):
            listed = (await rig.http.get(f"/v1/train/{route}", headers=bearer(name))).json()["data"]
            assert {job["id"] for job in listed} == ids


async def test_only_admins_go_before_others(rig):
    for name, priority, status in (("train", 5, 202), ("train", -1, 403), ("admin", -10, 202)):
        body = {**GRPO, "priority": priority}
        assert (await rig.post("/v1/train/grpo", body, headers=bearer(name))).status_code == status
    late = await rig.post("/v1/train/grpo", {**GRPO, "priority": 11}, headers=bearer("admin"))
    assert (late.status_code, late.json()["error"]["param"]) == (400, "priority")


async def test_a_retry_keeps_no_right_that_the_key_does_not_have(rig):
    job = (await rig.post("/v1/train/grpo", GRPO, headers=bearer("train"))).json()
    kept = rig.trainer.jobs[job["id"]]
    kept.status = "failed"
    # As it was when the key still was an admin's.
    kept.config.attach = rig.trainer.submitted[0].config.attach = True
    kept.config.priority = rig.trainer.submitted[0].config.priority = -3
    path = f"/v1/train/jobs/{job['id']}/retry"
    effective = (await rig.post(path, headers=bearer("train"))).json()["effective_config"]
    assert (effective["attach"], effective["priority"]) == (False, 0)
    effective = (await rig.post(path, headers=bearer("admin"))).json()["effective_config"]
    assert (effective["attach"], effective["priority"]) == (True, -3)


async def test_keys_do_not_share_cached_prefixes(rig):
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    for name in ("infer", "train"):
        await rig.post("/v1/chat/completions", body, headers=bearer(name))
    first, second = rig.engine.requests
    assert first.cache_salt != second.cache_salt
    assert "infer-key" not in first.cache_salt


async def test_only_known_hosts_and_origins_are_answered(tmp_path):
    async with gateway_rig(tmp_path, allowed_origins=("https://app.example",)) as rig:

        async def status(**headers):
            return (await rig.http.get("/healthz", headers=headers)).status_code

        assert await status(Host="localhost:8420") == 200
        assert await status(Host="[::1]:8420") == 200  # loopback names need no setting
        assert await status(Host="evil.example") == 403
        assert await status(Host="localhost:8420", Origin="http://localhost:8420") == 200
        assert await status(Host="localhost", Origin="https://evil.example") == 403
        assert await status(Host="localhost", Origin="null") == 403
        assert await status(Host="localhost", Origin="https://app.example") == 200
        response = await rig.http.get("/healthz", headers={"Origin": "https://app.example"})
        assert "access-control-allow-origin" not in response.headers


async def test_request_ids_are_echoed_or_made(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        given = await rig.http.get("/healthz", headers={"X-Request-Id": "abc-1"})
        assert given.headers["X-Request-Id"] == "abc-1"
        made = await rig.http.get("/healthz", headers={"X-Request-Id": "bad id"})
        assert made.headers["X-Request-Id"].startswith("req_")


def test_without_keys_only_loopback_is_listened_on(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_GATEWAY_MODEL_PATH", str(tmp_path))
    monkeypatch.setenv("KILN_GATEWAY_HOST", "0.0.0.0")
    with pytest.raises(ValidationError, match="not loopback"):
        GatewaySettings()
    monkeypatch.setenv("KILN_GATEWAY_ALLOW_PUBLIC_BIND", "true")
    assert GatewaySettings().host == "0.0.0.0"
    monkeypatch.delenv("KILN_GATEWAY_ALLOW_PUBLIC_BIND")
    monkeypatch.setenv("KILN_GATEWAY_API_KEYS", '[{"key": "0123456789abcdef", "scopes": ["infer"]}]')
    assert GatewaySettings().api_keys[0].scopes == ("infer",)


def test_settings_read_lists_and_unset_values_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_GATEWAY_MODEL_PATH", str(tmp_path))
    monkeypatch.setenv("KILN_GATEWAY_ENGINE_ADDRESSES", "a:1, unix:/b")
    monkeypatch.setenv("KILN_GATEWAY_ENABLE_THINKING_DEFAULT", "")
    settings = GatewaySettings()
    assert settings.engine_addresses == ("a:1", "unix:/b")
    assert settings.enable_thinking_default is None
    monkeypatch.setenv("KILN_GATEWAY_ENABLE_THINKING_DEFAULT", "false")
    assert GatewaySettings().enable_thinking_default is False
