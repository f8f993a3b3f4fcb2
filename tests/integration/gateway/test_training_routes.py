"""Completions become kept rollouts, and rollouts become training jobs, over a real Redis."""

import pytest
import redis.asyncio

from kiln_common.bus import keys
from kiln_common.pb import common_pb2, trainer_pb2
from kiln_common.rpc import from_error_detail
from kiln_gateway.schemas.training import RetryBody
from kiln_gateway.settings import ApiKey
from kiln_gateway.training.retry import PATHS
from tests.support.gateway import FakeEngine, gateway_rig, parse_events
from tests.support.redis_server import private_redis

MESSAGES = [{"role": "user", "content": "Hi"}]
KEYS = (
    ApiKey(key="key-one-0123456789", scopes=("infer", "train")),
    ApiKey(key="key-two-0123456789", scopes=("infer", "train")),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with private_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def store(server):
    client = redis.asyncio.from_url(server.url, socket_timeout=1, socket_connect_timeout=1)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
async def rig(tmp_path, store):
    async with gateway_rig(tmp_path, redis=store) as rig:
        rig.engine.script = lambda request: f"answer {request.request_id[-1]}"
        yield rig


def groups_of(answer, rewards):
    rollouts = [
        {"completion_id": answer["id"], "index": index, "reward": reward}
        for index, reward in enumerate(rewards)
    ]
    return [{"rollouts": rollouts}]


async def grpo(rig, **fields):
    return await rig.post("/v1/train/grpo", {"adapter": "helpful", "learning_rate": 1e-4, **fields})


def submitted(rig):
    return rig.trainer.submitted[-1].grpo.groups[0].rollouts


async def test_rollouts_train_by_reference_with_their_exact_tokens(rig):
    rig.registry.add("helpful", attach=True)
    answer = (await rig.chat(n=3, return_token_ids=True, temperature=0.7)).json()
    response = await grpo(rig, groups=groups_of(answer, [1, 0, 0.5]))
    assert response.status_code == 202
    for index, rollout in enumerate(submitted(rig)):
        assert list(rollout.prompt_token_ids) == answer["prompt_token_ids"]
        assert list(rollout.completion_token_ids) == answer["choices"][index]["token_ids"]
        expected = [FakeEngine.logprob_of(i) / 2 for i in range(len(rollout.completion_token_ids))]
        assert list(rollout.behaviour_logprobs) == expected
        assert (rollout.temperature, rollout.source) == (0.7, "rollout")
        assert (rollout.adapter_version, rollout.completion_id) == ("helpful@1", answer["id"])
        assert rollout.index == index
    assert [rollout.reward for rollout in submitted(rig)] == [1, 0, 0.5]
    body = response.json()
    assert (body["object"], body["status"], body["source"]) == ("training.job", "queued", "rollout")
    assert body["effective_config"]["loss"]["type"] == "grpo"
    assert body["effective_config"]["attach"] is True


async def test_the_short_form_finds_the_rollouts_it_means(rig):
    contents = [(await rig.chat()).json()["choices"][0]["message"]["content"] for _ in range(3)]
    assert contents == ["answer 0"] * 3
    response = await grpo(rig, prompt="Hi", completions=[*contents, "made up"], rewards=[1, 0, 0, 1])
    rollouts = submitted(rig)
    # Three equal completions are three rollouts, each used once; the fourth was never sampled.
    ids = [rollout.completion_id for rollout in rollouts]
    assert len(set(ids[:3])) == 3
    assert [rollout.source for rollout in rollouts] == ["rollout"] * 3 + ["retokenised"]
    assert response.json()["sources"] == {"rollout": 3, "retokenised": 1}
    assert response.json()["source"] == "mixed"
    assert rig.tokenizer.decode(list(rollouts[3].completion_token_ids)) == "made up<|im_end|>"
    assert not rollouts[3].behaviour_logprobs


async def test_thinking_is_part_of_a_rollout_found_by_its_content(rig):
    rig.engine.script = lambda request: "I think.\n</think>\n\nYes."
    answer = (await rig.chat(reasoning_effort="high")).json()
    assert answer["choices"][0]["message"]["content"] == "Yes."
    await grpo(rig, groups=[{"messages": MESSAGES, "completions": [
        {"text": "Yes.", "reward": {"right": 1, "short": 0.5}}, {"text": "No.", "reward": 0}]}])  # fmt: skip
    first = submitted(rig)[0]
    assert rig.tokenizer.decode(list(first.completion_token_ids)).startswith("I think.")
    assert first.reward == 1.5


async def test_a_streams_rollout_is_there_before_its_last_byte(rig, store):
    seen = []
    async with rig.http.stream(
        "POST", "/v1/chat/completions", json={"messages": MESSAGES, "stream": True}
    ) as response:
        async for line in response.aiter_lines():
            if '"finish_reason":"stop"' in line:
                seen = [key async for key in store.scan_iter("kiln:rollout:*")]
    assert len(seen) == 1
    assert 0 < await store.ttl(seen[0]) <= 3600


async def test_store_false_keeps_nothing(rig, store):
    answer = (await rig.chat(n=2, store=False)).json()
    assert [key async for key in store.scan_iter("kiln:rollout*")] == []
    response = await grpo(rig, groups=groups_of(answer, [1, 0]))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "rollout_not_found")
    assert rig.trainer.submitted == []


