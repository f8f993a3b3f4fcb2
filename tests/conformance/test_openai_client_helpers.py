"""The openai client's own helpers: blocking, streaming, responses, embeddings, parse."""

import asyncio

import openai
import pydantic
import pytest
import redis.asyncio

from tests.support.gateway import build_rig, served
from tests.support.redis_server import private_redis

CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
USER = {"role": "user", "content": "Hi"}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture
async def rig_and_address(tmp_path):
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url)
        rig = build_rig(tmp_path, redis=store, max_model_len=2048)
        async with served(rig) as address:
            yield rig, f"{address}/v1"
        await store.aclose()


@pytest.fixture
async def client(rig_and_address):
    async with openai.AsyncOpenAI(base_url=rig_and_address[1], api_key="unused", max_retries=0) as client:
        yield client


async def test_the_blocking_client_and_its_streams(rig_and_address):
    def use(address):
        with openai.OpenAI(base_url=address, api_key="unused", max_retries=0) as client:
            whole = client.chat.completions.create(model="base", messages=[USER])
            with client.chat.completions.stream(model="base", messages=[USER]) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_completion()
            with client.responses.stream(model="base", input="Hi") as stream:
                text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
                response = stream.get_final_response()
            return whole, kinds, final, text, response, client.embeddings.create(model="base", input="Hi")

    whole, kinds, final, text, response, embedding = await asyncio.to_thread(use, rig_and_address[1])
    assert whole.choices[0].message.content == final.choices[0].message.content == "Hello there!"
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert text == response.output_text == "Hello there!"
    assert response.status == "completed"
    assert len(embedding.data[0].embedding) == 4  # asked for in base64


async def test_streamed_tool_calls_through_the_helper(rig_and_address, client):
    rig, _ = rig_and_address
    rig.engine.script = lambda request: CALL
    function = {"name": "weather", "parameters": PARAMETERS}
    tools = [{"type": "function", "function": function}]
    async with client.chat.completions.stream(model="base", messages=[USER], tools=tools) as stream:
        done = [e async for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    assert [(event.name, event.arguments) for event in done] == [("weather", '{"city": "Oslo"}')]
    assert final.choices[0].finish_reason == "tool_calls"


async def test_a_conversation_of_responses_with_a_tool(rig_and_address, client):
    rig, _ = rig_and_address
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]
    rig.engine.script = lambda request: CALL
    first = await client.responses.create(model="base", input="Weather?", tools=tools)
    (call,) = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"city": "Oslo"}')
    rig.engine.script = lambda request: "It rains."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = await client.responses.create(
        model="base", input=[result], previous_response_id=first.id, tools=tools
    )
    assert second.output_text == "It rains."
    # The same conversation, sent back item by item instead of named.
    items = [{"role": "user", "content": "Weather?"}, *first.output, result, *second.output, USER]
    third = await client.responses.create(model="base", input=items, tools=tools, store=False)
    assert third.output_text == "It rains."
    assert (await client.responses.retrieve(second.id)).output_text == "It rains."
    await client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(second.id)


async def test_responses_that_fail_raise_the_clients_errors(rig_and_address, client):
    rig, _ = rig_and_address
    with pytest.raises(openai.NotFoundError) as refused:
        await client.responses.create(model="base", input="Hi", previous_response_id="resp_x")
    assert refused.value.code == "response_not_found"
    rig.engine.fail_after = 2
    stream = await client.responses.create(model="base", input="Hi", stream=True)
    with pytest.raises(openai.APIError, match="went away"):
        _ = [event async for event in stream]


async def test_parse_gives_an_object_or_says_that_it_is_not_built(rig_and_address, client):
    rig, _ = rig_and_address
    rig.engine.script = lambda request: '{"name": "Ada", "age": 36}'
    for ask in (
        lambda: client.chat.completions.parse(model="base", messages=[USER], response_format=Person),
        lambda: client.responses.parse(model="base", input="Hi", text_format=Person),
    ):
        try:
            answer = await ask()
        except openai.InternalServerError as error:
            assert error.code == "not_implemented"  # noqa: PT017 either is right until it is built
            continue
        parsed = (
            answer.output_parsed if hasattr(answer, "output_parsed") else answer.choices[0].message.parsed
        )
        assert parsed == Person(name="Ada", age=36)


async def test_legacy_completions_with_echo_and_scores(client):
    answer = await client.completions.create(model="base", prompt="Hi", echo=True, logprobs=1, max_tokens=0)
    assert answer.choices[0].text == "Hi"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
