"""OpenAI's Responses API on the same engine requests as chat."""

import json

import pytest
import redis.asyncio

from kiln_common.errors import GrammarNotSupported
from tests.support.gateway import gateway_rig
from tests.support.redis_server import private_redis

TOOL = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        yield rig


@pytest.fixture
async def keeping_rig(tmp_path):
    """A rig with Redis, where responses are kept."""
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url)
        async with gateway_rig(tmp_path, redis=store) as rig:
            yield rig
        await store.aclose()


async def send(rig, **fields):
    return await rig.post("/v1/responses", {"model": "base", "input": "Hi", **fields})


async def stream(rig, **fields):
    response = await send(rig, stream=True, **fields)
    assert response.status_code == 200, response.text
    lines = response.text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in events]
    return events


def prompt_of(rig):
    return rig.tokenizer.decode(list(rig.engine.requests[-1].prompt_token_ids))


def same_but_for_ids(response):
    """A response without what is drawn anew each time."""
    names = ("id", "call_id", "created_at", "completed_at")
    output = [{k: v for k, v in item.items() if k not in names} for item in response["output"]]
    return {**{k: v for k, v in response.items() if k not in names}, "output": output}


async def test_text_is_answered_with_a_message_item(rig):
    response = await send(rig, instructions="Be kind.", max_output_tokens=20, temperature=0.5)
    body = response.json()
    assert (body["object"], body["status"]) == ("response", "completed")
    assert body["id"].startswith("resp_")
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"][0]["text"] == "Hello there!"
    assert body["usage"]["output_tokens"] == 5
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 5
    assert "Be kind." in prompt_of(rig)
    assert rig.engine.requests[-1].sampling.max_tokens == 20
    assert response.headers["X-Kiln-Adapter"] == "base"


async def test_a_stream_ends_with_the_whole_response(rig):
    rig.engine.script = lambda request: "I think.\n</think>\n\nLet me look.\n\n" + CALL
    fields = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}}
    whole = (await send(rig, **fields)).json()
    events = await stream(rig, **fields)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == "response.completed"
    final = events[-1]["response"]
    assert same_but_for_ids(final) == same_but_for_ids(whole)
    assert [item["type"] for item in final["output"]] == ["reasoning", "message", "function_call"]
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    for kind, text in (
        ("response.reasoning_text", "I think."),
        ("response.output_text", "Let me look."),
        ("response.function_call_arguments", '{"city": "Oslo"}'),
    ):
        assert "".join(event["delta"] for event in events if event["type"] == f"{kind}.delta") == text
        (end,) = [event for event in events if event["type"] == f"{kind}.done"]
        assert text in (end.get("text"), end.get("arguments"))
        assert end["item_id"] == final["output"][end["output_index"]]["id"]


async def test_items_reach_the_model_as_in_chat(rig):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "c", "output": "rain"},
    ]  # fmt: skip
    await send(rig, input=items, tools=[TOOL], instructions="Be kind.")
    from_items = prompt_of(rig)
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "rain"},
    ]
    function = {"name": TOOL["name"], "parameters": TOOL["parameters"]}
    await rig.chat(messages=chat, tools=[{"type": "function", "function": function}])
    assert from_items == prompt_of(rig)


async def test_a_response_that_hit_its_limit_is_incomplete(rig):
    body = (await send(rig, max_output_tokens=2)).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    assert (await stream(rig, max_output_tokens=2))[-1]["type"] == "response.incomplete"


