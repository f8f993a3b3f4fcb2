"""Anthropic's Messages API on the same engine requests as chat."""

import json

import pytest

from kiln_common.errors import GrammarNotSupported
from tests.support.gateway import gateway_rig

TOOL = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        yield rig


async def send(rig, **fields):
    body = {"model": "base", "max_tokens": 64, "messages": [USER], **fields}
    return await rig.post("/v1/messages", body)


async def stream(rig, **fields):
    """(event name, data) of every event."""
    response = await send(rig, stream=True, **fields)
    assert response.status_code == 200, response.text
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


def prompt_of(rig):
    return rig.tokenizer.decode(list(rig.engine.requests[-1].prompt_token_ids))


async def test_a_message_is_answered_with_blocks_and_usage(rig):
    response = await send(rig, system="Be kind.", temperature=0.5, top_k=3, seed=7)
    message = response.json()
    assert message["content"] == [{"type": "text", "text": "Hello there!"}]
    assert (message["type"], message["role"], message["stop_reason"]) == ("message", "assistant", "end_turn")
    assert message["id"].startswith("msg_")
    assert response.headers["X-Kiln-Adapter"] == "base"
    usage = message["usage"]
    num_prompt_tokens = len(rig.engine.requests[-1].prompt_token_ids)
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == num_prompt_tokens
    assert usage["output_tokens"] == 5
    sampling = rig.engine.requests[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.seed) == (64, 0.5, 3, 7)
    assert "Be kind." in prompt_of(rig)


async def test_a_stream_says_the_same_as_the_whole_message(rig):
    rig.engine.script = lambda request: "Let me look.\n\n" + CALL
    whole = (await send(rig, tools=[TOOL], max_tokens=200)).json()
    events = await stream(rig, tools=[TOOL], max_tokens=200)
    assert [name for name, _ in events] == [data["type"] for _, data in events]
    assert events[0][0] == "message_start"
    assert [name for name, _ in events[-2:]] == ["message_delta", "message_stop"]
    content, fragments = [], {}
    for name, data in events:
        if name == "content_block_start":
            assert data["index"] == len(content)
            content.append(data["content_block"])
        elif name == "content_block_delta":
            delta = data["delta"]
            piece = delta["text"] if delta["type"] == "text_delta" else delta["partial_json"]
            fragments[data["index"]] = fragments.get(data["index"], "") + piece
    content[0]["text"], content[1]["input"] = fragments[0], json.loads(fragments[1])
    content[1]["id"] = whole["content"][1]["id"]
    assert content == whole["content"]
    assert content[1]["input"] == {"city": "Oslo"}
    assert events[-2][1]["delta"]["stop_reason"] == whole["stop_reason"] == "tool_use"
    assert events[-2][1]["usage"] == whole["usage"]


async def test_tool_results_and_thinking_reach_the_model_as_in_chat(rig):
    conversation = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I need the weather.", "signature": ""},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "call_1",
                    "content": [{"type": "text", "text": "rain"}],
                },
                {"type": "text", "text": "Should I take a coat?"},
            ],
        },
    ]
    await send(rig, messages=conversation, tools=[TOOL])
    from_messages = prompt_of(rig)
    chat = [
        USER,
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "I need the weather.",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": "Should I take a coat?"},
    ]
    function = {"name": "weather", "parameters": TOOL["input_schema"], "description": TOOL["description"]}
    await rig.chat(messages=chat, tools=[{"type": "function", "function": function}])
    assert from_messages == prompt_of(rig)


async def test_the_model_thinks_only_when_asked(rig):
    rig.engine.script = lambda request: "It is a greeting.\n</think>\n\nHello!"
    await send(rig)
    assert prompt_of(rig).endswith("<think>\n\n</think>\n\n")
    message = (
        await send(rig, thinking={"type": "adaptive"}, chat_template_kwargs={"enable_thinking": True})
    ).json()
    assert prompt_of(rig).endswith("<think>\n")
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]
    assert message["content"][0]["thinking"] == "It is a greeting."
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] > 0


