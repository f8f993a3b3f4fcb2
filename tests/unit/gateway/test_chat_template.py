"""The template's sandbox, and what of a prompt the next turn keeps."""

import json

import pytest

from kiln_common.errors import InvalidValue
from kiln_common.text.chat_template import ChatTemplate, TemplateRefused, TemplateUnusable
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.prompt import PromptRenderer
from kiln_gateway.chat.shared_prefix import num_common_characters
from tests.support.gateway import write_model_folder

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return PromptRenderer(ChatTemplate.load(folder), TextTokenizer.load(folder), enable_thinking_default=None)


def test_templates_find_what_they_expect():
    source = "{{ {'a': '<ü>'} | tojson }}{% for i in [1, 2] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert ChatTemplate(source).render([USER], add_generation_prompt=True) == '{"a": "<ü>"}14'


def test_variables_may_have_any_name():
    template = ChatTemplate("{{ colour }}{{ messages | length }}")
    variables = {"colour": "red", "self": 1, "variables": 2}
    assert template.render([USER], add_generation_prompt=True, variables=variables) == "red1"


def test_a_templates_own_refusal_is_the_clients_error():
    template = ChatTemplate("{{ raise_exception('no system message here') }}")
    with pytest.raises(TemplateRefused, match="no system message here"):
        template.render([USER], add_generation_prompt=True)


def test_templates_cannot_leave_the_sandbox():
    template = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TemplateRefused):
        template.render([USER], add_generation_prompt=True)
    with pytest.raises(TemplateRefused):
        ChatTemplate("{{ messages.append(1) }}").render([USER], add_generation_prompt=True)


def test_the_template_may_stand_in_the_tokenizer_config(tmp_path):
    with pytest.raises(TemplateUnusable):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages | length }}"}))
    assert ChatTemplate.load(tmp_path).render([USER], add_generation_prompt=False) == "1"


def test_the_stable_prefix_ends_before_the_generation_prompt(prompts):
    prompt = prompts.render_chat([USER], tools=None, variables={"enable_thinking": False})
    answered = prompts.render_text(
        [USER, {"role": "assistant", "content": "Hello"}, USER], add_generation_prompt=True, variables={}
    )
    stable = prompts.tokenizer.decode(prompt.token_ids[: prompt.num_stable_prefix_tokens])
    assert answered.startswith(stable)
    assert stable == "<|im_start|>user\nHi<|im_end|>\n"


def test_thinking_that_the_next_turn_drops_is_not_stable(prompts):
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
    ]
    prompt = prompts.render_chat(messages, tools=None, variables={"enable_thinking": True})
    stable = prompts.tokenizer.decode(prompt.token_ids[: prompt.num_stable_prefix_tokens])
    assert "I look." in prompts.tokenizer.decode(prompt.token_ids)
    assert stable == "<|im_start|>user\nHi<|im_end|>\n"
    assert prompt.starts_in_reasoning


def test_leading_instructions_become_one_system_message(prompts):
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        USER,
    ]
    text = prompts.render_text(messages, add_generation_prompt=False, variables={})
    assert text.startswith("<|im_start|>system\nBe kind.\n\nBe brief.<|im_end|>\n")


def test_the_demos_own_template_thinks_only_where_asked(prompts):
    for variables, thinks in (
        ({}, False),
        ({"enable_thinking": False}, False),
        ({"enable_thinking": True}, True),
    ):
        assert prompts.render_chat([USER], tools=None, variables=variables).starts_in_reasoning is thinks


def test_requests_choose_thinking_and_cannot_replace_the_messages(prompts):
    assert prompts.variables({"enable_thinking": True}, reasoning_effort="none") == {"enable_thinking": True}
    assert prompts.variables(reasoning_effort="none") == {"enable_thinking": False}
    with pytest.raises(InvalidValue):
        prompts.variables({"messages": []})


@pytest.mark.parametrize(("first", "second", "count"), [("abc", "abd", 2), ("", "a", 0), ("ab", "ab", 2)])
def test_common_characters(first, second, count):
    assert num_common_characters(first, second) == count