async def test_a_conversation_goes_on_from_a_kept_response(keeping_rig):
    rig = keeping_rig
    rig.engine.script = lambda request: CALL
    first = (await send(rig, input="Weather?", tools=[TOOL], instructions="Be kind.")).json()
    call = first["output"][0]
    rig.engine.script = lambda request: "It rains."
    output = [{"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}]
    second = (await stream(rig, input=output, tools=[TOOL], previous_response_id=first["id"]))[-1]["response"]
    assert second["previous_response_id"] == first["id"]
    prompt = prompt_of(rig)
    assert prompt.index("Weather?") < prompt.index("Oslo") < prompt.index("rain")
    assert "Be kind." not in prompt  # instructions are each request's own
    third = (await send(rig, input="And now?", previous_response_id=second["id"])).json()
    prompt = prompt_of(rig)
    assert prompt.index("Weather?") < prompt.index("It rains.") < prompt.index("And now?")
    assert (await rig.http.get(f"/v1/responses/{third['id']}")).json() == third
    assert (await rig.http.delete(f"/v1/responses/{third['id']}")).json()["deleted"] is True
    assert (await rig.http.get(f"/v1/responses/{third['id']}")).status_code == 404
    ttl_s = await rig.redis.ttl(f"kiln:response:{second['id']}")
    assert 0 < ttl_s <= rig.settings.response_ttl_s


async def test_a_response_is_not_kept_when_asked_and_not_for_others(tmp_path):
    keys = [{"key": f"{name}-key-of-16-chars", "scopes": ["infer"]} for name in "ab"]
    headers = [{"Authorization": f"Bearer {key['key']}"} for key in keys]
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url)
        async with gateway_rig(tmp_path, redis=store, api_keys=keys) as rig:
            body = {"model": "base", "input": "Hi"}
            kept = (await rig.post("/v1/responses", body, headers=headers[0])).json()
            dropped = (await rig.post("/v1/responses", {**body, "store": False}, headers=headers[0])).json()
            for response_id, caller, status in (
                (kept["id"], 0, 200),
                (kept["id"], 1, 404),
                (dropped["id"], 0, 404),
            ):
                following = {**body, "previous_response_id": response_id}
                response = await rig.post("/v1/responses", following, headers=headers[caller])
                assert response.status_code == status, response.text
                if status == 404:
                    error = response.json()["error"]
                    assert (error["code"], error["param"]) == ("response_not_found", "previous_response_id")
                    assert error["hint"]
            assert not await store.exists(f"kiln:response:{dropped['id']}")
        await store.aclose()


async def test_what_responses_cannot_do_is_refused_by_name(rig):
    cases = [
        ({"input": []}, "empty_messages", "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_content", "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "unsupported_content", "input[0].content"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_tool", "tools[0]"),
        ({"tool_choice": {"type": "mcp"}}, "unsupported_tool", "tool_choice"),
        ({"background": True}, "unsupported_field", "background"),
        ({"conversation": "conv_1"}, "unsupported_field", "conversation"),
        ({"truncation": "auto"}, "unsupported_field", "truncation"),
        ({"top_logprobs": 3}, "unsupported_field", "top_logprobs"),
        ({"text": {"verbosity": "low"}}, "unsupported_field", "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "missing_field", "text.format"),
        ({"max_output_token": 5}, "unknown_field", "max_output_token"),
        ({"input": "x" * 2000}, "prompt_too_long", "input"),
        ({"stream_options": {}}, "invalid_value", "stream_options"),
    ]  # fmt: skip
    for fields, code, param in cases:
        response = await send(rig, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"] or "") == (400, code, param), error
        assert error["hint"], error
    assert (await send(rig, previous_response_id="resp_x")).json()["error"]["code"] == "queue_unavailable"
    assert rig.engine.requests == []


async def test_what_the_engine_refuses_is_named_in_this_apis_words(rig):
    wanted = {"type": "json_schema", "name": "x", "schema": {"type": "object"}}
    for streams in (False, True):
        rig.engine.fail_after, rig.engine.failure = 0, GrammarNotSupported("no such keyword")
        response = await send(rig, text={"format": wanted}, stream=streams)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "grammar_not_supported")
        assert error["param"] == "text.format"


async def test_an_answer_that_the_engine_gave_up_is_an_error_and_not_kept(keeping_rig):
    keeping_rig.engine.abort_after = 2
    response = await send(keeping_rig)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "answer_aborted")
    response = await send(keeping_rig, stream=True)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["error"]["code"] == "answer_aborted"
    begun = events[0]["response"]["id"]
    assert (await keeping_rig.http.get(f"/v1/responses/{begun}")).status_code == 404
    chat = (await keeping_rig.chat()).json()
    assert chat["choices"][0]["finish_reason"] == "abort"
