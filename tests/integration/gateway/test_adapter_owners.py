"""With keys, adapters belong to the key that made them, and the log says who did what. The registry is real."""

import pytest

from kiln_common.pb import common_pb2, engine_pb2
from kiln_gateway.auth import Caller
from kiln_gateway.insight.feed import Snapshot
from kiln_gateway.routes import events
from kiln_gateway.settings import ApiKey
from tests.support.gateway import gateway_rig
from tests.support.registry import MODEL_HASH, adapter_bytes, peft_config, running_registry

NAMES = {"ann": ("infer", "train"), "ben": ("infer", "train"), "root": ("infer", "train", "admin")}
KEYS = tuple(ApiKey(key=f"{name}-key-0123456789", scopes=scopes) for name, scopes in NAMES.items())
MESSAGES = [{"role": "user", "content": "Hi"}]
SFT = {"examples": [{"prompt": "a", "completion": "b"}]}


class Callers:
    """The rig, asked by one key or another."""

    def __init__(self, rig) -> None:
        self.rig = rig

    async def ask(self, name, method, path, body=None, **options):
        headers = {"Authorization": f"Bearer {name}-key-0123456789"}
        return await self.rig.http.request(method, path, json=body, headers=headers, **options)

    async def upload(self, name, adapter, seed=0):
        files = [
            ("file", ("adapter_model.safetensors", adapter_bytes(seed=seed), "application/octet-stream")),
            ("file", ("adapter_config.json", peft_config().encode(), "application/json")),
        ]
        headers = {"Authorization": f"Bearer {name}-key-0123456789"}
        form = {"name": adapter}
        return await self.rig.http.post("/v1/adapters/upload", files=files, data=form, headers=headers)


@pytest.fixture
async def callers(tmp_path):
    async with (
        running_registry(tmp_path / "registry") as registry,
        gateway_rig(tmp_path, registry=registry, api_keys=KEYS) as rig,
    ):
        rig.engine.base_model.model_hash = MODEL_HASH
        yield Callers(rig)


def uses_of(adapter):
    """Every way to use, change or learn from an adapter, and who may do it by scope."""
    chat = "/v1/chat/completions"
    return [
        ("POST", chat, {"messages": MESSAGES, "model": adapter}),
        ("POST", chat, {"messages": MESSAGES, "adapter": f"{adapter}@1"}),
        ("POST", chat, {"messages": MESSAGES, "adapters": [{"name": adapter}]}),
        ("POST", "/v1/completions", {"prompt": "Hi", "model": adapter}),
        ("POST", "/v1/embeddings", {"input": "Hi", "model": adapter}),
        ("POST", "/v1/messages/count_tokens", {"messages": MESSAGES, "model": adapter}),
        ("GET", f"/v1/models/{adapter}", None),
        ("GET", f"/v1/adapters/{adapter}", None),
        ("GET", f"/v1/adapters/{adapter}/download", None),
        ("GET", f"/v1/adapters/{adapter}/diff", None),
        ("POST", f"/v1/adapters/{adapter}/rollback", {"version": 1}),
        ("POST", "/v1/adapters/merge", {"sources": [{"name": adapter}], "mode": "concat", "output": "m"}),
        ("POST", "/v1/train/sft", {**SFT, "adapter": "new", "base_adapter": adapter}),
        ("POST", "/v1/train/opd", {"adapter": "new", "teacher": adapter, "prompts": ["Hi"]}),
        ("DELETE", f"/v1/adapters/{adapter}", None),
    ]


