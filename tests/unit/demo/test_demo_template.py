"""The demo model's chat template, against conversations written out by hand."""

import pytest
from jinja2.exceptions import TemplateError

from demo.data.rendering import render_prompt, render_with_answer, template

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(text):
    return {"role": "user", "content": text}


def call(name, arguments, content=""):
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def test_the_thinking_switch_opens_or_closes_the_thought():
    opened = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    closed = opened + "\n</think>\n\n"
    assert render_prompt([user("Hi")], thinking=True) == opened
    assert render_prompt([user("Hi")], thinking=False) == closed
    assert template().render(messages=[user("Hi")], add_generation_prompt=True) == closed


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_leading_system_or_developer_message_becomes_the_system_turn(role):
    messages = [{"role": role, "content": " Be brief. "}, user("Hi")]
    assert render_prompt(messages).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert "<|im_start|>user\nHello there<|im_end|>" in render_prompt([user(parts)])


def test_past_thinking_is_dropped_before_the_last_question_and_kept_after_it():
    first = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2 = 4"}
    inline = {"role": "assistant", "content": "<think>\nthe old way\n</think>\n\n5"}
    rendered = render_prompt([user("2 + 2"), first, user("2 + 3"), inline, user("And now?")])
    assert "<|im_start|>assistant\n4<|im_end|>" in rendered
    assert "<|im_start|>assistant\n5<|im_end|>" in rendered
    assert "2 + 2 = 4" not in rendered
    assert "the old way" not in rendered
    ended = template().render(messages=[user("2 + 2"), first])
    assert ended.endswith("<|im_start|>assistant\n<think>\n2 + 2 = 4\n</think>\n\n4<|im_end|>\n")


def test_tools_come_before_the_system_text_as_one_json_line_each():
    rendered = render_prompt([{"role": "system", "content": "Be brief."}, user("Hi")], [WEATHER_TOOL])
    system = rendered.split("<|im_end|>")[0]
    assert '<tools>\n{"type": "function", "function": {"name": "get_weather"' in system
    assert system.endswith("</tool_call>\n\nBe brief.")


def test_a_tool_loop_keeps_its_thought_and_groups_the_responses_into_one_user_turn():
    asked = call("get_weather", {"city": "Paris", "days": 2, "exact": True})
    asked["reasoning_content"] = "I will look it up."
    results = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "windy"}]
    rendered = render_prompt([user("Weather?"), asked, *results], [WEATHER_TOOL])
    _, _, after = rendered.partition("Weather?<|im_end|>\n")
    assert after == (
        "<|im_start|>assistant\n<think>\nI will look it up.\n</think>\n\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n<parameter=exact>\ntrue\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nwindy\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_text_before_a_call_and_a_second_call_are_set_apart():
    message = call("get_weather", {}, content="Let me look.")
    message["tool_calls"] *= 2
    one = "<tool_call>\n<function=get_weather>\n</function>\n</tool_call>"
    rendered = template().render(messages=[user("Weather?"), message])
    assert f"</think>\n\nLet me look.\n\n{one}\n{one}<|im_end|>\n" in rendered


def test_a_finished_turn_begins_with_its_generation_prompt():
    answer = {"role": "assistant", "content": "42", "reasoning_content": "17 + 25"}
    prompt, added = render_with_answer([user("17 + 25?")], answer, thinking=True)
    assert prompt.endswith("<think>\n")
    assert added == "17 + 25\n</think>\n\n42<|im_end|>\n"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "Be brief."}],
        [user("Hi"), {"role": "system", "content": "Be brief."}],
        [{"role": "narrator", "content": "Once"}, user("Hi")],
        [user([{"type": "image_url", "image_url": {"url": "x"}}])],
        [user("Hi"), call("get_weather", "not an object")],
    ],
    ids=["empty", "no_user", "late_system", "unknown_role", "image", "argument_text"],
)
def test_what_the_template_can_not_render_is_refused(messages):
    with pytest.raises(TemplateError):
        render_prompt(messages)
