"""Options of `kiln train` as the body of a job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from kiln_cli.errors import InvalidSetting


def job_fields(settings: Sequence[str], **given: Any) -> dict[str, Any]:
    """The options that were given, names with a dot being fields of an object, then `--set`s over them."""
    body: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            put(body, name.replace("__", "."), value)
    for setting in settings:
        name, mark, text = setting.partition("=")
        if not mark or not name or name.startswith(".") or name.endswith("."):
            raise InvalidSetting(f"{setting!r} is not NAME=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        put(body, name, value)
    return body


def put(body: dict[str, Any], name: str, value: Any) -> None:
    """`body["lora"]["rank"] = value` for "lora.rank". Raises InvalidSetting."""
    *parents, last = name.split(".")
    for parent in parents:
        body = body.setdefault(parent, {})
        if not isinstance(body, dict):
            raise InvalidSetting(f"{name}: {parent} is a value, not an object")
    body[last] = value
