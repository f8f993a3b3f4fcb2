"""What a request's fields demand of its text, as the engine takes it: a grammar, an end to thinking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kiln_common.errors import InvalidValue
from kiln_common.json_grammar import JSON_WHITE_SPACE
from kiln_common.pb import engine_pb2
from kiln_common.text.marks import Mark
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.lark import LarkRules, expression, json_value, literal, one_of
from kiln_gateway.chat.prompt import Prompt
from kiln_gateway.chat.tool_grammar import calls_body, rest_of_call
from kiln_gateway.schemas.chat import ChatCompletionBody, Tool
from kiln_gateway.schemas.structured import ResponseFormat, StructuredOutputs

# What surrounds the end of thinking in Qwen's turns.
BEFORE_THINK_CLOSE, AFTER_THINK_CLOSE = "\n", "\n\n"
# Most tokens of thinking; other efforts have no budget.
_EFFORT_BUDGETS = {"minimal": 256, "low": 1024, "medium": 4096}


@dataclass(frozen=True)
class WantedGrammar:
    """A grammar and the request's field that asked for it."""

    grammar: engine_pb2.Grammar
    field: str

    @property
    def is_whole(self) -> bool:
        """Whether all of the answer is under it."""
        return not self.grammar.HasField("trigger_token_id")


def text_grammar(
    structured: StructuredOutputs | None, response_format: ResponseFormat | None = None
) -> WantedGrammar | None:
    """The grammar of plain text, if the fields ask for one.

    Raises:
        InvalidValue: both fields ask for one.
    """
    formatted = response_format is not None and response_format.type != "text"
    if structured is not None:
        if formatted:
            raise InvalidValue(
                "response_format and structured_outputs both say what the text must be",
                param="structured_outputs",
                hint="Send one of them.",
            )
        return WantedGrammar(_structured_grammar(structured), "structured_outputs")
    if not formatted or response_format is None:
        return None
    wanted = response_format.json_schema
    schema = {"type": "object"} if wanted is None or wanted.schema_ is None else wanted.schema_
    options = {"lenient": True} if wanted is not None and wanted.strict is False else {}
    return WantedGrammar(_json_grammar(schema, options), "response_format")


def chat_grammar(body: ChatCompletionBody, tokenizer: TextTokenizer) -> WantedGrammar | None:
    """The grammar of a chat answer: of its text, of its tool calls, or of either.

    Raises:
        InvalidValue: fields contradict each other, or tool_choice names no tool.
        GrammarNotSupported: a strict tool's schema cannot be enforced.
        GrammarTooLarge: the tools' schemas have too many alternatives, or their grammar too many bytes.
    """
    text = text_grammar(body.structured_outputs, body.response_format)
    tools, is_parallel = body.active_tools, body.parallel_tool_calls is not False
    if body.tool_choice == "required" or isinstance(body.tool_choice, dict):
        rules = LarkRules("tools")
        calls = calls_body(rules, chosen_tools(body), tokenizer, is_parallel=is_parallel)
        return WantedGrammar(engine_pb2.Grammar(lark=rules.text(calls)), "tool_choice")
    if text is not None and tools:
        rules = LarkRules(text.field)
        either = [_text_body(rules, text), calls_body(rules, tools, tokenizer, is_parallel=is_parallel)]
        return WantedGrammar(engine_pb2.Grammar(lark=rules.text(" | ".join(either))), text.field)
    if text is None and any(tool.function.strict for tool in tools):
        return _triggered_calls(tools, tokenizer)
    return text