async def test_another_keys_adapter_is_answered_like_one_that_is_not_there(callers):
    assert (await callers.upload("ann", "anns")).status_code == 201
    for (method, path, body), (_, absent_path, absent_body) in zip(
        uses_of("anns"), uses_of("none"), strict=True
    ):
        found = await callers.ask("ben", method, path, body)
        absent = await callers.ask("ben", method, absent_path, absent_body)
        assert found.status_code == absent.status_code == 404, (path, found.text)
        errors = [response.json()["error"] for response in (found, absent)]
        for error in errors:
            error.pop("request_id", None)  # Anthropic's shape has it elsewhere
        assert errors[0] == {**errors[1], "message": errors[1]["message"].replace("none", "anns")}
    assert callers.rig.trainer.submitted == []
    for path in ("/v1/adapters", "/v1/models"):
        ids = [
            entry.get("id", entry.get("name"))
            for entry in (await callers.ask("ben", "GET", path)).json()["data"]
        ]
        assert not any("anns" in each for each in ids)


@pytest.mark.parametrize("name", ["ann", "root"])
async def test_its_own_key_and_an_admins_may_do_all_of_it(callers, name):
    assert (await callers.upload("ann", "anns")).status_code == 201
    for method, path, body in uses_of("anns"):
        response = await callers.ask(name, method, path, body)
        assert response.status_code < 300, (path, response.text)
    assert (await callers.ask(name, "GET", "/v1/adapters/anns")).status_code == 404  # the last one deleted it


async def test_a_name_gets_new_versions_from_its_own_key_alone(callers):
    assert (await callers.upload("ann", "anns")).status_code == 201
    assert (await callers.upload("ben", "bens")).status_code == 201
    merge = {"sources": [{"name": "bens"}], "mode": "concat", "output": "anns"}
    for response in (
        await callers.upload("ben", "anns"),
        await callers.upload("root", "anns"),
        await callers.ask("ben", "POST", "/v1/adapters/merge", merge),
        await callers.ask("ben", "POST", "/v1/train/sft", {**SFT, "adapter": "anns"}),
        await callers.ask("ben", "POST", "/v1/train/sft", {**SFT, "adapter": "anns", "base_adapter": None}),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (409, "adapter_name_taken"), response.text
    assert (await callers.ask("ann", "POST", "/v1/train/sft", {**SFT, "adapter": "anns"})).status_code == 202
    owners = [request.owner for request in callers.rig.trainer.submitted]
    assert owners == [(await callers.rig.registry.get("anns")).owner]
    assert (await callers.upload("ann", "anns", seed=1)).json()["version"] == 2
    # A name without versions is free again; its numbers go on.
    await callers.ask("ann", "DELETE", "/v1/adapters/anns")
    assert (await callers.upload("ben", "anns")).json()["version"] == 3
    assert (await callers.ask("ann", "GET", "/v1/adapters/anns")).status_code == 404


async def test_a_retry_asks_the_same_of_its_adapters(callers):
    await callers.upload("ann", "anns")
    accepted = await callers.ask("ben", "POST", "/v1/train/sft", {**SFT, "adapter": "bens"})
    retry = f"/v1/train/jobs/{accepted.json()['id']}/retry"
    for changes, status, code in (
        ({"adapter": "anns"}, 409, "adapter_name_taken"),
        ({"base_adapter": "anns@1"}, 404, "adapter_not_found"),
    ):
        response = await callers.ask("ben", "POST", retry, changes)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_the_stream_of_events_shows_a_keys_own_adapters_and_jobs(callers):
    await callers.upload("ann", "anns")
    await callers.ask("ann", "POST", "/v1/train/sft", {**SFT, "adapter": "anns"})
    registry, trainer = callers.rig.registry, callers.rig.trainer
    snapshot = Snapshot(
        {}, {}, {"engines": [], "training": None}, await trainer.list(10), await registry.list(), {}
    )
    owner = (await registry.get("anns")).owner
    for caller, seen in (
        (Caller(owner, frozenset({"train"})), ["adapters", "jobs"]),
        (Caller("other", frozenset({"train"})), []),
        (Caller("other", frozenset({"train", "admin"})), ["adapters", "jobs"]),
    ):
        parts = dict(events._parts(snapshot, caller, events._Changes()))
        assert [name for name in ("adapters", "jobs") if parts.get(name)] == seen


async def test_the_default_is_for_everybody_and_only_an_admin_moves_it(callers):
    for seed in range(2):
        await callers.upload("ann", "anns", seed)
    refused = await callers.ask("ann", "POST", "/v1/adapters/anns/attach")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")
    assert (await callers.ask("root", "POST", "/v1/adapters/anns/attach")).status_code == 200
    answer = await callers.ask("ben", "POST", "/v1/chat/completions", {"messages": MESSAGES})
    assert answer.headers["X-Kiln-Adapter"] == "anns@2"
    back = {"version": 1}
    refused = await callers.ask("ann", "POST", "/v1/adapters/anns/rollback", back)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "default_needs_admin")
    assert (await callers.ask("root", "POST", "/v1/adapters/anns/rollback", back)).status_code == 200
    answer = await callers.ask("ben", "POST", "/v1/chat/completions", {"messages": MESSAGES})
    assert answer.headers["X-Kiln-Adapter"] == "anns@1"
    attached = await callers.ask("ann", "DELETE", "/v1/adapters/anns")
    assert (attached.status_code, attached.json()["error"]["code"]) == (409, "adapter_in_use")