async def test_the_reason_for_the_end_is_told_apart(rig):
    assert (await send(rig, stop_sequences=["there"])).json()["stop_reason"] == "stop_sequence"
    assert (await send(rig, stop_sequences=["there"])).json()["stop_sequence"] == "there"
    assert (await send(rig, max_tokens=2)).json()["stop_reason"] == "max_tokens"
    rig.engine.script = lambda request: [5] * 600
    assert (await send(rig, max_tokens=600)).json()["stop_reason"] == "model_context_window_exceeded"


async def test_counting_tokens_gives_what_the_message_will_use(rig):
    fields = {"messages": [USER], "system": "Be kind.", "tools": [TOOL]}
    counted = (await rig.post("/v1/messages/count_tokens", {"model": "base", **fields})).json()
    assert rig.engine.requests == []
    await send(rig, **fields)
    assert counted == {"input_tokens": len(rig.engine.requests[0].prompt_token_ids)}


async def test_errors_have_anthropics_envelope_and_kilns_code(rig):
    cases = [
        ({"model": "nobody"}, 404, "not_found_error", "model_not_found", "model"),
        ({"messages": []}, 400, "invalid_request_error", "empty_messages", "messages"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "invalid_value", "max_tokens"),
        ({"temprature": 1}, 400, "invalid_request_error", "unknown_field", "temprature"),
        ({"stop_sequences": ["x"] * 17}, 400, "invalid_request_error", "invalid_value", "stop_sequences"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "unsupported_content",
            "messages[0].content",
        ),
        ({"mcp_servers": [{}]}, 400, "invalid_request_error", "unsupported_field", "mcp_servers"),
        (
            {"messages": [{"role": "user", "content": "x" * 2000}]},
            400,
            "invalid_request_error",
            "prompt_too_long",
            "messages",
        ),
    ]
    for fields, status, kind, code, param in cases:
        response = await send(rig, **fields)
        body = response.json()
        assert (response.status_code, body["type"]) == (status, "error"), body
        error = body["error"]
        assert (error["type"], error["code"], error["param"]) == (kind, code, param), body
        assert error["message"]
        assert error["hint"]
        assert body["request_id"] == response.headers["X-Request-Id"]
    response = await rig.http.get("/v1/messages")
    assert (response.status_code, response.json()["type"]) == (405, "error")


async def test_an_error_inside_a_stream_is_an_event_of_its_own(rig):
    rig.engine.fail_after = 2
    events = await stream(rig)
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["type"] == "overloaded_error"
    assert events[-1][1]["error"]["code"] == "engine_unavailable"


async def test_keys_are_taken_from_x_api_key(tmp_path):
    key = {"key": "a-key-of-16-chars", "scopes": ["infer"]}
    async with gateway_rig(tmp_path, api_keys=[key]) as rig:
        body = {"max_tokens": 8, "messages": [USER]}
        response = await rig.post("/v1/messages", body)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        response = await rig.post("/v1/messages", body, headers={"x-api-key": key["key"]})
        assert response.status_code == 200


async def test_what_the_engine_refuses_is_named_in_this_apis_words(rig):
    wanted = {"type": "json_schema", "schema": {"type": "object"}}
    for streams in (False, True):
        rig.engine.fail_after, rig.engine.failure = 0, GrammarNotSupported("no such keyword")
        response = await send(rig, output_config={"format": wanted}, stream=streams)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "grammar_not_supported")
        assert error["param"] == "output_config.format"


async def test_an_answer_begun_by_the_caller_is_refused_by_name(rig):
    body = {"model": "base", "messages": [USER, {"role": "assistant", "content": "Dear"}]}
    for path, fields in (("/v1/messages", {"max_tokens": 8}), ("/v1/messages/count_tokens", {})):
        response = await rig.post(path, {**body, **fields})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (501, "not_implemented", "messages")
        assert error["hint"]
    assert rig.engine.requests == []


async def test_an_answer_that_the_engine_gave_up_is_an_error(rig):
    rig.engine.abort_after = 2
    response = await send(rig)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "answer_aborted")
    events = await stream(rig)
    assert (events[-1][0], events[-1][1]["error"]["code"]) == ("error", "answer_aborted")
    assert "message_stop" not in [name for name, _ in events]
