"""Chat and text completions through the whole gateway, with a scripted engine behind it."""

import asyncio
from dataclasses import replace

import httpx
import pytest

from kiln_common.clients.trainer import TrainerClient
from kiln_common.errors import EngineUnavailable
from kiln_gateway.engine_seat import EngineSeat
from kiln_gateway.trainer_pool import TrainerPool
from tests.support.gateway import BASE_MODEL_ID, FakeEngine, build_rig, gateway_rig, parse_events, served

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
)


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        yield rig


def content_of(events, index=0):
    deltas = [c["delta"] for e in events[:-1] for c in e["choices"] if c["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


async def test_an_answer_has_text_usage_and_the_adapter_that_gave_it(rig):
    rig.registry.add("helpful", attach=True)
    response = await rig.chat(max_tokens=50)
    body = response.json()
    assert response.headers["X-Kiln-Adapter"] == "helpful@1"
    assert body["choices"][0]["message"]["content"] == "Hello there!"
    assert body["choices"][0]["finish_reason"] == "stop"
    num_prompt = len(rig.engine.requests[0].prompt_token_ids)
    assert body["usage"]["prompt_tokens"] == num_prompt
    assert body["usage"]["completion_tokens"] == len(rig.tokenizer.encode("Hello there!")) + 1
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": num_prompt // 2}
    assert body["model"] == BASE_MODEL_ID


async def test_the_stream_says_what_the_whole_answer_says(rig):
    rig.engine.script = lambda request: "Grüße, 世界! 🙂"
    whole = (await rig.chat()).json()
    events = await rig.stream(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "stream_options": {"include_usage": True}},
    )
    assert events[-1] == "[DONE]"
    assert content_of(events) == whole["choices"][0]["message"]["content"] == "Grüße, 世界! 🙂"
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-3]["choices"][0]["finish_reason"] == "stop"
    assert events[-2]["choices"] == []
    assert events[-2]["usage"] == whole["usage"]


async def test_sampling_fields_reach_the_engine(rig):
    await rig.chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.2, logit_bias={"5": 2}, seed=-1, n=2, stop_token_ids=[9], min_tokens=3,
        ignore_eos=True, max_completion_tokens=20, priority=-2, cache_salt="x",
    )  # fmt: skip
    first, second = rig.engine.requests
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 1, -1)
    assert (sampling.repetition_penalty, dict(sampling.logit_bias)) == (1.2, {5: 2})
    assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (3, 20, True)
    assert (list(sampling.stop_token_ids), first.priority, first.cache_salt) == ([9], -2, "x")
    assert (sampling.seed, second.sampling.seed) == (2**64 - 1, 0)
    assert first.num_stable_prefix_tokens > 0


async def test_the_defaults_are_openais(rig):
    await rig.chat()
    request = rig.engine.requests[0]
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (1, 1, 0)
    assert request.sampling.max_tokens == 512 - len(request.prompt_token_ids)
    assert not request.sampling.HasField("seed")


async def test_a_stop_string_ends_text_tokens_and_the_engines_work(rig):
    rig.engine.script = lambda request: "One 🙂 two STOP three four five"
    body = (await rig.chat(stop=["🙂 two S", "never"], return_token_ids=True, logprobs=True)).json()
    choice = body["choices"][0]
    assert choice["message"]["content"] == "One "
    assert choice["finish_reason"] == "stop"
    text = rig.tokenizer.decode(choice["token_ids"])
    assert text.startswith("One 🙂 two S")
    assert "TOP three" not in text
    assert len(choice["token_ids"]) == body["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"])
    assert rig.engine.aborted == [rig.engine.requests[0].request_id]


EARLY_STOP = "One two STOP three four STOP five six"


