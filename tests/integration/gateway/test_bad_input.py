"""Each way a request can be wrong has its own answer, and nothing reaches the engine or the trainer."""

import json

import pytest

from kiln_gateway.request_query import refuse_unknown_query
from tests.support.gateway import gateway_rig

CHAT, TEXT, GRPO, SFT = "/v1/chat/completions", "/v1/completions", "/v1/train/grpo", "/v1/train/sft"
USER = {"role": "user", "content": "Hi"}
SHORT = {"adapter": "a", "prompt": "Hi", "completions": ["x", "y"], "rewards": [1, 0]}
EMBED, BATCH = "/v1/embeddings", "/v1/completions/batch"
OPD = "/v1/train/opd"
UNFINISHED = {"model": "base", "max_tokens": 4, "messages": [{"role": "assistant", "content": "Hel"}]}
DISTIL = {"adapter": "a", "teacher": "base", "prompts": ["p"]}
GIVEN = {"adapter": "a", "teacher": "base", "groups": [{"prompt": "p", "completions": ["x"]}]}
SCORED = {"prompt": "p", "completions": [{"text": "x", "reward": 1}, {"text": "y", "reward": 0}]}


def tool(name, properties=None, **function):
    parameters = {"type": "object", "properties": properties or {}}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **function}}


TOOL = tool("look")


def without(body, *names, **changes):
    return {key: value for key, value in {**body, **changes}.items() if key not in names}


def rollout(**fields):
    return {"adapter": "a", "groups": [{"rollouts": [{"reward": 1, **fields}, {"reward": 0, **fields}]}]}


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path, max_body_bytes=20_000) as rig:
        yield rig
    assert rig.engine.requests == []
    assert rig.trainer.submitted == []
    assert rig.registry.published == []