async def test_a_stopped_rollout_ends_with_the_token_that_completed_the_stop(rig):
    rig.engine.script = lambda request: "one two three four"
    answer = (await rig.chat(n=2, stop="two", return_token_ids=True)).json()
    await grpo(rig, groups=groups_of(answer, [1, 0]))
    text = rig.tokenizer.decode(list(submitted(rig)[0].completion_token_ids))
    assert text.startswith("one two")
    assert "three" not in text


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"presence_penalty": 1}, {"repetition_penalty": 1.1}, {"logit_bias": {"5": 1}}],
)
async def test_rollouts_from_a_distribution_nobody_can_score_are_refused(rig, sampling):
    answer = (await rig.chat(n=2, **sampling)).json()
    response = await grpo(rig, groups=groups_of(answer, [1, 0]))
    assert (response.status_code, response.json()["error"]["code"]) == (400, "off_policy_rollout")
    assert rig.trainer.submitted == []


@pytest.mark.parametrize("temperatures", [(0.7, 0), (0, 0.7), (0, 0.7, 0)])
async def test_a_greedy_rollout_of_the_same_text_does_not_hide_a_sampled_one(rig, temperatures):
    ids = {t: (await rig.chat(temperature=t)).json()["id"] for t in temperatures}
    response = await grpo(rig, prompt="Hi", completions=["answer 0", "x"], rewards=[1, 0])
    assert response.status_code == 202
    found = submitted(rig)[0]
    assert (found.source, found.completion_id, found.temperature) == ("rollout", ids[0.7], 0.7)


async def test_text_known_only_from_untrainable_rollouts_is_tokenised_again(rig):
    await rig.chat(temperature=0)
    await rig.chat(presence_penalty=1)
    await rig.chat(top_p=0.9)
    completions = ["answer 0", "answer 0", "x"]
    fields = {"prompt": "Hi", "completions": completions, "rewards": [1, 1, 0]}
    assert (await grpo(rig, **fields)).status_code == 202
    assert [rollout.source for rollout in submitted(rig)] == ["rollout", "retokenised", "retokenised"]
    uncorrected = await grpo(rig, **fields, loss={"importance": {"mode": "none"}})
    assert uncorrected.json()["sources"] == {"retokenised": 3}
    again = submitted(rig)[0]
    assert rig.tokenizer.decode(list(again.completion_token_ids)) == "answer 0<|im_end|>"
    assert (again.completion_id, list(again.behaviour_logprobs)) == ("", [])


