"""Renders conversations with the demo model's own chat template, as the server does."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_PATH = Path(__file__).parent / "chat_template.jinja"

Message = dict[str, Any]


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@cache
def template() -> Template:
    """The compiled template, with the filters and functions chat templates rely on."""
    environment: Environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def render_prompt(
    messages: list[Message], tools: list[Message] | None = None, *, thinking: bool = False
) -> str:
    """The prompt up to where the assistant goes on."""
    return template().render(
        messages=messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking
    )


def render_with_answer(
    messages: list[Message], answer: Message, tools: list[Message] | None = None, *, thinking: bool = False
) -> tuple[str, str]:
    """The prompt, and the text the assistant adds to it, end-of-turn mark included.

    Raises:
        ValueError: the template renders the finished turn unlike its own generation prompt.
    """
    prompt = render_prompt(messages, tools, thinking=thinking)
    whole = template().render(messages=[*messages, answer], tools=tools)
    if not whole.startswith(prompt):
        raise ValueError(f"the finished conversation does not begin with its prompt: {prompt[-80:]!r}")
    return prompt, whole[len(prompt) :]
