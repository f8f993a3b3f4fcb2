"""langchain-openai against a gateway: `langchain_openai_client.py URL built|not-built`."""

import asyncio
import sys

import openai
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL, IS_STRUCTURED = f"{sys.argv[1]}/v1", sys.argv[2] == "built"
SHARED = {"model": "base", "base_url": URL, "api_key": "unused", "max_retries": 0}


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


class Person(BaseModel):
    name: str
    age: int


def check_chat(model: ChatOpenAI) -> None:
    messages = [SystemMessage("Be kind."), HumanMessage("Hi")]
    answer = model.invoke(messages)
    assert answer.text == "Hello there!", answer
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.text for chunk in model.stream(messages)) == "Hello there!"
    assert [answer.text for answer in model.batch(["Hi", "Hi"])] == ["Hello there!"] * 2


async def check_async(models: list[ChatOpenAI]) -> None:
    for model in models:
        assert (await model.ainvoke("Hi")).text == "Hello there!"
        assert "".join([chunk.text async for chunk in model.astream("Hi")]) == "Hello there!"


def check_tools(model: ChatOpenAI) -> None:
    with_tools = model.bind_tools([weather])
    question = HumanMessage("Call the tool.")
    calls = with_tools.invoke([question])
    (call,) = calls.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    whole = None
    for chunk in with_tools.stream([question]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == {"city": "Oslo"}
    result = weather.invoke(call)
    assert isinstance(result, ToolMessage)
    assert with_tools.invoke([question, calls, result]).text == "Hello there!"


def check_structured(model: ChatOpenAI) -> None:
    for method in ("json_schema", "function_calling"):
        question = "Extract the person." if method == "json_schema" else "Extract with the tool."
        structured = model.with_structured_output(Person, method=method)
        try:
            person = structured.invoke(question)
        except openai.InternalServerError as error:
            assert (IS_STRUCTURED, error.status_code) == (False, 501), error
        else:
            assert person == Person(name="Ada", age=36)


def check_text_and_embeddings() -> None:
    assert OpenAI(**SHARED).invoke("Hi") == "Hello there!"
    # Without the length check the texts go as they are, and not as ids of OpenAI's tokenizer.
    embeddings = OpenAIEmbeddings(**SHARED, check_embedding_ctx_length=False)
    vectors = embeddings.embed_documents(["Hi", "How are you?"])
    assert [len(vector) for vector in vectors] == [4, 4]
    assert abs(sum(value * value for value in vectors[0]) - 1) < 1e-6


if __name__ == "__main__":
    chats = [ChatOpenAI(**SHARED, use_responses_api=uses_responses) for uses_responses in (False, True)]
    for chat in chats:
        check_chat(chat)
        check_tools(chat)
    asyncio.run(check_async(chats))
    check_structured(ChatOpenAI(**SHARED))
    check_text_and_embeddings()
