"""How much of a prompt other conversations begin with too."""

import pytest

from kiln_common.text.chat_template import ChatTemplate, TemplateRefused
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.prompt import PromptRenderer
from kiln_gateway.chat.shared_prefix import SharedPrefixes
from tests.support.gateway import gateway_rig, write_model_folder

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return PromptRenderer(ChatTemplate.load(folder), TextTokenizer.load(folder), enable_thinking_default=None)


def shared_text(prompts, messages, tools=None, variables=None):
    prompt = prompts.render_chat(messages, tools=tools, variables=variables or {})
    return prompts.tokenizer.decode(prompt.token_ids[: prompt.num_shared_prefix_tokens])


def test_the_system_message_is_shared(prompts):
    assert shared_text(prompts, [SYSTEM, USER]) == "<|im_start|>system\nBe kind.<|im_end|>\n"


def test_later_turns_share_no_more_than_the_first(prompts):
    later = [SYSTEM, USER, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "x"}]
    assert shared_text(prompts, later) == shared_text(prompts, [SYSTEM, USER])


def test_a_user_who_says_what_the_probe_says_shares_no_more(prompts):
    assert shared_text(prompts, [SYSTEM, {"role": "user", "content": "x"}]) == shared_text(
        prompts, [SYSTEM, USER]
    )


def test_tools_are_shared_with_and_without_a_system_message(prompts):
    alone = shared_text(prompts, [USER], TOOLS)
    assert alone.startswith("<|im_start|>system\n# Tools")
    assert alone.endswith("</tool_call><|im_end|>\n")
    assert shared_text(prompts, [SYSTEM, USER], TOOLS).endswith("Be kind.<|im_end|>\n")


def test_without_instructions_nothing_is_shared(prompts):
    assert shared_text(prompts, [USER]) == ""


def test_a_turn_mark_in_the_system_message_does_not_end_it(prompts):
    system = {"role": "system", "content": "Turns begin with <|im_start|>user here."}
    assert shared_text(prompts, [system, USER]).endswith("user here.<|im_end|>\n")


def test_long_instructions_are_tokenised_once_and_rendered_apart_once(prompts, monkeypatch):
    encoded, rendered = [], []
    encode, render = prompts.tokenizer.encode, prompts.render_text

    def recording_encode(text):
        encoded.append(text)
        return encode(text)

    def counting_render(messages, **options):
        rendered.append(messages)
        return render(messages, **options)

    monkeypatch.setattr(prompts.tokenizer, "encode", recording_encode)
    monkeypatch.setattr(prompts, "render_text", counting_render)
    system = {"role": "system", "content": "Be brief. " * 50}
    for question in ("One?", "Two?", "Three?"):
        prompts.render_chat([system, {"role": "user", "content": question}], tools=None, variables={})
    assert sum("Be brief." in text for text in encoded) == 1
    assert [text for text in encoded if "?" in text] == [
        f"<|im_start|>user\n{question}<|im_end|>\n" for question in ("One?", "Two?", "Three?")
    ]
    # The prompt and its next turn for each request, and the two first turns once.
    assert len(rendered) == 3 * 2 + 2


def test_a_template_that_renders_the_date_is_rendered_again():
    prefixes = SharedPrefixes()
    for today in ("Monday", "Tuesday"):

        def render(messages, today=today):
            turns = "".join(f"<|im_start|>{message['content']}" for message in messages)
            return f"{today}{turns}"

        assert prefixes.num_characters(f"{today}<|im_start|>Hi", [], None, {}, render) == len(today)


def test_only_the_last_few_instructions_are_remembered():
    prefixes = SharedPrefixes()
    num_renderings = 0

    def render(messages):
        nonlocal num_renderings
        num_renderings += 1
        return "".join(f"<|im_start|>{message['content']}" for message in messages)

    def ask(number):
        system = {"role": "system", "content": str(number)}
        return prefixes.num_characters(f"<|im_start|>{number}<|im_start|>Hi", [system], None, {}, render)

    for number in range(100):
        assert ask(number) == len(f"<|im_start|>{number}")
    assert num_renderings == 200
    ask(99)
    assert num_renderings == 200
    ask(0)
    assert num_renderings == 202


def test_a_template_that_refuses_a_lone_user_turn_shares_nothing():
    def refuse(messages):
        raise TemplateRefused("no")

    assert SharedPrefixes().num_characters("<|im_start|>Hi", [], None, {}, refuse) == 0


async def test_the_engine_is_told(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        await rig.chat(messages=[SYSTEM, USER], max_tokens=2)
        [request] = rig.engine.requests
        told = list(request.prompt_token_ids)[: request.num_shared_prefix_tokens]
        assert rig.tokenizer.decode(told) == "<|im_start|>system\nBe kind.<|im_end|>\n"
        assert request.num_stable_prefix_tokens > request.num_shared_prefix_tokens
