"""Requests that cost the gateway much: worked on by a thread, and bounded by numbers they are told."""

import threading

import pytest

from kiln_gateway.chat import prepare
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
