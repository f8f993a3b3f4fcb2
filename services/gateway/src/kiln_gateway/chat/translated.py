"""Requests of other APIs as chat requests, with complaints in the words of the API they came by."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kiln_common.errors import KilnError
from kiln_gateway.request_body import validate
from kiln_gateway.schemas.chat import ChatCompletionBody

_ROOT = re.compile(r"[^.\[]*")


def chat_body(fields: Mapping[str, Any]) -> ChatCompletionBody:
    """Fields of a chat request, those that are None left out. Raises InvalidField."""
    return validate({name: value for name, value in fields.items() if value is not None}, ChatCompletionBody)


@contextlib.contextmanager
def complaints_about(fields: Mapping[str, str]) -> Iterator[None]:
    """Errors about a chat field name the field of the other API that it came from."""
    try:
        yield
    except KilnError as error:
        found = _ROOT.match(error.param)
        root = found.group() if found else ""
        if root in fields:
            error.param = fields[root]
        raise
