"""The grammars the gateway writes, read by the library that the engine reads them with."""

import pytest
from llguidance import LLMatcher, LLTokenizer

from kiln_common.errors import KilnError
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.output_rules import chat_grammar
from kiln_gateway.schemas.chat import ChatCompletionBody
from tests.support.gateway import REPOSITORY

FOLDER = REPOSITORY / "demo" / "model"
TOKENIZER = TextTokenizer.load(FOLDER)
LIBRARY = LLTokenizer(str(FOLDER / "tokenizer.json"), eos_token=[TOKENIZER.id_of("<|im_end|>")])


def body(parameters, *, strict=None, name="f", **fields):
    function = {"name": name, "parameters": parameters, "strict": strict}
    return ChatCompletionBody.model_validate(
        {
            "messages": [{"role": "user", "content": "x"}],
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
            **fields,
        }
    )


def accepts(request: ChatCompletionBody, text: str) -> bool:
    """Whether the whole text, with marks as their tokens, is of the request's grammar."""
    wanted = chat_grammar(request, TOKENIZER)
    matcher = LLMatcher(LIBRARY, LLMatcher.grammar_from_lark(wanted.grammar.lark), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def call(*, name="f", **arguments):
    parts = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


def of(properties, required=(), **more):
    return {"type": "object", "properties": properties, "required": list(required), **more}


TYPES = of(
    {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "unit": {"type": "string", "enum": ["c", 'the "f"']},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/place"},
        "any": {},
    },
    ["text"],
    **{"$defs": {"place": of({"x": {"type": "integer"}}, ["x"], additionalProperties=False)}},
)


@pytest.mark.parametrize(
    ("arguments", "is_accepted"),
    [
        ({"text": "free <b> text\nof </two> lines"}, True),
        ({"text": ""}, True),
        ({}, False),
        ({"count": 1}, False),
        ({"text": "a", "count": 12, "unit": 'the "f"', "maybe": "null"}, True),
        ({"text": "a", "count": "twelve"}, False),
        ({"text": "a", "unit": "k"}, False),
        ({"text": "a", "maybe": "3"}, True),
        ({"text": "a", "maybe": "x"}, False),
        ({"text": "a", "place": '{"x": 3}'}, True),
        ({"text": "a", "place": '{"y": 3}'}, False),
        ({"text": "a", "any": "whatever 1"}, True),
        ({"text": "a", "other": "1"}, False),
        ({"unit": "c", "text": "a"}, False),
    ],
)
def test_arguments_are_typed_by_their_schema(arguments, is_accepted):
    assert accepts(body(TYPES), call(**arguments)) is is_accepted


def test_several_calls_only_where_they_are_allowed():
    two = call(text="a") + "\n" + call(text="b")
    assert accepts(body(TYPES), two)
    assert not accepts(body(TYPES, parallel_tool_calls=False), two)
    assert not accepts(body(TYPES), "Let me see. " + call(text="a"))


def test_a_named_tool_is_the_only_one():
    choice = {"type": "function", "function": {"name": "g"}}
    names = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    request = body({}, tools=names, tool_choice=choice)
    assert accepts(request, call(name="g"))
    assert not accepts(request, call(name="f"))


@pytest.mark.parametrize(
    ("schema", "value", "is_accepted"),
    [
        ({"minLength": 3}, "ab", False),
        ({"minLength": 3}, "abc", True),
        ({"maxLength": 3}, "abcd", False),
        ({"minLength": 20}, "a\n</parameter>\nand more than twenty", False),
        ({"pattern": "^[a-z/]+$"}, "a/b", True),
        ({"pattern": "^[a-z/]+$"}, "a b", False),
        ({"pattern": "b"}, "abc", True),
        ({"pattern": "b"}, "acd", False),
        ({"pattern": "^a", "maxLength": 3}, "ab", True),
        ({"pattern": "^a", "maxLength": 3}, "abcd", False),
        ({"pattern": "^(a|b)$"}, "b", True),
        ({"pattern": r"\$$"}, "5$", True),
        ({"format": "date"}, "an annotation", True),
    ],
)
def test_strict_tools_bound_their_strings(schema, value, is_accepted):
    parameters = of({"s": {"type": "string", **schema}}, ["s"])
    request = body(parameters, strict=True)
    assert accepts(request, call(s=value)) is is_accepted
    if "</parameter>" not in value:
        assert accepts(body(parameters), call(s=value))


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        (of({"a": {"type": "string", "pattern": "^a|b$"}}), "alternatives between anchors"),
        (of({"a": {"allOf": [{"minLength": 1}, {"type": "string"}]}}), "without a type"),
        (of({"a": {}}, anyOf=[{"required": ["a"]}]), "anyOf"),
        (of({"a": {"$ref": "#/$defs/b"}}), "#/$defs/b"),
        (of({"a\nb": {}}), "parameter name"),
    ],
)
def test_what_a_strict_tool_asks_in_vain_is_named(parameters, reason):
    with pytest.raises(KilnError, match="cannot be enforced") as caught:
        chat_grammar(body(parameters, strict=True, tool_choice="auto"), TOKENIZER)
    assert reason in str(caught.value)
    assert caught.value.code == "grammar_not_supported"