BODIES = [
    (CHAT, {}, 400, "missing_field", "messages"),
    (CHAT, {"messages": []}, 400, "empty_messages", "messages"),
    (CHAT, {"messages": [USER], "temprature": 1}, 400, "unknown_field", "temprature"),
    (CHAT, {"messages": [{**USER, "colour": 1}]}, 400, "unknown_field", "messages[0].colour"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_value", "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "unsupported_content", "messages[0].content"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_messages", "messages"),
    (CHAT, {"messages": [USER], "temperature": 3}, 400, "invalid_value", "temperature"),
    (CHAT, {"messages": [USER], "temperature": "1"}, 400, "invalid_value", "temperature"),
    (CHAT, {"messages": [USER], "top_p": 0}, 400, "invalid_value", "top_p"),
    (CHAT, {"messages": [USER], "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (CHAT, {"messages": [USER], "n": 1000}, 400, "invalid_value", "n"),
    (CHAT, {"messages": [USER], "top_logprobs": 21}, 400, "invalid_value", "top_logprobs"),
    (CHAT, {"messages": [USER], "stop": ["x"] * 17}, 400, "invalid_value", "stop"),
    (CHAT, {"messages": [USER], "stop": ""}, 400, "invalid_value", "stop"),
    (CHAT, {"messages": [USER], "stop_token_ids": [10**6]}, 400, "invalid_token_ids", "stop_token_ids"),
    (CHAT, {"messages": [USER], "logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    (CHAT, {"messages": [USER], "logit_bias": {"9" * 5000: 1}}, 400, "invalid_value", "logit_bias"),
    (CHAT, {"messages": [USER], "top_k": 2**31}, 400, "invalid_value", "top_k"),
    (CHAT, {"messages": [USER], "tool_choice": 5}, 400, "invalid_value", "tool_choice"),
    (CHAT, {"messages": [USER], "logit_bias": {"99999": 1}}, 400, "invalid_token_ids", "logit_bias"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "prompt_too_long", "messages"),
    (CHAT, {"messages": [USER], "model": "nobody"}, 404, "model_not_found", "model"),
    (CHAT, {"messages": [USER], "adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
    (CHAT, {"messages": [USER], "adapters": [{"name": "x", "scale": 0}]}, 400, "invalid_scale", "adapters[0]"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema"}}, 400, "invalid_value", "response_format.json_schema"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": 'a"b'}}}, 400, "invalid_value", "response_format.json_schema.name"),
    (CHAT, {"messages": [USER], "response_format": {"type": "json_schema", "json_schema": {"name": "a", "shema": {}}}}, 400, "unknown_field", "response_format.json_schema.shema"),
    (CHAT, {"messages": [USER], "structured_outputs": {"regex": "a", "choice": ["a"]}}, 400, "conflicting_fields", "structured_outputs"),
    (CHAT, {"messages": [USER], "structured_outputs": {}}, 400, "conflicting_fields", "structured_outputs"),
    (CHAT, {"messages": [USER], "structured_outputs": {"choice": []}}, 400, "invalid_value", "structured_outputs.choice"),
    (CHAT, {"messages": [USER], "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, 400, "invalid_value", "structured_outputs"),
    (CHAT, {"messages": [USER], "structured_outputs": {"grammar": "start: w\nw: /a/"}, "tools": [TOOL]}, 400, "invalid_value", "structured_outputs"),
    (CHAT, {"messages": [USER], "tool_choice": "required"}, 400, "invalid_value", "tool_choice"),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, 400, "invalid_value", "tool_choice"),
    (CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": {"type": "any"}}, 400, "invalid_value", "tool_choice"),
    (CHAT, {"messages": [USER], "tools": [tool('say "hi"')]}, 400, "invalid_value", "tools[0].function.name"),
    (CHAT, {"messages": [USER], "tools": [tool("f", {"a>b": {"type": "string"}})], "tool_choice": "required"}, 400, "grammar_not_supported", "tools"),
    (CHAT, {"messages": [USER], "tools": [tool("f", {"a": {"$ref": "#/$defs/nope"}})], "tool_choice": "required"}, 400, "grammar_not_supported", "tools"),
    (CHAT, {"messages": [USER], "tools": [tool("f", {"a": {"$ref": "#/properties/a"}})], "tool_choice": "required"}, 400, "grammar_not_supported", "tools"),
    (CHAT, {"messages": [USER], "tools": [tool("f", {"a": {"type": "string", "pattern": "^a|b$"}}, strict=True)]}, 400, "grammar_not_supported", "tools"),
    (CHAT, {"messages": [USER], "thinking_budget_tokens": -1}, 400, "invalid_value", "thinking_budget_tokens"),
    (CHAT, {"messages": [USER], "stop_token_ids": [1] * 2000}, 400, "invalid_value", "stop_token_ids"),
    (CHAT, {"messages": [USER], "adapter_policy": "newest"}, 400, "invalid_value", "adapter_policy"),
    (CHAT, {"messages": [USER], "model": "a@1", "adapter_policy": "latest"}, 400, "unsupported_field", "adapter_policy"),
    (CHAT, {"messages": [USER], "adapters": [{"name": "a@1"}], "adapter_policy": "latest"}, 400, "unsupported_field", "adapter_policy"),
    (CHAT, {"messages": [USER], "functions": []}, 400, "unsupported_field", "functions"),
    (CHAT, {"messages": [USER], "modalities": ["audio"]}, 400, "unsupported_field", "modalities"),
    (TEXT, {"prompt": ""}, 400, "empty_prompt", "prompt"),
    (TEXT, {"prompt": [1, -1]}, 400, "invalid_token_ids", "prompt"),
    (TEXT, {"prompt": [10**6]}, 400, "invalid_token_ids", "prompt"),
    (TEXT, {"prompt": [1, "a"]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": "a", "suffix": "b"}, 400, "unsupported_field", "suffix"),
    (TEXT, {"prompt": "a", "prompt_logprobs": 21}, 400, "invalid_value", "prompt_logprobs"),
    (TEXT, {"prompt": "a", "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    (EMBED, {"input": []}, 400, "empty_prompt", "input"),
    (EMBED, {"input": ["a", ""]}, 400, "empty_prompt", "input"),
    (EMBED, {"input": [[1], "a", 2]}, 400, "invalid_value", "input"),
    (EMBED, {"input": ["a"] * 2049}, 400, "invalid_value", "input"),
    (EMBED, {"input": [10**6]}, 400, "invalid_token_ids", "input"),
    (EMBED, {"input": "x" * 2000}, 400, "prompt_too_long", "input"),
    (EMBED, {"input": "a", "dimensions": 0}, 400, "invalid_value", "dimensions"),
    (EMBED, {"input": "a", "adapter": "a", "adapters": [{"name": "a"}]}, 400, "unsupported_field", "adapters"),
    (BATCH, {"prompts": []}, 400, "empty_prompt", "prompts"),
    (BATCH, {"prompts": [[]]}, 400, "empty_messages", "prompts[0].messages"),
    (BATCH, {"prompts": [[USER]], "n": 5000}, 400, "invalid_value", "prompts"),
    (BATCH, {"prompts": [[USER], {"messages": [USER], "adapter": "nobody"}]}, 404, "adapter_not_found", "prompts[1].adapter"),
    (BATCH, {"prompts": [[USER]], "adapter": "nobody"}, 404, "adapter_not_found", "adapter"),
    (BATCH, {"prompts": [[USER], [{"role": "user", "content": "x" * 2000}]]}, 400, "prompt_too_long", "prompts[1].messages"),
    (BATCH, {"prompts": [[USER]], "messages": []}, 400, "unknown_field", "messages"),
    ("/v1/detokenize", {"tokens": [10**6]}, 400, "invalid_token_ids", "tokens"),
    ("/v1/tokenize", {}, 400, "conflicting_fields", "text"),
    (GRPO, without(SHORT, "rewards"), 400, "missing_rewards", "rewards"),
    (GRPO, {**SHORT, "rewards": [1, None]}, 400, "missing_rewards", "rewards[1]"),
    (GRPO, {**SHORT, "rewards": [1, "good"]}, 400, "invalid_reward", "rewards[1]"),
    (GRPO, {**SHORT, "rewards": [1, 10**400]}, 400, "invalid_reward", "rewards[1]"),
    (GRPO, {**SHORT, "rewards": [1, {"a": 1e308, "b": 1e308}]}, 400, "invalid_reward", "rewards[1]"),
    (GRPO, {**SHORT, "rewards": [1]}, 400, "length_mismatch", "rewards"),
    (GRPO, {**SHORT, "completions": ["x"], "rewards": [1]}, 400, "group_too_small", "completions"),
    (GRPO, {**SHORT, "rewards": [1, 1]}, 400, "no_learning_signal", "rewards"),
    (GRPO, {"adapter": "a", "groups": []}, 400, "empty_groups", "groups"),
    (GRPO, {"adapter": "a", "groups": [{}]}, 400, "conflicting_fields", "groups[0]"),
    (GRPO, {**SHORT, "groups": [SCORED]}, 400, "conflicting_fields", "prompt"),
    (GRPO, {"adapter": "a", "groups": [{"prompt": "p", "completions": [{"text": "x", "reward": 1}]}]}, 400, "group_too_small", "groups[0]"),
    (GRPO, rollout(token_ids=[1, 2], prompt_token_ids=[1], logprobs=[-1]), 400, "length_mismatch", "groups[0].rollouts[0]"),
    (GRPO, rollout(token_ids=[10**6], prompt_token_ids=[1]), 400, "invalid_token_ids", "token_ids"),
    (GRPO, rollout(completion_id="chatcmpl_x"), 503, "queue_unavailable", None),  # this rig has no Redis
    (GRPO, {**SHORT, "adapter": "base"}, 400, "reserved_adapter_name", "adapter"),
    (GRPO, {**SHORT, "adapter": "../etc"}, 400, "invalid_adapter_name", "adapter"),
    (GRPO, {**SHORT, "base_adapter": "nobody"}, 404, "adapter_not_found", "base_adapter"),
    (GRPO, {**SHORT, "learning_rate": 0}, 400, "invalid_value", "learning_rate"),
    (GRPO, {**SHORT, "learning_rate": 1e9}, 400, "invalid_value", "learning_rate"),
    (SFT, {"adapter": "a", "examples": [], "learning_rate": 1.01}, 400, "invalid_value", "learning_rate"),
    (GRPO, {**SHORT, "lora": {"rank": 1000}}, 400, "invalid_value", "lora.rank"),
    (GRPO, {**SHORT, "lora": {"rnk": 8}}, 400, "unknown_field", "lora.rnk"),
    (GRPO, {**SHORT, "loss": {"type": "ppo"}}, 400, "invalid_value", "loss.type"),
    (GRPO, {**SHORT, "gate": {}}, 400, "missing_field", "gate.suite"),
    (GRPO, {**SHORT, "gate": {"suite": "x", "min_score": 2}}, 400, "invalid_value", "gate.min_score"),
    (GRPO, {**SHORT, "gate": {"suite": "nothing", "min_score": 1}}, 404, "eval_suite_not_found", "gate.suite"),
    (GRPO, {**SHORT, "publish": "never", "gate": {"suite": "x", "min_score": 1}}, 400, "invalid_value", "gate"),
    (GRPO, {**SHORT, "webhook": {"url": "http://x"}}, 400, "missing_field", "webhook.secret"),
    (GRPO, {**SHORT, "webhook": {"url": "http://x", "secret": "short"}}, 400, "invalid_value", "webhook.secret"),
    (SFT, {"adapter": "a"}, 400, "missing_field", "examples"),
    (SFT, {"adapter": "a", "examples": []}, 400, "empty_examples", "examples"),
    (SFT, {"adapter": "a", "examples": [{"prompt": "x"}]}, 400, "conflicting_fields", "examples[0]"),
    (SFT, {"adapter": "a", "examples": [{"messages": [USER]}]}, 400, "no_assistant_message", "examples"),
    (OPD, without(DISTIL, "teacher"), 400, "missing_field", "teacher"),
    (OPD, {**DISTIL, "teacher": {"address": "other:8431", "model": "m"}}, 400, "unknown_field", "teacher.address"),
    (OPD, {**DISTIL, "teacher": {"model": "m", "top_k": 257}}, 400, "invalid_value", "teacher.top_k"),
    (OPD, {**DISTIL, "teacher": "nobody"}, 404, "adapter_not_found", "teacher"),
    (OPD, {**DISTIL, "teacher": {"top_k": 3}}, 400, "invalid_value", "teacher"),
    (OPD, {**DISTIL, "teacher": 5}, 400, "invalid_value", "teacher"),
    (OPD, without(DISTIL, "prompts"), 400, "missing_field", "prompts"),
    (OPD, {**DISTIL, "prompts": []}, 400, "invalid_value", "prompts"),
    (OPD, {**DISTIL, "prompts": ["p"] * 4097}, 400, "invalid_value", "prompts"),
    (OPD, {**DISTIL, "prompts": ["p", ""]}, 400, "empty_prompt", "prompts[1].prompt"),
    (OPD, {**DISTIL, "prompts": [[]]}, 400, "empty_messages", "prompts[0].messages"),
    (OPD, {**DISTIL, "prompts": [{"prompt": "p", "messages": [USER]}]}, 400, "conflicting_fields", "prompts[0]"),
    (OPD, {**DISTIL, "groups": [{"prompt": "p", "completions": ["x"]}]}, 400, "conflicting_fields", "prompts"),
    (OPD, {**GIVEN, "rollout": {"n": 2}}, 400, "conflicting_fields", "rollout"),
    (OPD, {**GIVEN, "groups": [{"completions": ["x"]}]}, 400, "missing_field", "groups[0]"),
    (OPD, {**GIVEN, "groups": [{"prompt": "p"}]}, 400, "conflicting_fields", "groups[0]"),
    (OPD, {**GIVEN, "groups": [{"prompt": "p", "completions": []}]}, 400, "invalid_value", "groups[0].completions"),
    (OPD, {**GIVEN, "groups": [{"rollouts": [{"completion_id": "x", "reward": 1}]}]}, 400, "unknown_field", "groups[0].rollouts[0].reward"),
    (OPD, {**DISTIL, "divergence": "kl"}, 400, "invalid_value", "divergence.type"),
    (OPD, {**DISTIL, "divergence": {"type": "jsd", "beta": 1}}, 400, "invalid_value", "divergence.beta"),
    (OPD, {**DISTIL, "rollout": {"max_tokens": 0}}, 400, "invalid_value", "rollout.max_tokens"),
    (OPD, {**DISTIL, "rollout": {"stop_token_ids": [10**6]}}, 400, "invalid_token_ids", "stop_token_ids"),
    (OPD, {**DISTIL, "rollout": {"presence_penalty": 1}}, 400, "unknown_field", "rollout.presence_penalty"),
]  # fmt: skip


async def test_wrong_bodies_are_refused_by_code_and_field(rig):
    for path, body, status, code, param in BODIES:
        response = await rig.post(path, body)
        error = response.json()["error"]
        shown = (path, json.dumps(body)[:200], error)
        assert (response.status_code, error["code"], error["param"]) == (status, code, param), shown
        assert error["message"], shown
        assert error["hint"], shown
        assert error["request_id"] == response.headers["X-Request-Id"]


CONTRADICTIONS = [
    (CHAT, {"messages": [USER], "top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    (CHAT, {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "is 5 and max_completion_tokens 6"),
    (CHAT, {"messages": [{**USER, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]}, "messages[0].tool_calls", "role user"),
    (CHAT, {"messages": [USER], "min_tokens": 10, "max_tokens": 5}, "min_tokens", "is 10, and max_tokens allows 5"),
    (CHAT, {"messages": [USER], "min_tokens": 10, "max_completion_tokens": 5}, "min_tokens", "is 10, and max_tokens allows 5"),
    (TEXT, {"prompt": "Hi", "min_tokens": 1, "max_tokens": 0, "echo": True}, "min_tokens", "is 1, and max_tokens allows 0"),
    (CHAT, {"messages": [USER], "stream_options": {}}, "stream_options", "needs stream: true"),
    (TEXT, {"prompt": "Hi", "stream_options": {}, "stream": False}, "stream_options", "needs stream: true"),
    (BATCH, {"prompts": [[USER]], "top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ("/v1/responses", {"input": "Hi", "stream_options": {}}, "stream_options", "needs stream: true"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "says"), CONTRADICTIONS)
async def test_fields_that_contradict_each_other_are_named_without_the_body(rig, path, body, param, says):
    response = await rig.post(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", param)
    assert error["message"].startswith(param.split(".")[-1])
    assert says in error["message"]
    assert "Hi" not in error["message"]
    assert error["hint"].startswith("Change one of the fields")


async def test_the_nearest_known_field_is_named(rig):
    error = (await rig.post(CHAT, {"mesages": [USER]})).json()["error"]
    assert (error["code"], error["hint"]) == ("unknown_field", "Did you mean `messages`?")
    error = (await rig.post(GRPO, {**SHORT, "loss": {"kl": {"coeff": 1}}})).json()["error"]
    assert (error["param"], error["hint"]) == ("loss.kl.coeff", "Did you mean `coef`?")
    error = (await rig.post(GRPO, {**SHORT, "lr": 1e-4})).json()["error"]
    assert error["hint"] == "Did you mean `learning_rate`?"


async def test_a_field_near_no_other_gets_the_list_of_fields(rig):
    for path, body, known in (
        (GRPO, {**SHORT, "foo": 1}, "rewards"),
        (CHAT, {"messages": [USER], "lr": 1}, "seed"),
    ):
        error = (await rig.post(path, body)).json()["error"]
        assert error["hint"].startswith("Leave it out."), error
        assert known in error["hint"]


async def test_where_there_are_no_fields_the_hint_says_so(rig):
    error = (await rig.post("/v1/adapters/detach", {"name": "a"})).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_field", "name")
    assert error["hint"] == "Leave it out: there are no fields here."


async def test_a_learning_rate_that_ruins_the_adapter_is_refused_with_its_number(rig):
    error = (await rig.post(GRPO, {**SHORT, "learning_rate": 1e9})).json()["error"]
    assert "1000000000.0" in error["message"]
    assert "1e-3" in error["hint"]


async def test_the_message_alone_says_what_to_do_about_an_unknown_name(rig):
    for field, route in (("model", "/v1/models"), ("adapter", "/v1/adapters")):
        error = (await rig.chat(**{field: "nobody"})).json()["error"]
        assert "'nobody'" in error["message"]
        assert route in error["message"]


async def test_equal_rewards_are_counted_in_words_that_fit(rig):
    error = (await rig.post(GRPO, {**SHORT, "rewards": [1, 1]})).json()["error"]
    assert error["message"] == "the rewards are equal within the group"
    same = {"prompt": "p", "completions": [{"text": "x", "reward": 1}, {"text": "y", "reward": 1}]}
    error = (await rig.post(GRPO, {"adapter": "a", "groups": [same, same]})).json()["error"]
    assert error["message"] == "the rewards are equal within each of the 2 groups"


async def test_clients_are_told_when_trying_again_is_no_use(rig):
    hopeless = [
        ("POST", "/v1/messages", UNFINISHED, 501),
        ("GET", "/v1/nothing", None, 404),
        ("GET", CHAT, None, 405),
        ("GET", "/v1/adapters/x", None, 404),
    ]
    for method, path, body, status in hopeless:
        response = await rig.http.request(method, path, json=body)
        assert (response.status_code, response.headers["x-should-retry"]) == (status, "false"), path
    rig.trainer.is_up = False
    response = await rig.post(GRPO, SHORT)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    assert "x-should-retry" not in response.headers


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b'{"messages": [', "invalid_json"),
        (b"[1, 2]", "invalid_json"),
        (b"", "invalid_json"),
        (b"\xff\xfe", "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "x"}], "\xed\xa0\x80": 1}', "invalid_json"),
        (b"[" * 15_000, "invalid_json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "invalid_value"),
    ],
)
async def test_bodies_that_are_not_json_are_refused(rig, raw, code):
    response = await rig.http.post(CHAT, content=raw)
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("reward", ["NaN", "Infinity", "-Infinity", '{"a": NaN}'])
async def test_rewards_that_are_not_finite_are_refused(rig, reward):
    raw = json.dumps(SHORT).replace("[1, 0]", f"[1, {reward}]")
    response = await rig.http.post(GRPO, content=raw)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_reward", "rewards[1]")


async def test_a_body_beyond_the_limit_is_refused_declared_or_not(rig):
    large = json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]}).encode()

    async def parts():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for content in (large, parts()):
        response = await rig.http.post(CHAT, content=content)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (413, "body_too_large")
        assert "20000 bytes" in error["message"]


async def test_routes_that_are_not_there_say_so(rig):
    cases = [
        ("GET", "/v1/nothing", 404, "route_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("GET", "/v1/train/jobs/x", 404, "job_not_found"),
        ("GET", "/v1/train/jobs/x/events", 404, "job_not_found"),
        ("GET", "/v1/train/jobs?limit=0", 400, "invalid_value"),
        ("GET", "/v1/adapters/x", 404, "adapter_not_found"),
    ]
    for method, path, status, code in cases:
        response = await rig.http.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code), path
    # What the hint names is there.
    hint = (await rig.http.get("/v1/nothing")).json()["error"]["hint"]
    assert hint.startswith("GET /openapi.json ")
    assert CHAT in (await rig.http.get("/openapi.json")).json()["paths"]


async def test_query_parameters_that_a_route_does_not_take_are_named(rig):
    for path, param, hint in (
        ("/v1/train/jobs?limit=5&newest=1", "newest", "Leave it out. Known here: limit, status"),
        ("/v1/train/jobs?limits=5", "limits", "Did you mean `limit`?"),
        ("/v1/adapters/a/download?versoin=1", "versoin", "Did you mean `version`?"),
    ):
        response = await rig.http.get(path)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "unknown_field", param)
        assert (error["message"], error["hint"]) == (f"there is no query parameter `{param}`", hint)


async def test_every_route_with_query_parameters_refuses_unknown_ones(rig):
    taking = [route for route in rig.app.state.api_routes if route.dependant.query_params]
    assert {route.path for route in taking} >= {"/v1/train/jobs", "/v1/adapters/{name}/download"}
    for route in taking:
        assert refuse_unknown_query in [dependant.call for dependant in route.dependant.dependencies]
