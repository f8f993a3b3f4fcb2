"""Reads a JSON body within its limit and checks it against a schema, in Kiln's own error shape."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
import reprlib
from collections.abc import Collection
from typing import Any, TypeVar, get_args

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from kiln_gateway.errors import BodyTooLarge, InvalidField, InvalidJson

Model = TypeVar("Model", bound=BaseModel)

# A body that is too large is still read, up to this many times the limit, so that the client gets
# the answer instead of a broken connection.
_DRAIN_FACTOR = 8
_PARSE_IN_THREAD_BYTES = 256 * 1024
# What pydantic puts into a location for the branch of a union; no field is named like this.
_UNION_BRANCH = re.compile(r"constrained-\w+|(literal|list|dict)\[.*\]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

# Codes of a body that breaks its schema, and what to do about them; docs/errors.md lists them too.
# Schemas raise them as the type of a PydanticCustomError, all but unknown_field.
HINTS = {
    "empty_messages": "Send at least one message, such as {'role': 'user', 'content': 'Hello'}.",
    "empty_prompt": "Send at least one character or token.",
    "empty_text": "Send some text.",
    "invalid_reward": "Every reward must be a finite number, or an object of finite numbers.",
    "missing_rewards": "Send one reward for each completion.",
    "length_mismatch": "Send lists of the same length.",
    "group_too_small": "A group needs at least two completions of the same prompt to compare.",
    "no_learning_signal": "Rewards must differ within at least one group; score the completions more finely.",
    "empty_groups": "Send at least one group.",
    "empty_examples": "Send at least one example.",
    "conflicting_fields": "Send one form or the other.",
    "invalid_scale": "Leave the adapter out instead of scaling it to nothing.",
    "unsupported_content": "This model reads text: send a string or parts of type text.",
    "unsupported_tool": "Only functions can be called: describe the tool as one and run it on your side.",
    "unknown_field": "Leave the field out; the answer's own hint names the nearest field, or all there are.",
    "missing_field": "Add the field; GET /openapi.json says what each route needs.",
}
# What happened, for those of the codes that no error class has; for docs/errors.md.
MEANINGS = {
    "empty_messages": "The conversation has no messages.",
    "empty_text": "A text that something is to be done with is empty.",
    "missing_rewards": "There are completions and no rewards for them.",
    "empty_groups": "The job has no groups of completions.",
    "empty_examples": "The job has no examples.",
    "conflicting_fields": "Fields that exclude each other were sent together, or none of those of which one is needed.",
    "invalid_scale": "An adapter is to be added with the scale 0.",
    "unsupported_content": "A message has a part that is not text, such as an image.",
    "unsupported_tool": "A tool is not a function.",
    "unknown_field": "The body, or the query, has a field that the route does not know.",
    "missing_field": "A field that the route needs was not sent.",
}
# What to do about a value outside its range, where the range alone does not say it.
_FIELD_HINTS = {"learning_rate": "Adapters mostly learn well between 1e-5 and 1e-3."}
# Names other trainers and servers use, and the field meant here.
_ALIASES = {
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_new_tokens": "max_tokens",
}
_DEFAULT_HINT = "GET /openapi.json has every field with its type and range."
_CONTRADICTION_HINT = "Change one of the fields that the message names, or leave it out."


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The whole body. Raises BodyTooLarge."""
    declared = request.headers.get("content-length", "")
    is_too_large = declared.isdigit() and int(declared) > limit_bytes
    parts: list[bytes] = []
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > limit_bytes * _DRAIN_FACTOR:
            break
        if num_bytes > limit_bytes:
            is_too_large = True
        if is_too_large:
            parts.clear()
        else:
            parts.append(part)
    if is_too_large:
        raise BodyTooLarge(limit_bytes)
    # Where Starlette's own Request.body() keeps it, so that it can be read again.
    request._body = b"".join(parts)
    return request._body


async def parse_body(request: Request, schema: type[Model], limit_bytes: int) -> Model:
    """The body as `schema`.

    Raises:
        BodyTooLarge, InvalidJson, InvalidField: with the field at fault as param.
    """
    raw = await read_body(request, limit_bytes)
    if len(raw) > _PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(parse_bytes, raw, schema)
    return parse_bytes(raw, schema)


