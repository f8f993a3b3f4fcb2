"""Tool calls in Qwen's XML form as a grammar, arguments typed by their schemas.

Arguments come in the order of the schema, optional ones may be left out. A string stands as it is
until its closing tag, everything else is JSON. In a `strict` tool the lengths and patterns of strings
are enforced too, and what cannot be enforced is refused; elsewhere it is left out. `format` is an
annotation here, as JSON Schema has it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kiln_common.errors import GrammarNotSupported
from kiln_common.json_grammar import JSON_WHITE_SPACE
from kiln_common.text.marks import Mark
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.lark import LarkRules, expression, json_value, literal, one_of
from kiln_gateway.schemas.chat import Tool

_VALUE_END = "\n</parameter>\n"
# Keywords of a tool's parameters that say nothing beyond what the form enforces.
_PLAIN_KEYWORDS = frozenset(
    {"type", "properties", "required", "additionalProperties", "title", "description", "$defs"}
    | {"definitions", "$schema", "$id", "$comment", "default", "examples"}
)
# Unions that may lie in each other, and references that may lead to references.
_MOST_NESTED = 32

Schema = Mapping[str, Any]


def calls_body(
    rules: LarkRules, tools: Sequence[Tool], tokenizer: TextTokenizer, *, is_parallel: bool
) -> str:
    """One call of one of the tools, or several where `is_parallel`.

    Raises:
        GrammarNotSupported: a strict tool's schema cannot be enforced, or a name cannot be written.
        GrammarTooLarge: the schemas have too many alternatives, or the grammar too many bytes.
    """
    call = rules.add(f"{_mark(Mark.CALL_OPEN, tokenizer)} {rest_of_call(rules, tools, tokenizer)}")
    return f"{call} ({literal(chr(10))} {call})*" if is_parallel else call


def rest_of_call(rules: LarkRules, tools: Sequence[Tool], tokenizer: TextTokenizer) -> str:
    """A call behind its opening mark. Raises as `calls_body`."""
    functions = [rules.add(_function(rules, tool)) for tool in tools]
    opening, closing = literal("\n<function="), literal("</function>\n")
    return f"{opening} {one_of(functions)} {closing} {_mark(Mark.CALL_CLOSE, tokenizer)}"


def _mark(mark: Mark, tokenizer: TextTokenizer) -> str:
    token_id = tokenizer.id_of(mark.value)
    if token_id is None:
        raise GrammarNotSupported(f"the model's tokenizer has no token {mark.value}", param="tools")
    return f"<[{token_id}]>"


def _function(rules: LarkRules, tool: Tool) -> str:
    """A function from its name on."""
    return " ".join([literal(f"{tool.function.name}>\n"), *_Arguments(rules, tool).bodies()])


class _Arguments:
    """The arguments of one tool."""

    def __init__(self, rules: LarkRules, tool: Tool) -> None:
        self._rules = rules
        self._name = tool.function.name
        self._is_strict = bool(tool.function.strict)
        self._root: Schema = tool.function.parameters or {}
        self._options = JSON_WHITE_SPACE if self._is_strict else {**JSON_WHITE_SPACE, "lenient": True}

    def bodies(self) -> list[str]:
        schema = self._resolve(self._root)
        unknown = sorted(set(schema) - _PLAIN_KEYWORDS)
        if unknown and self._is_strict:
            raise self._refuse(f"{unknown[0]} of all parameters together")
        properties = schema.get("properties")
        required = schema.get("required")
        needed = set(required) if isinstance(required, list) else set()
        bodies = []
        for key, value in properties.items() if isinstance(properties, dict) else ():
            if ">" in key or "\n" in key:
                raise self._refuse(f"the parameter name {key!r}")
            parameter = self._rules.add(f"{literal(f'<parameter={key}>{chr(10)}')} {self._value(value)}")
            bodies.append(parameter if key in needed else f"{parameter}?")
        return bodies

    def _value(self, schema: Any) -> str:
        """A value of the schema and the closing tag behind it."""
        alternatives = self._alternatives(schema if isinstance(schema, dict) else {}, ())
        bodies = [self._one_value(alternative) for alternative in alternatives]
        # Any text includes whatever else there may be.
        return one_of(
            [body for body in bodies if body is not None] if None not in bodies else [self._any_text()]
        )

    def _one_value(self, schema: Schema) -> str | None:
        """A value without alternatives; None where any text will do."""
        if "enum" in schema or "const" in schema:
            values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
            return self._rules.add(one_of([literal(_written(value) + _VALUE_END) for value in values]))
        kind = schema.get("type")
        if kind == "string":
            return self._bounded_text(schema) if self._is_strict else None
        if kind is None:
            if self._is_strict and set(schema) - _PLAIN_KEYWORDS:
                raise self._refuse(f"a value without a type: {json.dumps(schema)[:80]}")
            return None
        definitions = {name: self._root[name] for name in ("$defs", "definitions") if name in self._root}
        return (
            f"{self._rules.add(json_value({**definitions, **schema}, self._options))} {literal(_VALUE_END)}"
        )

    def _alternatives(self, schema: Any, around: tuple[Schema, ...]) -> Iterator[Schema]:
        """The schema's unions and lists of types taken apart; `around` are the unions it lies in."""
        self._rules.count_alternative("tools")
        schema = self._resolve(schema)
        if any(schema is union for union in around):
            raise self._refuse("alternatives that lead in a circle")
        if parts := _parts(schema):
            if len(around) == _MOST_NESTED:
                raise self._refuse(f"more than {_MOST_NESTED} unions in each other")
            for part in parts:
                yield from self._alternatives(part, (*around, schema))
            return
        kinds = schema.get("type")
        if isinstance(kinds, list) and kinds and "enum" not in schema and "const" not in schema:
            for kind in kinds:
                self._rules.count_alternative("tools")
                yield {**schema, "type": kind}
        else:
            yield schema

    def _resolve(self, schema: Any) -> Schema:
        """Follow references into the tool's own parameters."""
        for _ in range(_MOST_NESTED):
            if not isinstance(schema, dict):
                return {}
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            found: Any = self._root
            for step in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
                found = (
                    found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
                )
                if found is None:
                    raise self._refuse(f"the reference {reference[:80]!r}")
            schema = found
        raise self._refuse("references that lead in a circle")

    def _any_text(self) -> str:
        return self._rules.add(expression(rf"(?s:.*){_VALUE_END}"), is_lazy=True)

    def _bounded_text(self, schema: Schema) -> str | None:
        """A string of a strict tool; None where any will do."""
        parts = []
        least, most = schema.get("minLength"), schema.get("maxLength")
        if least is not None or most is not None:
            parts.append(expression(rf"(?s:.){{{least or 0},{'' if most is None else most}}}{_VALUE_END}"))
        if (pattern := schema.get("pattern")) is not None:
            parts.append(expression(self._unanchored(str(pattern)) + _VALUE_END))
        if not parts:
            return None
        # The first closing tag is the end, whatever the bounds would allow after it.
        parts.append("~" + expression(rf"(?s:.*){_VALUE_END}(?s:.+)"))
        return self._rules.add(self._rules.add_terminal(" & ".join(parts)), is_lazy=True)

    def _unanchored(self, pattern: str) -> str:
        """The pattern as one of the whole text: JSON Schema's may match anywhere in it."""
        start, end = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", pattern))
        body = pattern[start : len(pattern) - end]
        # A bracket that nothing closes takes the rest: to look for its end from each would be quadratic.
        if (start or end) and "|" in re.sub(r"\\.|\[[^\]]*\]?|\([^()]*\)", "", body):
            raise self._refuse(f"alternatives between anchors in the pattern {pattern!r}")
        return f"{'' if start else '(?s:.*)'}(?:{body}){'' if end else '(?s:.*)'}"

    def _refuse(self, what: str) -> GrammarNotSupported:
        return GrammarNotSupported(f"{what} in the tool {self._name!r}", param="tools")


def _parts(schema: Schema) -> list[Any]:
    """The alternatives of a schema that is nothing but a union of them, or of one part."""
    for union in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(union)
        if isinstance(parts, list) and "type" not in schema and (union != "allOf" or len(parts) == 1):
            return parts
    return []


def _written(value: Any) -> str:
    """A value as the form has it: strings as they are, others as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
