"""Adapter routes over a registry that runs: gateway and registry are real, the engine is scripted."""

import asyncio
import json

import pytest

from kiln_gateway.evals.evaluator import Evaluator
from tests.support.gateway import gateway_rig
from tests.support.registry import MODEL_HASH, adapter_bytes, publish_header, running_registry


@pytest.fixture
async def rig(tmp_path):
    async with (
        running_registry(tmp_path / "registry") as registry,
        gateway_rig(tmp_path, registry=registry) as rig,
    ):
        rig.engine.base_model.model_hash = MODEL_HASH
        yield rig


async def publish(rig, name="mine", seed=0, **fields):
    return await rig.registry.publish(publish_header(name, **fields), adapter_bytes(seed=seed))


def prompt_of(rig, request):
    return rig.tokenizer.decode(list(request.prompt_token_ids))


async def get(rig, path, status=200):
    response = await rig.http.get(path)
    assert response.status_code == status, response.text
    return response.json()


async def test_a_version_says_where_it_comes_from(rig):
    await publish(rig)
    lineage = {"parent_name": "mine", "parent_version": 1, "job_id": "job_1", "data_sha256": "5a" * 32}
    await publish(rig, seed=1, **lineage)
    first, second = (await get(rig, "/v1/adapters/mine"))["versions"]
    assert (first["parent"], first["job_id"], first["data_sha256"]) == (None, None, None)
    assert (second["parent"], second["job_id"], second["data_sha256"]) == ("mine@1", "job_1", "5a" * 32)


async def test_rewards_of_other_versions_stand_beside_the_metrics_of_the_version(rig):
    await publish(rig)
    rewards = {"mine@1": {"mean": 0.5, "num_completions": 8}}
    metrics = json.dumps({"loss": 1.5, "rewards_by_version": rewards})
    await publish(rig, seed=1, metrics_json=metrics, parent_name="mine", parent_version=1)
    first, second = (await get(rig, "/v1/adapters/mine"))["versions"]
    assert (first["metrics"], first["rewards_by_version"]) == ({}, {})
    assert (second["metrics"], second["rewards_by_version"]) == ({"loss": 1.5}, rewards)
    assert [*(await get(rig, "/v1/adapters/mine/diff"))["metrics"]] == ["loss"]


async def test_a_diff_is_with_the_parent_unless_said_otherwise(rig):
    await publish(rig, metrics_json='{"loss": 2.0, "eval": {"sums": 0.5}, "note": "x"}')
    parent = {"parent_name": "mine", "parent_version": 1}
    await publish(rig, seed=1, metrics_json='{"loss": 1.5, "eval": {"sums": 0.75}}', **parent)
    await publish(rig, seed=2, parent_name="mine", parent_version=2)
    diff = await get(rig, "/v1/adapters/mine/diff?to=2")
    assert (diff["from"], diff["to"], diff["parent"]) == ("mine@1", "mine@2", "mine@1")
    assert diff["metrics"] == {
        "eval.sums": {"from": 0.5, "to": 0.75, "delta": 0.25},
        "loss": {"from": 2.0, "to": 1.5, "delta": -0.5},
    }
    total = diff["total"]
    assert total["cosine"] == total["cosine_to_parent"] == pytest.approx(total["cosine"])
    (layer,) = diff["layers"]
    assert layer["layer"] == 0
    assert len(layer["modules"]) == 3
    for norm in ("norm_from", "norm_to", "norm_change"):
        squares = sum(module[norm] ** 2 for module in layer["modules"])
        assert total[norm] == pytest.approx(layer[norm]) == pytest.approx(squares**0.5)
    # The law of cosines holds for the sums too.
    expected = total["norm_from"] ** 2 + total["norm_to"] ** 2
    expected -= 2 * total["cosine"] * total["norm_from"] * total["norm_to"]
    assert total["norm_change"] ** 2 == pytest.approx(expected)

    chosen = await get(rig, "/v1/adapters/mine/diff?from=1")
    assert (chosen["from"], chosen["to"], chosen["parent"]) == ("mine@1", "mine@3", "mine@2")
    assert chosen["total"]["cosine_to_parent"] != chosen["total"]["cosine"]
    assert chosen["metrics"]["loss"] == {"from": 2.0, "to": None, "delta": None}
    same = await get(rig, "/v1/adapters/mine/diff?from=2&to=2")
    assert (same["total"]["norm_change"], same["total"]["cosine"]) == (pytest.approx(0, abs=1e-9), 1.0)


async def test_a_version_without_a_parent_is_compared_with_the_base_model(rig):
    await publish(rig)
    diff = await get(rig, "/v1/adapters/mine/diff")
    assert (diff["from"], diff["parent"]) == (None, None)
    total = diff["total"]
    assert (total["norm_from"], total["cosine"], total["cosine_to_parent"]) == (0.0, None, None)
    assert total["norm_change"] == pytest.approx(total["norm_to"])
    # So is one whose parent was deleted.
    await publish(rig, seed=1, parent_name="mine", parent_version=1)
    await rig.http.delete("/v1/adapters/mine@1")
    assert (await get(rig, "/v1/adapters/mine/diff"))["from"] is None


