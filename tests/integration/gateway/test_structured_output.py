"""Grammars, tool choice and thinking budgets over HTTP, with the demo model in a real engine."""

import asyncio
import json
import re
import time

import jsonschema
import pytest

from benchmarks.output_schemas import SCHEMAS
from kiln_common.text.tokenizer import TextTokenizer
from tests.support.demo_serving import DEMO_MODEL, demo_gateway
from tests.support.gateway import parse_events

TOKENIZER = TextTokenizer.load(DEMO_MODEL)
CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "New York"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "units": {"anyOf": [{"enum": ["c", "f"]}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "days", "place"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
CODE = {
    "type": "object",
    "properties": {"code": {"type": "string", "minLength": 2, "maxLength": 12, "pattern": "^[a-z<>/= ]+$"}},
    "required": ["code"],
    "additionalProperties": False,
}
SCHEMA_OF = {"weather": WEATHER, "run.code": CODE, "now": {"type": "object", "properties": {}}}


def tool(name, **fields):
    function = {"name": name, "description": "x", "parameters": SCHEMA_OF[name], **fields}
    return {"type": "function", "function": function}


TOOLS = [tool("weather"), tool("run.code", strict=True), tool("now")]


@pytest.fixture
async def http(tmp_path):
    async with demo_gateway(tmp_path) as http:
        yield http


async def ask(http, **fields):
    """Of a model that thinks, unless the fields say how much."""
    body = {"messages": [{"role": "user", "content": "Please answer."}], "max_tokens": 300, **fields}
    if "reasoning_effort" not in fields:
        body["chat_template_kwargs"] = {"enable_thinking": True}
    response = await http.post(CHAT, json=body)
    if not fields.get("stream"):
        return response.status_code, response.json()
    return response.status_code, parse_events(response.text)


async def choice_of(http, **fields):
    """The only choice of an answer, streamed or not, in the same form."""
    status, answer = await ask(http, **fields)
    assert status == 200, answer
    if not fields.get("stream"):
        return answer["choices"][0]
    assert answer[-1] == "[DONE]"
    message = {"content": "", "reasoning_content": "", "tool_calls": []}
    choice = {"message": message, "finish_reason": None}
    for [part] in (chunk["choices"] for chunk in answer[:-1]):
        delta = part["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                message["tool_calls"].append(
                    {"function": {"name": call["function"]["name"], "arguments": ""}}
                )
            message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    return choice


def response_format(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


def check_calls(message):
    for call in message["tool_calls"]:
        function = call["function"]
        jsonschema.validate(json.loads(function["arguments"]), SCHEMA_OF[function["name"]])
    return [call["function"]["name"] for call in message["tool_calls"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_every_schema_with_thinking_before_it(http, stream):
    answers = await asyncio.gather(
        *(
            choice_of(
                http,
                response_format=response_format(item.schema),
                thinking_budget_tokens=12,
                stream=stream,
                seed=seed,
            )
            for seed, item in enumerate(SCHEMAS)
        )
    )
    for item, answer in zip(SCHEMAS, answers, strict=True):
        if answer["finish_reason"] == "stop":
            content = answer["message"]["content"]
            assert not content[0].isspace()
            jsonschema.validate(json.loads(content), item.schema, jsonschema.Draft202012Validator)
        else:
            assert (answer["finish_reason"], item.is_bounded) == ("length", False)
        assert answer["message"].get("reasoning_content")


async def test_json_mode_regex_choice_and_both_kinds_of_grammar(http):
    answer = await choice_of(http, response_format={"type": "json_object"}, max_tokens=150, seed=3)
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["message"]["content"]), dict)
    for outputs, allowed in (
        ({"regex": "[a-c]{2}/[0-9]"}, "[a-c]{2}/[0-9]"),
        ({"choice": ['say "yes"', "a\\b", "no\n"]}, r'say "yes"|a\\b|no\n'),
        ({"grammar": 'root ::= "x" [0-9] [0-9]'}, "x[0-9]{2}"),
        ({"grammar": 'start: w w\nw: "ab" | "cd"'}, "(ab|cd){2}"),
        ({"json": {"enum": [1, 2]}}, "1|2"),
    ):
        answer = await choice_of(http, structured_outputs=outputs, thinking_budget_tokens=3)
        assert re.fullmatch(allowed, answer["message"]["content"]), (outputs, answer)
        assert answer["finish_reason"] == "stop"
    response = await http.post(
        "/v1/completions",
        json={"prompt": "It is", "structured_outputs": {"regex": " (hot|cold)"}, "max_tokens": 9},
    )
    assert response.json()["choices"][0]["text"] in (" hot", " cold")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_that_is_required_comes_with_arguments_of_its_schema(http, stream):
    for seed, thinking in enumerate((0, 20)):
        answer = await choice_of(
            http,
            tools=TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            thinking_budget_tokens=thinking,
            stream=stream,
            seed=seed,
        )
        assert answer["finish_reason"] == "tool_calls"
        assert len(check_calls(answer["message"])) == 1
        assert not answer["message"]["content"]


async def test_a_named_tool_and_parallel_calls(http):
    names = []
    for name in SCHEMA_OF:
        choice = {"type": "function", "function": {"name": name}}
        answer = await choice_of(
            http, tools=TOOLS, tool_choice=choice, reasoning_effort="none", seed=2, max_tokens=200
        )
        if answer["finish_reason"] == "tool_calls":
            names.append(set(check_calls(answer["message"])))
    assert {name for found in names for name in found} == set().union(*({n} for n in SCHEMA_OF))
    # A bias makes the model go on to another call.
    [line_break] = TOKENIZER.encode("\n")
    answer = await choice_of(
        http,
        tools=[tool("now")],
        tool_choice="required",
        reasoning_effort="none",
        logit_bias={str(line_break): 30},
        max_tokens=60,
    )
    assert len(answer["message"]["tool_calls"]) > 1


async def test_strict_tools_are_followed_where_the_model_chooses_to_call(http):
    opening = TOKENIZER.id_of("<tool_call>")
    for seed in range(3):
        answer = await choice_of(
            http,
            tools=TOOLS,
            reasoning_effort="none",
            logit_bias={str(opening): 20},
            parallel_tool_calls=False,
            seed=seed,
        )
        assert check_calls(answer["message"])
        assert answer["finish_reason"] == "tool_calls"


async def test_an_answer_may_be_text_of_the_schema_or_a_call(http):
    opening = str(TOKENIZER.id_of("<tool_call>"))
    for bias, is_call in ((100, True), (-100, False)):
        answer = await choice_of(
            http,
            tools=TOOLS,
            response_format=response_format(SCHEMAS[0].schema),
            thinking_budget_tokens=5,
            logit_bias={opening: bias},
            parallel_tool_calls=False,
        )
        if is_call:
            assert check_calls(answer["message"])
        else:
            jsonschema.validate(json.loads(answer["message"]["content"]), SCHEMAS[0].schema)


async def test_choices_of_one_request_stop_strings_and_log_probabilities(http):
    schema = response_format(SCHEMAS[0].schema)
    status, answer = await ask(
        http, response_format=schema, n=4, reasoning_effort="none", logprobs=True, seed=1
    )
    assert status == 200
    contents = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(contents)) > 1
    for choice in answer["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMAS[0].schema)
        assert all(entry["logprob"] <= 0 for entry in choice["logprobs"]["content"])
    stopped = await choice_of(http, response_format=schema, reasoning_effort="none", stop=['"age"'], seed=1)
    assert contents[0].startswith(stopped["message"]["content"])
    assert '"age"' not in stopped["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "most"), [({"thinking_budget_tokens": 9}, 9), ({"reasoning_effort": "minimal"}, 256)]
)
async def test_thinking_ends_at_its_budget_and_is_counted(http, fields, most):
    long = {
        "logit_bias": {str(TOKENIZER.id_of("</think>")): -100},
        "ignore_eos": True,
        "max_tokens": most + 30,
    }
    status, answer = await ask(http, **fields, **long)
    assert status == 200
    used = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert most < used <= most + 2  # the line break and the mark that end it
    assert answer["choices"][0]["message"]["content"]


REFUSED = [
    ({"stop_token_ids": [1] * 100_000}, "invalid_value", "stop_token_ids"),
    ({"response_format": response_format({"not": {}})}, "grammar_not_supported", "response_format"),
    ({"response_format": response_format({"type": "array", "uniqueItems": True})}, "grammar_not_supported", "response_format"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "grammar_not_supported", "structured_outputs"),
    ({"structured_outputs": {"regex": "(a|b|c[def]{1,10})" * 50_000}}, "grammar_too_large", "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 2_000_000}}, "grammar_too_large", "structured_outputs"),
    ({"structured_outputs": {"grammar": "root ::= ("}}, "grammar_not_supported", "structured_outputs"),
    ({"response_format": response_format({"properties": {f"p{i}": {"type": "string"} for i in range(5000)}})}, "grammar_too_large", "response_format"),
    ({"response_format": response_format({"enum": list(range(100_000))})}, "grammar_too_large", "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "array", "contains": {}}}}, "strict": True}}]}, "grammar_not_supported", "tools"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "invalid_value", "ignore_eos"),
]  # fmt: skip


async def test_what_cannot_be_enforced_is_refused_within_a_second_streamed_or_not(http):
    running = asyncio.create_task(choice_of(http, ignore_eos=True, max_tokens=400, reasoning_effort="none"))
    for fields, code, param in REFUSED:
        for stream in (False, True):
            started_s, cpu_before_s = time.monotonic(), time.process_time()
            response = await http.post(
                CHAT, json={"messages": [{"role": "user", "content": "x"}], "stream": stream, **fields}
            )
            # Those of this process's processor, where others had it too.
            seconds = min(time.monotonic() - started_s, time.process_time() - cpu_before_s)
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, param)
            # A busy machine may come to the time limit first.
            assert error["code"] in (code, "grammar_too_slow")
            assert error["message"]
            assert error["hint"]
            assert seconds < 3, (code, seconds)  # one on a machine that does nothing else
    assert (await running)["finish_reason"] == "length"


async def test_a_schema_that_is_not_strict_leaves_out_what_cannot_be_enforced(http):
    schema = {"type": "array", "uniqueItems": True, "items": {"enum": [1, 2]}, "maxItems": 3}
    answer = await choice_of(
        http, response_format=response_format(schema, strict=False), reasoning_effort="none"
    )
    assert set(json.loads(answer["message"]["content"])) <= {1, 2}