THINKING = {"enable_thinking": True}


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_p": 0.9},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"thinking_budget_tokens": 9, "chat_template_kwargs": THINKING},
    ],
)
async def test_rollouts_that_could_not_take_every_token_are_corrected_or_refused(rig, sampling):
    answer = (await rig.chat(n=2, **sampling)).json()
    groups = groups_of(answer, [1, 0])
    assert (await grpo(rig, groups=groups)).status_code == 202
    assert rig.trainer.submitted[0].grpo.loss.importance_mode == "token"
    refused = await grpo(rig, groups=groups, loss={"importance": {"mode": "none"}})
    assert refused.json()["error"]["code"] == "off_policy_rollout"


async def test_rollouts_belong_to_the_key_that_made_them(tmp_path, store):
    async with gateway_rig(tmp_path, redis=store, api_keys=KEYS) as rig:
        headers = [{"Authorization": f"Bearer {key.key}"} for key in KEYS]
        chat = {"messages": MESSAGES, "n": 2}
        answer = (await rig.post("/v1/chat/completions", chat, headers=headers[0])).json()
        body = {"adapter": "a", "groups": groups_of(answer, [1, 0])}
        refused = await rig.post("/v1/train/grpo", body, headers=headers[1])
        assert refused.json()["error"]["code"] == "rollout_not_found"
        short = {"adapter": "a", "prompt": "Hi", "completions": ["Hello there!", "x"], "rewards": [1, 0]}
        await rig.post("/v1/train/grpo", short, headers=headers[1])
        assert submitted(rig)[0].source == "retokenised"
        assert (await rig.post("/v1/train/grpo", body, headers=headers[0])).status_code == 202


async def test_rollouts_of_another_base_model_are_not_found(rig):
    answer = (await rig.chat(n=2)).json()
    rig.engine.base_model.model_hash = "e" * 64
    await rig.app.state.gateway.engines.probe()
    response = await grpo(rig, groups=groups_of(answer, [1, 0]))
    assert response.json()["error"]["code"] == "rollout_not_found"


async def test_rollouts_stay_within_their_bytes_and_the_oldest_go_first(tmp_path, store):
    async with gateway_rig(tmp_path, redis=store, rollout_max_bytes=3000) as rig:
        answers = [(await rig.chat()).json()["id"] for _ in range(12)]
        sizes = [await store.strlen(keys.rollout(answer, 0)) for answer in answers]
        assert sum(sizes) <= 3000
        assert sizes[-1] > 0
        assert sizes[0] == 0
        is_kept = [size > 0 for size in sizes]
        assert is_kept == sorted(is_kept)
        assert int(await store.get(keys.ROLLOUT_BYTES)) == sum(sizes)


async def test_explicit_tokens_need_no_rollout(rig):
    rollouts = [
        {"token_ids": [5, 6], "logprobs": [-1.0, -2.0], "reward": 1, "adapter_version": "a@3"},
        {"token_ids": [7], "prompt_token_ids": [1, 2], "reward": 0, "temperature": 0.5},
    ]
    assert (await grpo(rig, groups=[{"messages": MESSAGES, "rollouts": rollouts}])).status_code == 202
    first, second = submitted(rig)
    await rig.chat()
    assert list(first.prompt_token_ids) == list(rig.engine.requests[-1].prompt_token_ids)
    assert (list(first.completion_token_ids), list(first.behaviour_logprobs)) == ([5, 6], [-1, -2])
    assert (first.source, first.adapter_version) == ("token_ids", "a@3")
    assert (list(second.prompt_token_ids), second.temperature) == ([1, 2], 0.5)