def chosen_tools(body: ChatCompletionBody) -> list[Tool]:
    """The tools that tool_choice allows. Raises InvalidValue."""
    tools, choice = body.active_tools, body.tool_choice
    if not tools:
        raise InvalidValue(
            "tool_choice asks for a call, but there are no tools", param="tool_choice", hint="Send tools."
        )
    if not isinstance(choice, dict):
        return tools
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise InvalidValue(
            f"tool_choice is {json.dumps(choice)[:80]}",
            param="tool_choice",
            hint='Send "none", "auto", "required" or {"type": "function", "function": {"name": …}}.',
        )
    chosen = [tool for tool in tools if tool.function.name == name]
    if not chosen:
        raise InvalidValue(
            f"tool_choice names {name[:64]!r}, which is none of the tools",
            param="tool_choice",
            hint="Name one of tools.",
        )
    return chosen[:1]


def thinking_budget(body: ChatCompletionBody) -> int | None:
    """Most tokens of thinking, if the request limits them."""
    if body.thinking_budget_tokens is not None:
        return body.thinking_budget_tokens
    return _EFFORT_BUDGETS.get(body.reasoning_effort or "")


def thinking_rules(
    prompt: Prompt, budget: int | None, grammar: WantedGrammar | None, tokenizer: TextTokenizer
) -> engine_pb2.Thinking | None:
    """How the thinking ends that the prompt opened; None where the engine need not know.

    Raises:
        InvalidValue: the tokenizer has no token that ends thinking.
    """
    if not prompt.starts_in_reasoning or (budget is None and grammar is None):
        return None
    end_id = tokenizer.id_of(Mark.THINK_CLOSE.value)
    if end_id is None:
        raise InvalidValue(
            f"the model's tokenizer has no token {Mark.THINK_CLOSE.value}",
            param="thinking_budget_tokens" if grammar is None else grammar.field,
            hint='Send reasoning_effort "none".',
        )
    return engine_pb2.Thinking(
        end_token_id=end_id,
        budget_tokens=budget,
        before_end_token_ids=tokenizer.encode(BEFORE_THINK_CLOSE),
        after_end_token_ids=tokenizer.encode(AFTER_THINK_CLOSE),
    )


def _structured_grammar(structured: StructuredOutputs) -> engine_pb2.Grammar:
    if structured.json_ is not None:
        return _json_grammar(structured.json_)
    if structured.regex is not None:
        return engine_pb2.Grammar(regex=structured.regex)
    if structured.choice is not None:
        return engine_pb2.Grammar(
            lark=f"start: {one_of([literal(choice) for choice in structured.choice])}\n"
        )
    text = structured.grammar or ""
    return engine_pb2.Grammar(ebnf=text) if "::=" in text else engine_pb2.Grammar(lark=text)


def _json_grammar(schema: Any, options: dict[str, Any] | None = None) -> engine_pb2.Grammar:
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": options or {}}
    return engine_pb2.Grammar(json_schema=json.dumps(schema, ensure_ascii=False))


def _text_body(rules: LarkRules, text: WantedGrammar) -> str:
    """The grammar of plain text as part of another."""
    grammar = text.grammar
    match grammar.WhichOneof("language"):
        case "json_schema":
            schema = json.loads(grammar.json_schema)
            options = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
            return rules.add(json_value(schema, {**JSON_WHITE_SPACE, **options}))
        case "regex":
            return rules.add(expression(grammar.regex))
        case "lark" if grammar.lark.startswith("start: ") and "\n" not in grammar.lark.strip():
            return grammar.lark.removeprefix("start: ").strip()
        case _:
            raise InvalidValue(
                "structured_outputs.grammar cannot be combined with tools",
                param="structured_outputs",
                hint='Send tool_choice "none", or leave the tools out.',
            )


def _triggered_calls(tools: Sequence[Tool], tokenizer: TextTokenizer) -> WantedGrammar:
    """Free text in which every call is under the grammar."""
    rules = LarkRules("tools")
    lark = rules.text(rest_of_call(rules, tools, tokenizer))
    opening = tokenizer.id_of(Mark.CALL_OPEN.value)
    return WantedGrammar(engine_pb2.Grammar(lark=lark, trigger_token_id=opening), "tools")
