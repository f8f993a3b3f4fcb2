"""What a job is warned of: completions that another adapter than the one it trains has drawn."""

import pytest
import redis.asyncio

from tests.support.gateway import gateway_rig
from tests.support.redis_server import private_redis


@pytest.fixture
async def rig(tmp_path):
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url, socket_timeout=1, socket_connect_timeout=1)
        async with gateway_rig(tmp_path, redis=store) as rig:
            yield rig
        await store.aclose()


def groups_of(answer, rewards):
    rollouts = [
        {"completion_id": answer["id"], "index": index, "reward": reward}
        for index, reward in enumerate(rewards)
    ]
    return [{"rollouts": rollouts}]


async def grpo(rig, **fields):
    return await rig.post("/v1/train/grpo", {"learning_rate": 1e-4, **fields})


async def test_a_new_adapter_that_learns_from_anothers_answers_is_warned_of(rig):
    rig.registry.add("helpful", attach=True)
    answer = (await rig.chat(n=2)).json()
    groups = groups_of(answer, [1, 0])
    (warning,) = (await grpo(rig, adapter="kind", groups=groups)).json()["warnings"]
    assert warning["code"] == "sampled_by_another_adapter"
    assert warning["message"].startswith("2 of 2 completions were drawn by helpful@1, and kind ")
    assert '"base_adapter": "helpful@1"' in warning["hint"]
    # What the hint says, and what nobody has to be warned of.
    assert (await grpo(rig, adapter="kind", base_adapter="helpful@1", groups=groups)).json()["warnings"] == []
    assert (await grpo(rig, adapter="helpful", groups=groups)).json()["warnings"] == []
    body = (await grpo(rig, adapter="helpful", base_adapter=None, groups=groups)).json()
    assert body["sampled_by"] == {"helpful@1": 2}
    assert body["warnings"][0]["message"].endswith("helpful starts from the base model")


async def test_answers_of_the_base_model_suit_a_new_adapter_and_not_one_that_goes_on(rig):
    answer = (await rig.chat(n=2)).json()
    job = (await grpo(rig, adapter="kind", groups=groups_of(answer, [1, 0]))).json()
    assert (job["sampled_by"], job["warnings"]) == ({"base": 2}, [])
    record = rig.trainer.jobs[job["id"]]
    record.started_at_s = 101.0  # by now the trainer has found that there is no kind yet
    assert (await rig.http.get(f"/v1/train/jobs/{job['id']}")).json()["warnings"] == []
    record.resolved_base_adapter = "kind@3"  # or that there is
    (warning,) = (await rig.http.get(f"/v1/train/jobs/{job['id']}")).json()["warnings"]
    assert warning["message"] == "2 of 2 completions were drawn by base, and kind goes on from kind@3"
    assert '"base_adapter": null' in warning["hint"]


async def test_only_known_samplers_are_judged_and_older_versions_are_ones_own(rig):
    rollouts = [
        {"token_ids": [3, 4], "prompt_token_ids": [1], "reward": float(i), "adapter_version": version}
        for i, version in enumerate(["kind@1", "kind@2,kind@3", "kind@3+polite@1", None])
    ]
    job = (await grpo(rig, adapter="kind", groups=[{"rollouts": rollouts}])).json()
    assert sum(job["sampled_by"].values()) == 3
    (warning,) = job["warnings"]
    assert warning["message"].startswith("1 of 4 completions were drawn by kind@3+polite@1, and kind ")


@pytest.mark.parametrize(
    ("sampler", "hint"),
    [
        ("old@1,old@2", 'Send "base_adapter": "old@2" to go on from what drew them, or sample from "kind".'),
        ("old@1+polite@1", 'Sample from "kind".'),
        ("base,old@1", 'Sample from "kind".'),
    ],
)
async def test_what_to_start_from_is_one_adapter(rig, sampler, hint):
    rollouts = [
        {"token_ids": [3, 4], "prompt_token_ids": [1], "reward": float(i), "adapter_version": sampler}
        for i in range(2)
    ]
    job = (await grpo(rig, adapter="kind", groups=[{"rollouts": rollouts}])).json()
    (warning,) = job["warnings"]
    assert warning["hint"] == hint


async def opd(rig, **fields):
    return (await rig.post("/v1/train/opd", {"learning_rate": 1e-4, "teacher": "base", **fields})).json()


async def test_a_student_that_learns_on_anothers_answers_is_warned_of(rig):
    rig.registry.add("helpful", attach=True)
    answer = (await rig.chat(n=2)).json()
    by_id = [{"rollouts": [{"completion_id": answer["id"], "index": index} for index in range(2)]}]
    text = answer["choices"][0]["message"]["content"]
    by_text = [{"prompt": "Hi", "completions": [text, "something else"]}]
    by_tokens = [
        {"rollouts": [{"token_ids": [3], "prompt_token_ids": [1], "adapter_version": "helpful@1"}] * 3}
    ]
    for groups, counted in ((by_id, "2 of 2"), (by_text, "1 of 2"), (by_tokens, "3 of 3")):
        job = await opd(rig, adapter="pupil", groups=groups)
        (warning,) = job["warnings"]
        assert warning["code"] == "sampled_by_another_adapter"
        assert warning["message"].startswith(f"{counted} completions were drawn by helpful@1, and pupil ")
        assert job["sampled_by"] == {"helpful@1": int(counted[0])}
    # Its own answers, and its teacher's; what a job samples itself is its own.
    assert (await opd(rig, adapter="helpful", groups=by_id))["warnings"] == []
    assert (await opd(rig, adapter="pupil", teacher="helpful", groups=by_id))["warnings"] == []
    job = await opd(rig, adapter="pupil", prompts=["Hi"])
    assert (job["sampled_by"], job["warnings"]) == ({}, [])