async def test_sft_learns_answers_and_kept_rollouts(rig):
    answer = (await rig.chat(return_token_ids=True)).json()
    examples = [
        {"messages": [*MESSAGES, {"role": "assistant", "content": "Good day."}], "weight": 0.5},
        {"prompt": "Hi", "completion": answer["choices"][0]["message"]["content"]},
        {"prompt": "Hi", "completion": "never sampled"},
    ]
    response = await rig.post("/v1/train/sft", {"adapter": "polite", "examples": examples, "epochs": 2})
    assert (response.status_code, response.json()["kind"]) == (202, "sft")
    first, second, third = rig.trainer.submitted[0].sft.examples
    learned = [i for i, weight in zip(first.token_ids, first.loss_weights, strict=True) if weight == 0.5]
    assert rig.tokenizer.decode(learned) == "Good day.<|im_end|>"
    assert list(second.token_ids) == answer["prompt_token_ids"] + answer["choices"][0]["token_ids"]
    assert rig.tokenizer.decode(list(third.token_ids)).endswith("never sampled<|im_end|>")
    config = rig.trainer.submitted[0].config
    assert (config.epochs, config.batch_tokens, config.gradient_accumulation) == (2, 8192, 1)


async def test_the_effective_config_is_what_the_trainer_gets(rig):
    body = {
        "prompt": "Hi", "completions": ["a", "b"], "rewards": [True, False], "base_adapter": None,
        "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"], "dropout": 0.1}, "epochs": 3,
        "batch_tokens": 100, "optimizer": "muon", "train_mtp": True,
        "schedule": "cosine", "warmup_ratio": 0.1, "weight_decay": 0.01, "max_grad_norm": 0, "seed": 7,
        "publish": "never", "attach": False, "metadata": {"team": "x"},
        "loss": {"type": "dr_grpo", "kl": {"coef": 0.1, "estimator": "k2"}, "scale_rewards": "none"},
    }  # fmt: skip
    job = (await grpo(rig, **body)).json()
    config = job["effective_config"]
    names = (
        "lora",
        "epochs",
        "batch_tokens",
        "optimizer",
        "train_mtp",
        "schedule",
        "seed",
        "publish",
        "attach",
    )
    for name in names:
        assert config[name] == body[name]
    assert config["max_grad_norm"] == 0
    assert config["loss"]["kl"] == {"coef": 0.1, "estimator": "k2"}
    assert (job["metadata"], job["effective_seed"]) == ({"team": "x"}, 7)
    request = rig.trainer.submitted[0]
    assert request.config.start_fresh
    assert request.base_model_hash == rig.engine.base_model.model_hash