async def test_a_stop_string_before_min_tokens_is_text(rig):
    rig.engine.script = lambda request: EARLY_STOP
    early = len(rig.tokenizer.encode("One two STOP"))
    for min_tokens, content in (
        (early - 1, "One two "),
        (early, "One two STOP three four "),
        (len(rig.tokenizer.encode(EARLY_STOP)), EARLY_STOP),
    ):
        fields = {"stop": ["STOP"], "min_tokens": min_tokens}
        choice = (await rig.chat(**fields)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (content, "stop")
        asked = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        assert content_of(await rig.stream("/v1/chat/completions", asked)) == content
        choice = (await rig.post("/v1/completions", {"prompt": "Hi", **fields})).json()["choices"][0]
        assert choice["text"] == content


@pytest.mark.parametrize("said", ["One", "One two STOP three"])
async def test_tokens_of_two_engines_count_together_for_min_tokens(rig, said):
    num_said, early = (len(rig.tokenizer.encode(text)) for text in (said, "One two STOP"))
    other = FakeEngine(rig.tokenizer, address="fake:2")
    other.script = rig.engine.script = lambda request: EARLY_STOP
    rig.engine.fail_after = num_said
    rig.app.state.gateway.engines.seats.append(EngineSeat(1, other))
    choice = (await rig.chat(stop=["STOP"], min_tokens=early)).json()["choices"][0]
    assert choice["message"]["content"] == "One two STOP three four "
    (request,) = other.requests
    assert len(request.resumed_token_ids) == num_said


async def test_stop_strings_do_not_end_the_thinking(rig):
    rig.engine.script = lambda request: "First.\n\nSecond.\n</think>\n\nDone.\n\nMore"
    body = (await rig.chat(stop="\n\n", chat_template_kwargs={"enable_thinking": True})).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("First.\n\nSecond.", "Done.")


async def test_reasoning_is_kept_apart_and_counted(rig):
    thought = "I think.\n</think>"
    rig.engine.script = lambda request: thought + "\n\nYes."
    body = (await rig.chat(reasoning_effort="high")).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("I think.", "Yes.")
    details = body["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len(rig.tokenizer.encode(thought))
    events = await rig.stream(
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "reasoning_effort": "high"},
    )
    reasoning = [e["choices"][0]["delta"].get("reasoning_content", "") for e in events[:-1]]
    assert ("".join(reasoning), content_of(events)) == ("I think.", "Yes.")


async def test_tool_calls_are_parsed_and_typed(rig):
    rig.engine.script = lambda request: "I look.\n\n" + CALL
    choice = (await rig.chat(tools=[WEATHER])).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}
    prompt = rig.tokenizer.decode(list(rig.engine.requests[0].prompt_token_ids))
    assert '"name": "weather"' in prompt


async def test_without_tools_a_call_is_text(rig):
    rig.engine.script = lambda request: CALL
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = (await rig.chat(**fields)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


async def test_parallel_tool_calls_false_ends_after_the_first_call(rig):
    rig.engine.script = lambda request: CALL + "\n" + CALL
    choice = (await rig.chat(tools=[WEATHER], parallel_tool_calls=False)).json()["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert rig.engine.aborted


async def test_a_conversation_with_tool_results_goes_back_in(rig):
    rig.engine.script = lambda request: CALL
    message = (await rig.chat(tools=[WEATHER])).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    user = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    response = await rig.chat(messages=[user, message, result], tools=[WEATHER])
    assert response.status_code == 200
    prompt = rig.tokenizer.decode(list(rig.engine.requests[1].prompt_token_ids))
    assert "<parameter=city>\nOslo\n</parameter>" in prompt
    assert "<tool_response>\nrain\n</tool_response>" in prompt


async def test_logprobs_come_with_their_alternatives(rig):
    choice = (await rig.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert first["logprob"] == -0.25
    assert bytes(first["bytes"]).decode() == first["token"]
    assert [top["logprob"] for top in first["top_logprobs"]] == [-1.0, -2.0]


async def test_several_choices_stream_side_by_side(rig):
    rig.engine.script = lambda request: f"answer {request.request_id[-1]}"
    events = await rig.stream(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "n": 3}
    )
    assert [content_of(events, index) for index in range(3)] == ["answer 0", "answer 1", "answer 2"]


async def test_text_completions_take_every_form_of_prompt(rig):
    ids = rig.tokenizer.encode("Hi there")
    for prompt in ("Hi there", ["Hi there"], ids, [ids]):
        body = (await rig.post("/v1/completions", {"prompt": prompt, "echo": True})).json()
        assert body["choices"][0]["text"] == "Hi thereHello there!"
        assert list(rig.engine.requests[-1].prompt_token_ids) == ids
    body = (await rig.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 1})).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert logprobs["token_logprobs"][0] == -0.25
    events = await rig.stream("/v1/completions", {"prompt": "a"})
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "Hello there!"


async def test_names_choose_the_weights(rig):
    rig.registry.add("one")
    rig.registry.add("one")
    rig.registry.add("two", attach=True)
    cases = [
        ({}, "two@1"),
        ({"model": BASE_MODEL_ID}, "two@1"),
        ({"model": "base"}, "base"),
        ({"model": "one"}, "one@2"),
        ({"model": "one@1"}, "one@1"),
        ({"adapter": None}, "base"),
        ({"adapter": "one@1"}, "one@1"),
        ({"model": "one", "adapter": "two"}, "two@1"),
        ({"adapters": [{"name": "one", "scale": 0.5}, {"name": "two"}]}, "one@2+two@1"),
    ]
    for fields, label in cases:
        response = await rig.chat(**fields)
        assert response.headers["X-Kiln-Adapter"] == label, fields
    assert [ref.scale for ref in rig.engine.requests[-1].adapters] == [0.5, 1.0]


async def test_a_new_version_answers_the_next_request(rig):
    rig.registry.add("helpful", attach=True)
    assert (await rig.chat()).headers["X-Kiln-Adapter"] == "helpful@1"
    rig.registry.add("helpful", attach=True)
    assert (await rig.chat()).headers["X-Kiln-Adapter"] == "helpful@2"


