"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kiln_gateway.schemas.base import Body, Reference
from kiln_gateway.schemas.completions import prompt_list
from kiln_gateway.schemas.sampling import ComposedAdapter

MAX_INPUTS = 2048


class EmbeddingsBody(Body):
    input: Annotated[list[str | list[int]], Field(max_length=MAX_INPUTS), prompt_list("input")] = Field(
        description="texts, or token ids"
    )
    model: Reference | None = Field(None, description="base model id, adapter name or name@version")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="so many leading numbers, scaled to length 1 again"
    )
    user: str | None = Field(None, description="accepted without effect")
    # Kiln's own.
    adapter: Reference | None = None
    adapters: Annotated[list[ComposedAdapter], Field(min_length=1, max_length=8)] | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None

    @property
    def is_adapter_given(self) -> bool:
        """Whether the request has the field `adapter`, null included."""
        return "adapter" in self.model_fields_set