async def test_the_same_key_and_body_make_one_job(rig, store):
    answer = (await rig.chat(n=2)).json()
    groups = groups_of(answer, [1, 0])
    headers = {"Idempotency-Key": "k1"}
    body = {"adapter": "a", "groups": groups}
    first = await rig.post("/v1/train/grpo", body, headers=headers)
    await store.delete(keys.rollout(answer["id"], 0))  # the rollout expires; the answer stays the same
    again = await rig.post("/v1/train/grpo", body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert len(rig.trainer.submitted) == 1
    other = await rig.post("/v1/train/grpo", {**body, "adapter": "b"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


async def test_a_trainer_that_is_slow_to_say_how_it_is_is_waited_for(rig):
    async def too_late():
        return [None]

    async def status():
        return trainer_pb2.TrainerStatus(trainer_id="slow", model_hash="aa")

    rig.trainer.statuses, rig.trainer.status = too_late, status
    found = (await rig.http.get("/v1/train/status")).json()
    assert (found["trainer_id"], found["model_hash"]) == ("slow", "aa")


async def test_jobs_can_be_read_watched_and_cancelled(rig):
    job_id = (await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0])).json()["id"]
    assert (await rig.http.get(f"/v1/train/jobs/{job_id}")).json()["id"] == job_id
    assert [job["id"] for job in (await rig.http.get("/v1/train/jobs")).json()["data"]] == [job_id]
    assert [job["id"] for job in (await rig.http.get("/v1/train/queue")).json()["data"]] == [job_id]
    status = (await rig.http.get("/v1/train/status")).json()
    assert status["queued"] == 1
    assert (status["gpu_sharing"], status["gpu_share"], status["gpu_sms"]) == ("mps", 0.5, 64)
    rig.trainer.events = [
        trainer_pb2.JobEvent(id="1-0", type="queued", at_s=1.0),
        trainer_pb2.JobEvent(id="2-0", type="step", data_json='{"loss": 0.5}', at_s=2.0),
    ]
    text = (await rig.http.get(f"/v1/train/jobs/{job_id}/events")).text
    assert parse_events(text) == [
        {"id": "1-0", "type": "queued", "at_s": 1.0},
        {"loss": 0.5, "id": "2-0", "type": "step", "at_s": 2.0},
    ]
    assert "event: step" in text
    resumed = await rig.http.get(f"/v1/train/jobs/{job_id}/events", headers={"Last-Event-ID": "1-0"})
    assert [event["id"] for event in parse_events(resumed.text)] == ["2-0"]
    cancelled = (await rig.post(f"/v1/train/jobs/{job_id}/cancel")).json()
    assert (cancelled["status"], cancelled["queue_position"]) == ("cancelled", None)


async def test_jobs_are_listed_by_status(rig):
    ids = [
        (await grpo(rig, adapter=name, prompt="Hi", completions=["a", "b"], rewards=[1, 0])).json()["id"]
        for name in "abc"
    ]
    for job_id, status in zip(ids, ("running", "failed", "queued"), strict=True):
        rig.trainer.jobs[job_id].status = status
    listed = await rig.http.get("/v1/train/jobs?status=running&status=failed")
    assert [job["id"] for job in listed.json()["data"]] == [ids[1], ids[0]]
    refused = await rig.http.get("/v1/train/jobs?status=lost")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")


async def test_a_retry_names_the_settings_that_change(rig):
    first = (await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0], epochs=2)).json()
    path = f"/v1/train/jobs/{first['id']}/retry"
    early = await rig.post(path)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_ended")
    rig.trainer.jobs[first["id"]].status = "failed"
    same = await rig.post(path)
    assert (same.status_code, same.json()["retry_of"]) == (202, first["id"])
    assert same.json()["effective_config"] == first["effective_config"]
    assert rig.trainer.submitted[-1].grpo == rig.trainer.submitted[0].grpo
    headers = {"Idempotency-Key": "again"}
    body = {"learning_rate": 0.5, "lora": {"rank": 4}, "base_adapter": None, "metadata": {"run": 2}}
    other = (await rig.post(path, body, headers=headers)).json()
    effective = other["effective_config"]
    assert (effective["learning_rate"], effective["lora"]["rank"], effective["epochs"]) == (0.5, 4, 2)
    assert (other["metadata"], rig.trainer.submitted[-1].config.start_fresh) == ({"run": 2}, True)
    assert (await rig.post(path, body, headers=headers)).json()["id"] == other["id"]
    for fields, code in (
        ({"epochs": 0}, "invalid_value"),
        ({"prompt": "Hi"}, "unknown_field"),
        ({"adapter": "kiln/tiny"}, "invalid_adapter_name"),
    ):
        refused = await rig.post(path, fields)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)