def doubling(num_levels, leaf):
    """A schema that says twice what the next level says."""
    levels = {
        f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}, {"$ref": f"#/$defs/D{i + 1}"}]}
        for i in range(num_levels)
    }
    defs = {**levels, f"D{num_levels}": {"type": leaf}}
    return of({"a": {"$ref": "#/$defs/D0"}}, **{"$defs": defs})


CIRCLE = {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/A"}]}
NESTED = {"type": "integer"}
for _ in range(40):
    NESTED = {"anyOf": [NESTED]}


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize(
    ("parameters", "code", "reason"),
    [
        (doubling(30, "string"), "grammar_too_large", "16384 alternatives"),
        (doubling(30, "integer"), "grammar_too_large", "262144 bytes"),
        (of({"a": {"type": ["string"] * 20_000}}), "grammar_too_large", "16384 alternatives"),
        (of({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": CIRCLE}}), "grammar_not_supported", "circle"),
        (of({"a": NESTED}), "grammar_not_supported", "32 unions"),
        (of({"a": {"enum": ["x" * 300_000]}}), "grammar_too_large", "262144 bytes"),
        (of({f"a{i}": {"type": "integer"} for i in range(9000)}), "grammar_too_large", "262144 bytes"),
    ],
)
def test_a_grammar_that_would_grow_without_end_is_refused_while_it_is_built(parameters, code, reason, strict):
    with pytest.raises(KilnError) as caught:
        chat_grammar(body(parameters, strict=strict), TOKENIZER)
    assert (caught.value.code, caught.value.param) == (code, "tools")
    assert reason in str(caught.value)


def test_alternatives_are_the_tools_own_where_text_has_a_schema_too():
    request = body(doubling(30, "string"), tool_choice="auto", response_format={"type": "json_object"})
    with pytest.raises(KilnError) as caught:
        chat_grammar(request, TOKENIZER)
    assert caught.value.param == "tools"


def test_few_levels_of_alternatives_are_enforced():
    assert accepts(body(doubling(3, "integer")), call(a="3"))
    assert not accepts(body(doubling(3, "integer")), call(a="x"))


def test_text_of_a_schema_or_calls():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    request = body(TYPES, tool_choice="auto", response_format=wanted)
    assert accepts(request, '{"a": 1}')
    assert accepts(request, call(text="a"))
    assert not accepts(request, '{"a": "b"}')
    for outputs, text in (({"regex": "a/[0-9]"}, "a/5"), ({"choice": ["yes", 'n"o']}, 'n"o')):
        request = body(TYPES, tool_choice="auto", structured_outputs=outputs)
        assert accepts(request, text)
        assert accepts(request, call(text="a"))
        assert not accepts(request, text + text)


def test_tools_that_are_not_strict_leave_free_text_alone():
    assert chat_grammar(body(TYPES, tool_choice="auto"), TOKENIZER) is None
    strict = chat_grammar(body(TYPES, strict=True, tool_choice="auto"), TOKENIZER)
    assert strict.grammar.trigger_token_id == TOKENIZER.id_of("<tool_call>")
    assert chat_grammar(body(TYPES, strict=True, tool_choice="none"), TOKENIZER) is None


def test_names_and_keys_are_written_as_they_are():
    parameters = of({'k"e\\y ü': {"enum": ["v"]}}, ['k"e\\y ü'])
    request = body(parameters, name="a.b-c_d")
    text = call(name="a.b-c_d").replace("</function>", '<parameter=k"e\\y ü>\nv\n</parameter>\n</function>')
    assert accepts(request, text)