async def test_a_diff_has_the_newest_scores_of_both_versions(rig):
    await publish(rig)
    await publish(rig, seed=1, parent_name="mine", parent_version=1)
    cases = [{"prompt": f"Case {n}?", "scorer": {"type": "exact", "target": "yes"}} for n in range(4)]
    await rig.post("/v1/evals/suites", {"name": "answers", "cases": cases})
    ids = []
    for adapter, right in (("mine@1", 3), ("mine@1", 1), ("mine@2", 3), ("base", 4)):
        rig.engine.script = lambda request, right=right: (
            "yes" if any(f"Case {n}?" in prompt_of(rig, request) for n in range(right)) else "no"
        )
        gateway = rig.app.state.gateway
        async with Evaluator(gateway, gateway.clients.evaluations, concurrency=4, poll_s=0.01).working():
            run = (await rig.post("/v1/evals/runs", {"suite": "answers", "adapter": adapter})).json()
            async with asyncio.timeout(60):
                while (await get(rig, f"/v1/evals/runs/{run['id']}"))["status"] != "succeeded":
                    await asyncio.sleep(0.01)
        ids.append(run["id"])
    (found,) = (await get(rig, "/v1/adapters/mine/diff"))["evaluations"]
    assert (found["suite"], found["delta"]) == ("answers@1", 0.5)
    assert (found["from"]["run"], found["from"]["mean"]) == (ids[1], 0.25)
    assert (found["to"]["run"], found["to"]["mean"]) == (ids[2], 0.75)
    await rig.http.delete("/v1/adapters/mine@1")
    (found,) = (await get(rig, "/v1/adapters/mine/diff"))["evaluations"]
    assert (found["from"]["run"], found["delta"]) == (ids[3], -0.25)


async def test_a_diff_of_what_is_not_there_is_refused(rig):
    await publish(rig)
    for path, status, code in (
        ("nobody/diff", 404, "adapter_not_found"),
        ("mine/diff?to=9", 404, "adapter_not_found"),
        ("mine/diff?from=9", 404, "adapter_not_found"),
        ("mine/diff?from=x", 400, "invalid_value"),
        ("mine/diff?form=1", 400, "unknown_field"),
    ):
        assert (await get(rig, f"/v1/adapters/{path}", status))["error"]["code"] == code


async def test_a_merge_becomes_a_version_that_names_its_sources(rig):
    await publish(rig, "a")
    await publish(rig, "a", seed=1)
    await publish(rig, "b", seed=2)
    body = {
        "sources": [{"name": "a@1", "weight": 0.7}, {"name": "a"}, {"name": "b", "weight": -1}],
        "mode": "concat",
        "output": "all",
    }
    headers = {"Idempotency-Key": "once"}
    response = await rig.post("/v1/adapters/merge", body, headers=headers)
    merged = response.json()
    assert (response.status_code, merged["id"], merged["rank"]) == (201, "all@1", 6)
    sources = [{"id": "a@1", "weight": 0.7}, {"id": "a@2", "weight": 1.0}, {"id": "b@1", "weight": -1.0}]
    assert merged["merged_from"] == {"mode": "concat", "sources": sources}
    assert (await rig.chat(model="all")).headers["X-Kiln-Adapter"] == "all@1"
    again = await rig.post("/v1/adapters/merge", body, headers=headers)
    assert again.json() == merged
    # The sources may go; where the version came from stays known.
    await rig.http.delete("/v1/adapters/b")
    assert (await get(rig, "/v1/adapters/all"))["versions"] == [merged]
    other = await rig.post("/v1/adapters/merge", {**body, "output": "x", "sources": [{"name": "a"}]})
    assert (other.json()["id"], other.json()["rank"]) == ("x@1", 2)


async def test_a_merge_that_makes_no_sense_names_the_field_at_fault(rig):
    await publish(rig, "a")
    body = {"sources": [{"name": "a"}], "mode": "ties", "output": "m"}
    for fields, code, param in (
        ({"sources": []}, "invalid_value", "sources"),
        ({"sources": [{"name": "a", "weight": 0}]}, "invalid_value", "sources"),
        ({"sources": [{"name": "nobody"}]}, "adapter_not_found", "sources"),
        ({"mode": "average"}, "invalid_value", "mode"),
        ({"mode": "linear", "density": 0.5}, "invalid_value", "density"),
        ({"density": 0.0}, "invalid_value", "density"),
        ({"output": "base"}, "reserved_adapter_name", "output"),
        ({"rank": 4}, "unknown_field", "rank"),
    ):
        error = (await rig.post("/v1/adapters/merge", {**body, **fields})).json()["error"]
        assert (error["code"], error["param"]) == (code, param), fields
        assert error["hint"]
    assert [entry["name"] for entry in (await get(rig, "/v1/adapters"))["data"]] == ["a"]