def parse_bytes(raw: bytes, schema: type[Model]) -> Model:
    """`raw` as `schema`. Raises InvalidJson, InvalidField."""
    try:
        # The standard parser reads NaN and Infinity, so that the field they stand in can be named.
        body = json.loads(raw.decode())
    except RecursionError:
        raise InvalidJson("the body is nested too deeply") from None
    except ValueError as error:
        raise InvalidJson(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidJson(f"the body is a JSON {_json_type(body)}, not an object")
    if _SURROGATE.search(raw):
        _refuse_unpaired_surrogates(body)
    return validate(body, schema)


def validate(body: dict[str, Any], schema: type[Model]) -> Model:
    """`body` as `schema`. Raises InvalidField."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        raise _to_invalid_field(error.errors(include_url=False), schema) from None
    except RecursionError:
        raise InvalidJson("the body is nested too deeply") from None


def _refuse_unpaired_surrogates(body: Any) -> None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise InvalidJson("the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise InvalidJson(
            "the body has a string with an unpaired surrogate",
            hint="\\uD800 to \\uDFFF may only appear in pairs.",
        ) from None


def _to_invalid_field(problems: list[ErrorDetails], schema: type[BaseModel]) -> InvalidField:
    """The problem a client should fix first: a field we do not know, then the first in order."""
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location, known = _located(schema, problem["loc"])
    param = _path(location)
    if problem["type"] == "extra_forbidden":
        return _unknown_field(str(location[-1]), param, known)
    if problem["type"] == "missing":
        return InvalidField(
            "missing_field", f"`{param}` is missing", param=param, hint=HINTS["missing_field"]
        )
    if problem["type"] in HINTS:
        context = problem.get("ctx") or {}
        return InvalidField(
            problem["type"], problem["msg"], param=context.get("param", param), hint=HINTS[problem["type"]]
        )
    if problem["type"] == "value_error":
        return _contradiction(str(problem["ctx"]["error"]), location, known)
    shown = _shown(problem["input"])
    message = f"`{param}`: {problem['msg'][:1].lower()}{problem['msg'][1:]}, got {shown}"
    return InvalidField("invalid_value", message, param=param, hint=_FIELD_HINTS.get(param, _DEFAULT_HINT))


def _contradiction(message: str, location: tuple[int | str, ...], known: list[str]) -> InvalidField:
    """What a schema's check over several fields says; its message begins with the field to change."""
    field = message.split(" ", 1)[0]
    param = _path((*location, field) if field in known else location)
    return InvalidField("invalid_value", message, param=param, hint=_CONTRADICTION_HINT)


def _unknown_field(name: str, param: str, known: Collection[str]) -> InvalidField:
    message = f"there is no field `{param}`"
    return InvalidField("unknown_field", message, param=param, hint=unknown_name_hint(name, known))


def unknown_name_hint(name: str, known: Collection[str]) -> str:
    """What to do about a name that is not among `known`: the nearest, or all there are."""
    alias = _ALIASES.get(name)
    nearest = [alias] if alias in known else difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if nearest:
        return f"Did you mean `{nearest[0]}`?"
    if known:
        return "Leave it out. Known here: " + ", ".join(sorted(known))
    return "Leave it out: there are no fields here."


def _located(
    schema: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[tuple[int | str, ...], list[str]]:
    """A location without the tags that tell models of a union apart, and the fields of the last model in it."""
    current, parts = [schema], []
    for part in location:
        if len(current) > 1 and (tagged := [model for model in current if _is_tagged(model, part)]):
            current = tagged
            continue
        parts.append(part)
        field = current[0].model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            current = _models_in(field.annotation) or current
    return tuple(parts), [field.alias or name for name, field in current[0].model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _is_tagged(model: type[BaseModel], tag: int | str) -> bool:
    field = model.model_fields.get("type")
    return field is not None and tag in get_args(field.annotation)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as "messages[0].role"."""
    text = ""
    for part in location:
        if isinstance(part, str) and _UNION_BRANCH.fullmatch(part):
            continue
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _shown(value: Any) -> str:
    # The whole of a large value is not worth writing.
    text = reprlib.repr(value) if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
