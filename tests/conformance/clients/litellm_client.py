"""litellm against a gateway, over OpenAI's and Anthropic's shapes: `litellm_client.py URL built|not-built`."""

import asyncio
import sys

import litellm

URL = sys.argv[1]
OPENAI = {"model": "openai/base", "api_base": f"{URL}/v1", "api_key": "unused", "num_retries": 0}
ANTHROPIC = {
    "model": "anthropic/base",
    "api_base": URL,
    "api_key": "unused",
    "num_retries": 0,
    "max_tokens": 200,
}
USER = [{"role": "user", "content": "Hi"}]
FUNCTION = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": FUNCTION}]


def check_chat(provider: dict) -> None:
    answer = litellm.completion(**provider, messages=USER)
    assert answer.choices[0].message.content == "Hello there!", answer
    assert answer.usage.total_tokens > answer.usage.completion_tokens > 0
    stream = litellm.completion(**provider, messages=USER, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello there!"
    again = asyncio.run(litellm.acompletion(**provider, messages=USER))
    assert again.choices[0].message.content == "Hello there!"


def check_tools(provider: dict) -> None:
    question = [{"role": "user", "content": "Call the tool."}]
    answer = litellm.completion(**provider, messages=question, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Oslo"}'), call
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    conversation = [*question, answer.choices[0].message.model_dump(exclude_none=True), result]
    final = litellm.completion(**provider, messages=conversation, tools=TOOLS)
    assert final.choices[0].message.content == "Hello there!"


def check_errors() -> None:
    try:
        litellm.completion(**{**OPENAI, "model": "openai/nobody"}, messages=USER)
    except litellm.NotFoundError as error:
        assert "no model" in str(error)
    else:
        raise AssertionError("an unknown model was not refused")


if __name__ == "__main__":
    for each in (OPENAI, ANTHROPIC):
        check_chat(each)
        check_tools(each)
    check_errors()
    text = litellm.text_completion(**{**OPENAI, "model": "text-completion-openai/base"}, prompt="Hi")
    assert text.choices[0].text == "Hello there!"
    embedding = litellm.embedding(**OPENAI, input=["Hi", "How are you?"])
    assert [len(entry["embedding"]) for entry in embedding.data] == [4, 4]
    response = litellm.responses(**OPENAI, input="Hi")
    assert response.output[0].content[0].text == "Hello there!"
