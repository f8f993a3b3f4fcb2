"""The real openai client against the gateway on a real port."""

import asyncio

import openai
import pytest
import redis.asyncio
import requests

from tests.support.gateway import build_rig, served
from tests.support.redis_server import private_redis

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
async def rig_and_client(tmp_path):
    rig = build_rig(tmp_path, served_model_name="Qwen/Qwen3.5-4B")
    async with served(rig) as address:
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
        yield rig, client
        await client.close()


async def test_chat_whole_and_streamed(rig_and_client):
    _, client = rig_and_client
    messages = [{"role": "user", "content": "Hi"}]
    whole = await client.chat.completions.create(
        model="Qwen/Qwen3.5-4B", messages=messages, n=2, logprobs=True
    )
    assert [choice.message.content for choice in whole.choices] == ["Hello there!"] * 2
    assert whole.choices[0].logprobs.content[0].token
    stream = await client.chat.completions.create(
        model="Qwen/Qwen3.5-4B", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello there!"
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 5


async def test_streamed_tool_calls_have_name_and_arguments(rig_and_client):
    rig, client = rig_and_client
    rig.engine.script = lambda request: (
        "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
    )
    stream = await client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], tools=[TOOL], stream=True
    )
    name, arguments, reasons = "", "", []
    async for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert (name, arguments, reasons[-1]) == ("weather", '{"city": "Oslo"}', "tool_calls")


async def test_errors_arrive_as_the_clients_own_exceptions(rig_and_client):
    rig, client = rig_and_client
    with pytest.raises(openai.NotFoundError, match="no model"):
        await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="base", messages=[])
    assert refused.value.code == "empty_messages"
    rig.engine.fail_after = 2
    stream = await client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    with pytest.raises(openai.APIError):
        _ = [chunk async for chunk in stream]


async def test_the_client_does_not_repeat_a_request_that_is_not_built(rig_and_client):
    _, client = rig_and_client
    seen = []
    raw = client.with_options(max_retries=2)
    raw._client.event_hooks["response"].append(_remember(seen))
    unfinished = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    body = {"model": "base", "max_tokens": 4, "messages": unfinished}
    with pytest.raises(openai.InternalServerError):
        await raw.post("/messages", body=body, cast_to=object)
    assert seen == [501]


def _remember(seen):
    async def on_response(response):
        seen.append(response.status_code)

    return on_response


async def test_completions_and_models(rig_and_client):
    _, client = rig_and_client
    answer = await client.completions.create(model="base", prompt="Hi", logprobs=2)
    assert answer.choices[0].text == "Hello there!"
    assert (await client.models.list()).data[0].id == "Qwen/Qwen3.5-4B"


async def test_the_loop_of_the_readme(tmp_path):
    """Sample, score, post the scores: exactly as a user's script does it, with blocking clients."""

    def loop(address: str) -> requests.Response:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="unused")
        prompt = "Write a short, friendly email reply."
        rollouts = [
            client.chat.completions.create(
                model="Qwen/Qwen3.5-4B", messages=[{"role": "user", "content": prompt}], temperature=1.0, n=1
            )
            .choices[0]
            .message.content
            for _ in range(8)
        ]
        rewards = [float(i % 2) for i, _ in enumerate(rollouts)]
        return requests.post(
            f"{address}/v1/train/grpo",
            json={
                "adapter": "helpful-v3",
                "prompt": prompt,
                "completions": rollouts,
                "rewards": rewards,
                "learning_rate": 1e-4,
            },
            timeout=10,
        )

    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url)
        rig = build_rig(tmp_path, redis=store, served_model_name="Qwen/Qwen3.5-4B")
        async with served(rig) as address:
            response = await asyncio.to_thread(loop, address)
        await store.aclose()
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    (group,) = rig.trainer.submitted[0].grpo.groups
    assert len({rollout.completion_id for rollout in group.rollouts}) == 8
    assert {rollout.source for rollout in group.rollouts} == {"rollout"}
