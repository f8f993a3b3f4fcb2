"""Bodies of the adapter routes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kiln_gateway.schemas.base import Body


class AttachBody(Body):
    version: Annotated[int, Field(ge=1)] | None = None


class RollbackBody(Body):
    """The version that the adapter's name is to mean again."""

    version: Annotated[int, Field(ge=1)]


class EmptyBody(Body):
    pass