async def test_a_cancel_keeps_or_discards_what_was_published(rig):
    job = (await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0], publish=3)).json()
    assert job["effective_config"]["publish"] == 3
    path = f"/v1/train/jobs/{job['id']}/cancel"
    for body in (None, {"published": "keep"}, {"published": "discard"}):
        assert (await rig.post(path, body)).status_code == 200
    assert [discards for _, discards in rig.trainer.cancels] == [False, False, True]
    refused = await rig.post(path, {"published": "maybe"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "published")


async def test_a_receipt_says_what_an_ended_job_was_made_of(rig):
    job = (await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0], seed=5)).json()
    path = f"/v1/train/jobs/{job['id']}/receipt"
    early = await rig.http.get(path)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_ended")
    kept = rig.trainer.jobs[job["id"]]
    kept.status, kept.base_model_hash, kept.data_sha256 = "succeeded", "m" * 64, "d" * 64
    kept.resolved_base_adapter, kept.base_adapter_sha256 = "helpful@1", "b" * 64
    kept.environment["torch"] = "2.11"
    kept.result.sha256 = "a" * 64
    kept.published.add(step=3, adapter="helpful", version=2, sha256="a" * 64)
    receipt = (await rig.http.get(path)).json()
    assert receipt["model"] == {"sha256": "m" * 64}
    assert receipt["base_adapter"] == {"reference": "helpful@1", "sha256": "b" * 64}
    assert (receipt["data"]["sha256"], receipt["seeds"]) == ("d" * 64, {"job": 5})
    assert receipt["software"] == {"torch": "2.11"}
    assert receipt["effective_config"] == job["effective_config"]
    assert (receipt["result"]["sha256"], receipt["published"][0]["version"]) == ("a" * 64, 2)


async def test_a_webhook_is_shown_without_its_secret_and_a_retry_may_change_it(rig):
    hook = {"url": "https://example.com/hook", "secret": "s" * 16}
    job = (await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0], webhook=hook)).json()
    assert job["webhook"] == {"url": hook["url"], "status": "pending", "attempts": 0, "error": None}
    assert "s" * 16 not in str(job)
    assert rig.trainer.submitted[0].webhook.secret == hook["secret"]
    rig.trainer.jobs[job["id"]].status = "failed"
    path = f"/v1/train/jobs/{job['id']}/retry"
    other = {"url": "https://example.com/other", "secret": "t" * 16}
    for body, url in (({}, hook["url"]), ({"webhook": other}, other["url"]), ({"webhook": None}, None)):
        again = (await rig.post(path, body)).json()
        assert (again["webhook"] and again["webhook"]["url"]) == url


def test_every_setting_can_be_changed_by_a_retry_or_is_not_built_yet():
    assert set(RetryBody.model_fields) - set(PATHS) == {"webhook"}


async def test_what_the_trainer_counts_reaches_the_client(rig):
    detail = common_pb2.ErrorDetail(
        code="job_exceeds_memory", status="OUT_OF_RANGE", details_json='{"total_bytes": 5}'
    )
    rig.trainer.refusal = from_error_detail(detail)
    response = await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0])
    assert (response.status_code, response.json()["error"]["details"]) == (413, {"total_bytes": 5})


async def test_without_a_trainer_a_job_is_a_503(rig):
    rig.trainer.is_up = False
    response = await grpo(rig, prompt="Hi", completions=["a", "b"], rewards=[1, 0])
    assert (response.status_code, response.json()["error"]["code"]) == (503, "trainer_unavailable")
    assert (await rig.chat()).status_code == 200


async def test_chat_goes_on_without_redis_and_readyz_says_so(tmp_path):
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url, socket_timeout=0.5, socket_connect_timeout=0.5)
        async with gateway_rig(tmp_path, redis=store) as rig:
            assert (await rig.http.get("/readyz")).json()["dependencies"]["redis"] == "ok"
            answer = (await rig.chat(n=2)).json()
            server.kill()
            assert (await rig.chat()).status_code == 200
            ready = await rig.http.get("/readyz")
            assert (ready.status_code, ready.json()["dependencies"]["redis"]) == (200, "degraded")
            response = await grpo(rig, groups=groups_of(answer, [1, 0]))
            assert (response.status_code, response.json()["error"]["code"]) == (503, "queue_unavailable")
            server.start()
            assert (await grpo(rig, groups=groups_of(answer, [1, 0]))).status_code == 202
        await store.aclose()
