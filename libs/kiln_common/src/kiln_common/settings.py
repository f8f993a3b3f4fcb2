"""How a process reads its settings, and ends when they cannot work."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import AfterValidator, ValidationError
from pydantic_settings import BaseSettings, SettingsError

from kiln_common.errors import KilnError

# The exit code of a process whose configuration cannot work: starting it again would not help.
EXIT_CONFIG = os.EX_CONFIG
# That of a process whose device has failed: another one can go on.
EXIT_DEVICE = os.EX_OSERR

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


def _known_log_level(value: str) -> str:
    if value.upper() not in _LOG_LEVELS:
        raise ValueError(f"Input should be {', '.join(_LOG_LEVELS[:-1])} or {_LOG_LEVELS[-1]}")
    return value.upper()


LogLevel = Annotated[str, AfterValidator(_known_log_level)]

Settings = TypeVar("Settings", bound=BaseSettings)

# Fields of these names may hold keys or passwords, so their values are never shown.
_SECRET_NAME = re.compile(r"(keys?|url|token|password)$")
_PLAIN_WORDS = {
    "bool_parsing": "is not true or false",
    "float_parsing": "is not a valid number",
    "int_from_float": "is not a valid integer",
    "int_parsing": "is not a valid integer",
}


class ConfigurationError(KilnError):
    """Base of errors that the same configuration would meet again at the next start."""


def read_settings(settings_class: type[Settings]) -> Settings:
    """The settings from the environment; ends the process with EXIT_CONFIG when they are wrong.

    Each problem is one line on standard error that names the environment variable.
    """
    try:
        return settings_class()
    except ValidationError as error:
        lines = [_problem(settings_class, dict(details)) for details in error.errors(include_url=False)]
    except SettingsError as error:
        lines = [_not_json(settings_class, error)]
    _exit(lines)


def exit_for_configuration(error: ConfigurationError) -> NoReturn:
    """End the process with EXIT_CONFIG and say why on standard error."""
    _exit([f"{error.code}: {error}", *([f"  {error.hint}"] if error.hint else [])])


def _exit(lines: Iterable[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    sys.exit(EXIT_CONFIG)


def _variable(settings_class: type[BaseSettings], field: str) -> str:
    return f"{settings_class.model_config.get('env_prefix', '')}{field}".upper()


def _problem(settings_class: type[BaseSettings], details: Mapping[str, Any]) -> str:
    """One line for one entry of pydantic's `errors()`."""
    kind, message = details["type"], details["msg"].removeprefix("Value error, ")
    if not details["loc"]:  # about several settings together; the message names them
        return message
    field, *inside = details["loc"]
    if kind == "missing" and not inside:
        return f"{_variable(settings_class, field)}: is required, and not set"
    if kind == "extra_forbidden":
        inside = inside[:-1]  # the unknown name itself was typed by somebody, and may be a key
    place = "".join(f" {part}" if isinstance(part, str) else f" [{part}]" for part in inside)
    return f"{_variable(settings_class, field)}{place}: {_fault(str(field), kind, message, details)}"


def _fault(field: str, kind: str, message: str, details: Mapping[str, Any]) -> str:
    is_secret = _SECRET_NAME.search(field) is not None
    subject = "the value" if is_secret else repr(details["input"])
    if kind in _PLAIN_WORDS:
        return f"{subject} {_PLAIN_WORDS[kind]}"
    general = re.sub(r"^(Input|String|Value) ", "", message)
    if general != message:
        return f"{subject} {general}"
    return message if is_secret or kind == "missing" else f"{subject}: {message}"


def _not_json(settings_class: type[BaseSettings], error: SettingsError) -> str:
    """The value itself stays out of the message: it is most likely a key."""
    match = re.search(r'field "(\w+)"', str(error))
    if match is None:
        return str(error)
    field = match.group(1)
    info = settings_class.model_fields.get(field)
    expected = (
        f"; expected {info.description.removeprefix('JSON: ')}"
        if info is not None and info.description
        else ""
    )
    return f"{_variable(settings_class, field)}: the value is not valid JSON{expected}"
