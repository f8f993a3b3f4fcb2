"""The anthropic client against a gateway: `anthropic_client.py URL built|not-built`."""

import asyncio
import sys

import anthropic

URL = sys.argv[1]
USER = {"role": "user", "content": "Hi"}
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
SHARED = {"model": "base", "max_tokens": 200}


def check_whole_and_streamed(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**SHARED, messages=[USER], system="Be kind.", stop_sequences=["!"])
    assert message.content[0].text == "Hello there"
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "!")
    assert message.usage.output_tokens > 0
    assert message._request_id
    with client.messages.stream(**SHARED, messages=[USER]) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == "Hello there!"
    assert final.stop_reason == "end_turn"
    counted = client.messages.count_tokens(model="base", messages=[USER])
    usage = final.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def check_tool_round_trip(client: anthropic.Anthropic) -> None:
    question = {"role": "user", "content": "Call the tool."}
    with client.messages.stream(**SHARED, messages=[question], tools=[WEATHER]) as stream:
        fragments = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    call = next(block for block in message.content if block.type == "tool_use")
    assert (call.name, call.input, message.stop_reason) == ("weather", {"city": "Oslo"}, "tool_use")
    assert len(fragments) > 1
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "rain"}
    conversation = [
        question,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    answer = client.messages.create(**SHARED, messages=conversation, tools=[WEATHER])
    assert answer.content[0].text == "Hello there!"


def check_thinking(client: anthropic.Anthropic) -> None:
    question = {"role": "user", "content": "Think first."}
    # The template of the model is told to think; Anthropic's clients have no field for that.
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    with client.messages.stream(
        **SHARED, messages=[question], thinking={"type": "adaptive"}, extra_body=extra
    ) as stream:
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking == "A greeting."
    again = [question, {"role": "assistant", "content": message.content}, USER]
    assert client.messages.create(**SHARED, messages=again).content[0].text == "Hello there!"


def check_errors(client: anthropic.Anthropic) -> None:
    for fields, expected in (
        ({"model": "nobody"}, anthropic.NotFoundError),
        ({"messages": []}, anthropic.BadRequestError),
        ({"extra_body": {"temprature": 1}}, anthropic.BadRequestError),
    ):
        try:
            client.messages.create(**{**SHARED, "messages": [USER], **fields})
        except expected as error:
            assert error.body["error"]["hint"]
            assert error.request_id
        else:
            raise AssertionError(f"{fields} was not refused")


async def check_async() -> None:
    async with anthropic.AsyncAnthropic(base_url=URL, api_key="unused") as client:
        message = await client.messages.create(**SHARED, messages=[USER])
        assert message.content[0].text == "Hello there!"
        async with client.messages.stream(**SHARED, messages=[USER]) as stream:
            assert "".join([text async for text in stream.text_stream]) == "Hello there!"


if __name__ == "__main__":
    with anthropic.Anthropic(base_url=URL, api_key="unused", max_retries=0) as sync_client:
        check_whole_and_streamed(sync_client)
        check_tool_round_trip(sync_client)
        check_thinking(sync_client)
        check_errors(sync_client)
    asyncio.run(check_async())
