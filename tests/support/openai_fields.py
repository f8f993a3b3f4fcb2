"""What becomes of every field that the openai client can send: found out by sending it.

A field works when the engine's request, the answer or what is kept differs with it; it is accepted
without effect when the schema says so and nothing differs; otherwise it must be refused by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from kiln_gateway.openapi import REQUEST_BODIES
from tests.support.gateway import Rig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EMBED, RESPONSES = "/v1/embeddings", "/v1/responses"
WORKS, NO_EFFECT, REFUSED, NOT_BUILT = "works", "accepted without effect", "refused", "not built yet"

USER = {"role": "user", "content": "Hi"}
_CALL = "<tool_call>\n<function=f>\n</function>\n</tool_call>\n"
_FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
_CHAT_TOOLS = {"tools": [{"type": "function", "function": _FUNCTION}]}
_TOOLS = {"tools": [{"type": "function", **_FUNCTION}]}
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}},
    "required": ["a"],
    "additionalProperties": False,
}

# What only marks a request, in any route.
_MARKS: dict[str, Any] = {
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "user": "u",
}
_DRAWING: dict[str, Any] = {
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 1},
    "max_tokens": 2,
    "model": "helpful",
    "n": 2,
    "presence_penalty": 0.5,
    "seed": 7,
    "stop": ["there"],
    "store": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 0.5,
}
# A value of each field that asks for something.
SAMPLES: dict[str, dict[str, Any]] = {
    CHAT: {
        **_MARKS,
        **_DRAWING,
        **_CHAT_TOOLS,
        "messages": [{"role": "user", "content": "Ho"}],
        "audio": {"voice": "alloy", "format": "wav"},
        "function_call": "auto",
        "functions": [_FUNCTION],
        "logprobs": True,
        "max_completion_tokens": 2,
        "modalities": ["text", "audio"],
        "moderation": {"model": "m"},
        "parallel_tool_calls": False,
        "prediction": {"type": "content", "content": "x"},
        "reasoning_effort": "high",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
        "tool_choice": "none",
        "top_logprobs": 2,
        "verbosity": "low",
        "web_search_options": {},
    },
    TEXT: {**_MARKS, **_DRAWING, "best_of": 3, "echo": True, "logprobs": 2, "prompt": "Ho", "suffix": "x"},
    EMBED: {"dimensions": 2, "encoding_format": "base64", "input": "Ho", "model": "helpful", "user": "u"},
    RESPONSES: {
        **_MARKS,
        **_TOOLS,
        "access_programs": {"cyber": "standard"},
        "background": True,
        "context_management": [{"type": "compaction"}],
        "conversation": "conv_1",
        "image": {"context_compression": "auto"},
        "include": ["reasoning.encrypted_content"],
        "input": "Ho",
        "instructions": "Be kind.",
        "max_output_tokens": 2,
        "max_tool_calls": 3,
        "model": "helpful",
        "moderation": {"model": "m"},
        "parallel_tool_calls": False,
        "previous_response_id": "",
        "prompt": {"id": "p"},
        "reasoning": {"effort": "high"},
        "store": False,
        "stream": True,
        "stream_options": {"include_obfuscation": True},
        "temperature": 0.5,
        "text": {"format": {"type": "json_schema", "name": "a", "schema": _SCHEMA}},
        "tool_choice": "none",
        "top_logprobs": 2,
        "top_p": 0.5,
        "truncation": "auto",
    },
}
# The request without the field, and what it takes for the field to mean something.
BASES = {
    CHAT: {"messages": [USER]},
    TEXT: {"prompt": "Hi"},
    EMBED: {"input": "Hi"},
    RESPONSES: {"input": "Hi"},
}
NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    (CHAT, "parallel_tool_calls"): _CHAT_TOOLS,
    (CHAT, "tool_choice"): _CHAT_TOOLS,
    (CHAT, "top_logprobs"): {"logprobs": True},
    (RESPONSES, "parallel_tool_calls"): _TOOLS,
    (RESPONSES, "tool_choice"): _TOOLS,
    **{(route, "stream_options"): {"stream": True} for route in (CHAT, TEXT, RESPONSES)},
}
_CLIENT_TYPES: dict[str, Any] = {
    CHAT: chat_create_params.CompletionCreateParamsBase,
    TEXT: completion_create_params.CompletionCreateParamsBase,
    EMBED: embedding_create_params.EmbeddingCreateParams,
    RESPONSES: response_create_params.ResponseCreateParamsBase,
}
_DRAWN_ANEW = ("id", "call_id", "item_id", "created", "created_at", "completed_at", "request_id")


@dataclass(frozen=True)
class Verdict:
    """What became of a field. `note` is what the schema or the refusal says."""

    status: str
    note: str = ""


@dataclass
class _Seen:
    """Everything a request did."""

    status: int
    answer: Any
    engine_requests: list[bytes] = field(default_factory=list)
    num_kept: int = 0


def client_fields(route: str) -> list[str]:
    """Every field that the openai client knows for a route."""
    names = set(_CLIENT_TYPES[route].__annotations__)
    return sorted(names | ({"stream"} if route != EMBED else set()))


async def verdict(rig: Rig, route: str, name: str) -> Verdict:
    """Send the field and see. Raises AssertionError: it is neither honoured, nor inert, nor refused by name."""
    base = {**BASES[route], **NEEDED.get((route, name), {})}
    sample = SAMPLES[route][name]
    if name == "previous_response_id":
        sample = (await rig.post(RESPONSES, {"input": "Before"})).json()["id"]
    without = await _send(rig, route, base)
    assert without.status == 200, without.answer
    seen = await _send(rig, route, {**base, name: sample})
    description = REQUEST_BODIES[route].model_fields[name].description or ""
    if seen.status == 200:
        differs = (seen.answer, seen.engine_requests, seen.num_kept) != (
            without.answer,
            without.engine_requests,
            without.num_kept,
        )
        says_no_effect = description.startswith(NO_EFFECT)
        assert differs != says_no_effect, (
            f"{route} {name}: differs is {differs}, the schema says {description!r}"
        )
        return Verdict(
            WORKS if differs else NO_EFFECT, description.removeprefix(NO_EFFECT).removeprefix(": ")
        )
    error = seen.answer["error"]
    assert (error["param"] or "").startswith(name), (route, name, error)
    assert error["code"] in ("unsupported_field", "not_implemented"), (route, name, error)
    return Verdict(REFUSED if seen.status == 400 else NOT_BUILT, error["hint"])


async def _send(rig: Rig, route: str, body: dict[str, Any]) -> _Seen:
    has_tools = bool(body.get("tools"))
    rig.engine.script = lambda request: _CALL * 2 if has_tools else "Hello there!"
    rig.engine.requests.clear()
    num_before = await _num_kept(rig)
    response = await rig.post(route, body)
    text = response.text
    answer = text if text.startswith(("data", "event")) else json.loads(text)
    events = [line.partition(": ")[2] for line in text.splitlines() if ": {" in line]
    shown = (
        [_without_ids(json.loads(event)) for event in events]
        if isinstance(answer, str)
        else _without_ids(answer)
    )
    requests = []
    for request in rig.engine.requests:
        request.request_id = ""
        requests.append(request.SerializeToString(deterministic=True))
    return _Seen(response.status_code, shown, requests, await _num_kept(rig) - num_before)


async def _num_kept(rig: Rig) -> int:
    """Rollouts and responses in Redis."""
    rollouts = [name async for name in rig.redis.scan_iter("kiln:rollout:*")]
    responses = [name async for name in rig.redis.scan_iter("kiln:response:*")]
    return len(rollouts) + len(responses)


def _without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_ids(inner) for name, inner in value.items() if name not in _DRAWN_ANEW}
    return [_without_ids(inner) for inner in value] if isinstance(value, list) else value


async def page(rig: Rig) -> str:
    """The document: a table for each route."""
    parts = [
        "<!-- Written by tests/conformance/test_openai_fields.py; `make docs` renews it. -->\n",
        "# Every field of the OpenAI client\n",
        "For each field that `openai` can send: whether it works (something differs with it), is accepted",
        "without effect, or is refused by name. A test sends each of them and writes this page. Fields of",
        "Kiln's own are in [api.md](api.md).\n",
    ]
    for route in SAMPLES:
        parts += [f"## `POST {route}`\n", "| field | | |", "|---|---|---|"]
        for name in client_fields(route):
            found = await verdict(rig, route, name)
            parts.append(f"| `{name}` | {found.status} | {found.note} |")
        parts.append("")
    return "\n".join(parts)