async def test_chat_goes_on_with_the_last_default_while_the_registry_is_away(rig):
    rig.registry.is_up = False
    response = await rig.chat()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "registry_unavailable")
    assert (await rig.chat(adapter=None)).status_code == 200
    rig.registry.is_up = True
    rig.registry.add("helpful", attach=True)
    await rig.chat()
    rig.registry.is_up = False
    assert (await rig.chat()).headers["X-Kiln-Adapter"] == "helpful@1"


async def test_an_engine_that_fails_before_the_first_token_is_a_503(rig):
    rig.engine.fail_after = 0
    for stream in (False, True):
        response = await rig.chat(stream=stream)
        assert response.status_code == 503
        assert response.headers["Retry-After"] == "1"
        assert response.json()["error"]["type"] == "unavailable_error"


async def test_an_engine_that_fails_later_ends_the_stream_with_an_error_event(rig):
    rig.engine.fail_after = 2
    response = await rig.chat(stream=True)
    assert response.status_code == 200
    events = parse_events(response.text)
    assert events[-1]["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in events


async def test_one_failing_choice_ends_the_others(rig):
    rig.engine.fail_after = 2
    rig.engine.failure = EngineUnavailable("gone")
    assert (await rig.chat(n=3)).status_code == 503
    assert len(rig.engine.aborted) == 3


async def test_an_engine_that_is_away_is_found_again(rig):
    rig.engine.is_up = False
    assert (await rig.chat()).json()["error"]["code"] == "engine_unavailable"
    ready = await rig.http.get("/readyz")
    assert (ready.status_code, ready.json()["dependencies"]["engine"]) == (503, "degraded")
    rig.engine.is_up = True
    assert (await rig.chat()).status_code == 200
    assert (await rig.http.get("/readyz")).status_code == 200


async def test_one_that_hangs_does_not_speak_for_the_others(rig):
    async def hang():
        await asyncio.Event().wait()

    engine = FakeEngine(rig.tokenizer)
    engine.get_info = hang
    trainer, hanging_trainer = TrainerClient("unix:/nowhere"), TrainerClient("unix:/nowhere")
    trainer.status, hanging_trainer.status = rig.trainer.status, hang
    gateway = rig.app.state.gateway
    gateway.engines.seats.append(EngineSeat(1, engine))
    gateway.clients = replace(gateway.clients, trainer=TrainerPool([hanging_trainer, trainer]))
    ready = await rig.http.get("/readyz")
    assert ready.status_code == 200
    assert {ready.json()["dependencies"][name] for name in ("engine", "trainer")} == {"ok"}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_aborts_its_request(tmp_path, stream):
    rig = build_rig(tmp_path)
    rig.engine.pause_after = 2
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream}
    async with served(rig) as address, httpx.AsyncClient(timeout=30) as http:
        call = asyncio.create_task(http.post(f"{address}/v1/chat/completions", json=body))
        await asyncio.wait_for(rig.engine.paused.wait(), 60)
        call.cancel()
        async with asyncio.timeout(60):
            while not rig.engine.aborted:
                await asyncio.sleep(0.01)
    assert rig.engine.aborted == [rig.engine.requests[0].request_id]


async def test_insight_routes_tell_the_truth(rig):
    await rig.chat()
    health = (await rig.http.get("/health")).json()
    assert health["status"] == "degraded"  # this rig has no Redis
    assert health["dependencies"] == {
        "engine": "ok", "registry": "ok", "trainer": "ok", "redis": "degraded"
    }  # fmt: skip
    stats = (await rig.http.get("/v1/stats")).json()
    assert (stats["engine"]["running"], stats["engine"]["pages_in_use"]) == (1, 7)
    assert (stats["training"]["gpu_sharing"], stats["training"]["gpu_sms"]) == ("mps", 64)
    metrics = (await rig.http.get("/metrics")).text
    assert (
        'kiln_gateway_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0' in metrics
    )
    assert "kiln_gateway_completion_tokens_total" in metrics


async def test_models_list_the_base_first_and_every_version(rig):
    rig.registry.add("helpful")
    rig.registry.add("helpful")
    ids = [entry["id"] for entry in (await rig.http.get("/v1/models")).json()["data"]]
    assert ids == [BASE_MODEL_ID, "helpful", "helpful@1", "helpful@2"]
    assert (await rig.http.get(f"/v1/models/{BASE_MODEL_ID}")).json()["id"] == BASE_MODEL_ID
    assert (await rig.http.get("/v1/models/helpful@2")).json()["version"] == 2
    assert (await rig.http.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"


async def test_text_survives_tokenize_and_detokenize(rig):
    tokens = (await rig.post("/v1/tokenize", {"text": "Grüße <think> 🙂"})).json()
    assert tokens["count"] == len(tokens["tokens"])
    assert (await rig.post("/v1/detokenize", {"tokens": tokens["tokens"]})).json() == {
        "text": "Grüße <think> 🙂"
    }
    messages = [{"role": "user", "content": "Hi"}]
    tokens = (await rig.post("/v1/tokenize", {"messages": messages})).json()["tokens"]
    await rig.chat(messages=messages)
    assert tokens == list(rig.engine.requests[0].prompt_token_ids)
