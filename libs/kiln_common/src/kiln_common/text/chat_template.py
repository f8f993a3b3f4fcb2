"""A checkpoint's chat template, rendered in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kiln_common.errors import InvalidRequest
from kiln_common.settings import ConfigurationError


class TemplateUnusable(ConfigurationError):
    """The model folder has no chat template, or one that cannot be read."""

    code = "chat_template_unusable"
    hint = "The model folder needs chat_template.jinja, or chat_template in tokenizer_config.json."


class TemplateRefused(InvalidRequest):
    """The template itself rejects the conversation, or fails on it."""

    code = "invalid_messages"
    param = "messages"
    hint = "The model's chat template does not accept this sequence of messages."


class _Raised(TemplateError):
    """Raised by a template's raise_exception(...)."""


class ChatTemplate:
    """Renders messages as the model was trained to read them.

    The environment offers what chat templates expect: raise_exception, strftime_now, a tojson that
    keeps non-ASCII text and does not escape HTML, and loop controls.
    """

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise TemplateUnusable(f"line {error.lineno} of the chat template: {error.message}") from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read the template of a checkpoint folder. Raises TemplateUnusable."""
        path = folder / "chat_template.jinja"
        if path.is_file():
            return cls(path.read_text(encoding="utf-8"))
        config_path = folder / "tokenizer_config.json"
        if not config_path.is_file():
            raise TemplateUnusable(f"{folder} has neither chat_template.jinja nor tokenizer_config.json")
        try:
            source = json.loads(config_path.read_text(encoding="utf-8")).get("chat_template")
        except ValueError as error:
            raise TemplateUnusable(f"{config_path} is not JSON: {error}") from error
        if isinstance(source, list):  # several named templates
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if not isinstance(source, str):
            raise TemplateUnusable(f"{config_path} has no chat_template")
        return cls(source)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text; `variables` may have any names, those of the arguments aside.

        Raises:
            TemplateRefused: the template raised an error; its own words are in the message.
        """
        try:
            return self._template.render(
                {
                    **(variables or {}),
                    "messages": list(messages),
                    "tools": list(tools) if tools else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _Raised as error:
            raise TemplateRefused(f"the chat template refuses the messages: {error}") from error
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateRefused(f"the chat template fails on the messages: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