async def test_a_version_that_requests_run_on_is_not_deleted(callers):
    for seed in range(2):
        await callers.upload("ann", "anns", seed)
    version = common_pb2.AdapterRef(name="anns", version=1)
    resident = engine_pb2.ResidentAdapter(adapter=version, num_pins=3)

    async def stats():
        return engine_pb2.EngineStats(resident_adapters=[resident])

    callers.rig.engine.get_stats = stats
    for reference in ("anns", "anns@1"):
        response = await callers.ask("ann", "DELETE", f"/v1/adapters/{reference}")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (409, "adapter_pinned")
        assert "3 running requests use anns@1" in error["message"]
    assert (await callers.ask("ann", "DELETE", "/v1/adapters/anns@2")).status_code == 200
    resident.num_pins = 0
    assert (await callers.ask("ann", "DELETE", "/v1/adapters/anns")).json()["versions"] == 1


async def test_admins_read_who_did_what(callers):
    for seed in range(2):
        await callers.upload("ann", "anns", seed)
    await callers.upload("ben", "bens")
    await callers.ask("root", "POST", "/v1/adapters/anns/attach")
    await callers.ask("root", "POST", "/v1/adapters/anns/rollback", {"version": 1})
    await callers.ask("root", "POST", "/v1/adapters/detach")
    merge = {"sources": [{"name": "bens"}], "mode": "concat", "output": "merged"}
    await callers.ask("ben", "POST", "/v1/adapters/merge", merge)
    await callers.ask("ben", "DELETE", "/v1/adapters/bens")
    assert (await callers.ask("ben", "GET", "/v1/audit")).status_code == 403
    entries = (await callers.ask("root", "GET", "/v1/audit")).json()["data"]
    actors = {entry["actor"] for entry in entries}
    assert len(actors) == 3
    ann, ben, root = entries[-1]["actor"], entries[0]["actor"], entries[2]["actor"]
    seen = [(entry["actor"], entry["action"], entry["adapter"], entry["version"]) for entry in entries]
    assert seen == [
        (ben, "delete", "bens", 1),
        (ben, "merge", "merged", 1),
        (root, "detach", None, None),
        (root, "roll_back", "anns", 1),
        (root, "attach", "anns", 2),
        (ben, "publish", "bens", 1),
        (ann, "publish", "anns", 2),
        (ann, "publish", "anns", 1),
    ]
    assert entries[3]["detail"] == {"default_moved": True}
    page = (
        await callers.ask("root", "GET", f"/v1/audit?adapter=anns&limit=1&before={entries[4]['id']}")
    ).json()
    assert page["data"] == [entries[6]]
    assert (await callers.ask("root", "GET", "/v1/audit?limit=0")).json()["error"]["code"] == "invalid_value"
