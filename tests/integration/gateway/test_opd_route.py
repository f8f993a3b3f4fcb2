"""POST /v1/train/opd: what reaches the trainer of prompts, of completions, and of the teacher."""

import pytest
import redis.asyncio

from tests.support.gateway import FakeEngine, gateway_rig
from tests.support.redis_server import private_redis

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def rig(tmp_path, server):
    client = redis.asyncio.from_url(server.url, socket_timeout=1, socket_connect_timeout=1)
    await client.flushall()
    async with gateway_rig(tmp_path, redis=client) as rig:
        yield rig
    await client.aclose()


async def opd(rig, **fields):
    response = await rig.post("/v1/train/opd", {"adapter": "pupil", "teacher": "base", **fields})
    assert response.status_code == 202, response.text
    return response.json(), rig.trainer.submitted[-1]


async def test_prompts_are_rendered_as_chat_would(rig):
    chat = (await rig.chat(return_token_ids=True)).json()
    _, request = await opd(rig, prompts=["Hi", [USER], {"messages": [USER]}])
    rendered = [list(prompt.token_ids) for prompt in request.opd.prompts]
    assert rendered == [chat["prompt_token_ids"]] * 3
    assert not request.opd.rollouts


async def test_prompts_follow_the_thinking_that_was_asked_for(rig):
    chat = (await rig.chat(return_token_ids=True, reasoning_effort="none")).json()
    _, request = await opd(rig, prompts=["Hi"], rollout={"reasoning_effort": "none"})
    assert list(request.opd.prompts[0].token_ids) == chat["prompt_token_ids"]


async def test_settings_reach_the_trainer_and_come_back(rig):
    rollout = {"n": 4, "max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "top_k": -1}
    job, request = await opd(
        rig,
        prompts=["Hi"],
        divergence={"type": "jsd", "beta": 0.3},
        rollout={**rollout, "prompts_per_step": 2, "refresh_every": 3, "stop_token_ids": [5]},
    )
    settings = request.opd.settings
    assert (settings.divergence, settings.beta) == ("jsd", 0.3)
    assert (settings.samples_per_prompt, settings.prompts_per_step, settings.refresh_every) == (4, 2, 3)
    sampling = settings.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (40, 0.8, 0.9, 0)
    assert sampling.repetition_penalty == 1
    assert list(sampling.stop_token_ids) == [5]  # the engine's own end tokens include the turn's
    config = job["effective_config"]
    assert config["divergence"] == {"type": "jsd", "beta": 0.3}
    assert config["rollout"]["refresh_every"] == 3
    assert config["teacher"] == "base"
    assert job["kind"] == "opd"
    # A document is a prompt and what may follow it.
    assert request.config.batch_tokens == 8192
    assert request.config.gradient_accumulation == 0


async def test_a_teacher_is_fixed_at_the_version_its_name_means_now(rig):
    rig.registry.add("wise")
    rig.registry.add("wise")
    job, request = await opd(rig, teacher="wise", prompts=["Hi"])
    assert request.opd.settings.teacher == job["effective_config"]["teacher"] == "wise@2"
    _, request = await opd(rig, teacher="wise@1", prompts=["Hi"])
    assert request.opd.settings.teacher == "wise@1"


async def test_the_base_models_id_is_the_bare_base_model_as_a_teacher(rig):
    rig.registry.add("attached", attach=True)
    _, request = await opd(rig, teacher="kiln/tiny", prompts=["Hi"])
    assert request.opd.settings.teacher == "base"


async def test_another_engines_model_is_named_to_the_trainer(rig):
    job, request = await opd(rig, teacher={"model": "Qwen/Qwen3.5-9B"}, prompts=["Hi"])
    settings = request.opd.settings
    assert (settings.teacher, settings.teacher_model.model_id) == ("", "Qwen/Qwen3.5-9B")
    assert settings.teacher_model.top_k == 64
    # The trainer knows the engines: which weights the name means is for it to say.
    assert settings.teacher_model.model_hash == ""
    shown = job["effective_config"]["teacher"]
    assert (shown["model"], shown["top_k"]) == ("Qwen/Qwen3.5-9B", 64)
    pinned = {"model": "big", "sha256": "ab" * 32, "top_k": 8}
    job, request = await opd(rig, teacher=pinned, prompts=["Hi"])
    assert request.opd.settings.teacher_model.top_k == 8
    assert job["effective_config"]["teacher"] == pinned


async def test_completions_by_text_by_id_and_by_tokens(rig):
    rig.engine.script = lambda request: f"answer {request.request_id[-1]}"
    answer = (await rig.chat(n=3, return_token_ids=True, temperature=0)).json()
    ids = [choice["token_ids"] for choice in answer["choices"]]
    job, request = await opd(
        rig,
        groups=[
            {"rollouts": [{"completion_id": answer["id"], "index": 2}]},
            {"prompt": "Hi", "completions": ["answer 0", "made up"]},
            {
                "messages": [USER],
                "rollouts": [{"token_ids": [3, 4], "logprobs": [-0.5, -1], "finish_reason": "length"}],
            },
        ],
    )
    by_id, by_text, made_up, by_tokens = request.opd.rollouts
    assert list(by_id.completion_token_ids) == ids[2]
    assert list(by_text.completion_token_ids) == ids[0]
    assert list(by_id.prompt_token_ids) == answer["prompt_token_ids"]
    # At temperature 1, whatever it was drawn at: greedy completions can be judged too.
    assert list(by_id.logprobs) == [FakeEngine.logprob_of(place) for place in range(len(ids[2]))]
    assert rig.tokenizer.decode(list(made_up.completion_token_ids)) == "made up<|im_end|>"
    assert list(by_tokens.logprobs) == [-0.5, -1]
    assert [rollout.is_truncated for rollout in request.opd.rollouts] == [False, False, False, True]
    assert job["sources"] == {"rollout": 2, "retokenised": 1, "token_ids": 1}
    assert "rollout" not in job["effective_config"]


async def test_the_same_key_and_body_are_the_same_job(rig):
    body = {"adapter": "pupil", "teacher": "base", "prompts": ["Hi"]}
    first, second = [
        await rig.http.post("/v1/train/opd", json=body, headers={"Idempotency-Key": "k"}) for _ in range(2)
    ]
    assert first.json()["id"] == second.json()["id"]
    assert len(rig.trainer.submitted) == 1


async def test_truncated_completions_of_a_group_are_marked(rig):
    rig.engine.script = lambda request: "one two three four five six seven eight"
    cut = (await rig.chat(n=2, max_tokens=3)).json()
    whole = (await rig.chat(n=2)).json()
    groups = [
        {"rollouts": [{"completion_id": answer["id"], "index": index, "reward": index} for index in (0, 1)]}
        for answer in (cut, whole)
    ]
    response = await rig.post(
        "/v1/train/grpo",
        {"adapter": "a", "groups": groups, "loss": {"type": "dapo", "mask_truncated_completions": True}},
    )
    assert response.status_code == 202, response.text
    spec = rig.trainer.submitted[-1].grpo
    assert spec.loss.mask_truncated_completions
    # The bounds are the loss's own: the trainer knows them.
    assert (spec.loss.type, spec.loss.clip_high) == ("dapo", 0)
    truncated = [[rollout.is_truncated for rollout in group.rollouts] for group in spec.groups]
    assert truncated == [[True, True], [False, False]]
