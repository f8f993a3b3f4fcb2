"""Requests that cost the gateway much: worked on by a thread, and bounded by numbers they are told."""

import threading

import pytest

from kiln_gateway.chat import prepare
from kiln_gateway.chat.prompt import PromptRenderer
from tests.support.gateway import gateway_rig

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
async def rig(tmp_path):
    async with gateway_rig(tmp_path) as rig:
        yield rig


def names_of_threads(monkeypatch, owner, name):
    """A list that gets the name of the thread at each call of `owner.name`."""
    names, called = [], getattr(owner, name)

    def noted(*args, **options):
        names.append(threading.current_thread().name)
        return called(*args, **options)

    monkeypatch.setattr(owner, name, noted)
    return names


async def test_grammars_of_tools_are_built_on_a_thread_and_bounded(rig, monkeypatch):
    names = names_of_threads(monkeypatch, prepare, "chat_grammar")
    union = {"anyOf": [{"$ref": "#/$defs/B"}] * 200}
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/A"}},
        "$defs": {"A": union, "B": {"anyOf": [{"type": "string"}] * 200}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    response = await rig.chat(tools=[tool], tool_choice="required")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "grammar_too_large", "tools")
    assert "16384 alternatives" in error["message"]
    assert (await rig.chat()).status_code == 200
    assert len(names) == 1
    assert names[0] != threading.main_thread().name


@pytest.mark.parametrize(
    ("fields", "num_tokens", "num_per_token", "param"),
    [
        ({"prompt": [[5] * 50] * 2, "prompt_logprobs": 9}, 100, 10, "prompt_logprobs"),
        (
            {"prompt": [5] * 50, "n": 2, "prompt_logprobs": 0, "logprobs": 9, "echo": True},
            100,
            10,
            "prompt_logprobs",
        ),
        ({"prompt": [5] * 50, "n": 2, "logprobs": 9, "echo": True}, 100, 10, "echo"),
        ({"prompt": [5] * 100, "max_tokens": 0, "echo": True}, 100, 1, "echo"),
    ],
)
async def test_what_is_told_of_prompts_is_bounded(tmp_path, fields, num_tokens, num_per_token, param):
    number = num_tokens * num_per_token
    async with gateway_rig(tmp_path, max_prompt_logprobs=number - 1) as rig:
        response = await rig.post("/v1/completions", fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "too_many_prompt_logprobs")
        assert error["param"] == param
        for stated in (num_tokens, num_per_token, number, number - 1):
            assert str(stated) in error["message"]
        assert rig.engine.requests == []
    async with gateway_rig(tmp_path, max_prompt_logprobs=number) as rig:
        assert (await rig.post("/v1/completions", fields)).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/train/opd", {"adapter": "pupil", "teacher": "base", "prompts": ["Hi", [USER]]}),
        ("/v1/completions/batch", {"model": "base", "prompts": [[USER]] * 2}),
        ("/v1/completions/batch", {"adapter": None, "prompts": [[USER]] * 2}),
    ],
)
async def test_lists_of_short_prompts_are_rendered_on_a_thread(rig, monkeypatch, path, fields):
    names = names_of_threads(monkeypatch, PromptRenderer, "render_chat")
    response = await rig.post(path, fields)
    assert response.status_code in (200, 202), response.text
    assert len(names) == 2
    assert threading.main_thread().name not in names
