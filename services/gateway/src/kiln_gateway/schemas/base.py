"""What all request schemas share: strict types, no unknown fields, finite numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """A request body or a part of one.

    Where fields contradict each other, a model validator raises ValueError with a message that begins
    with the name of the field to change: it becomes the error's `param`.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _to_stop_list(value: Any) -> Any:
    if value is None:
        return []
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(stop, str) for stop in strings):
        raise PydanticCustomError("stop_type", "Should be a string or a list of strings")
    if any(not stop for stop in strings):
        raise PydanticCustomError("stop_empty", "A stop string cannot be empty")
    return strings


TokenIds = list[Annotated[int, Field(ge=0)]]
StopStrings = Annotated[
    list[Annotated[str, Field(max_length=1024)]], BeforeValidator(_to_stop_list), Field(max_length=16)
]
# A reference to an adapter as clients write it: "name" or "name@version".
Reference = Annotated[str, Field(min_length=1, max_length=128)]
