"""POST /v1/corrections."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kiln_gateway.schemas.base import Body


class CorrectionBody(Body):
    completion_id: Annotated[str, Field(min_length=1, max_length=128)]
    index: Annotated[int, Field(ge=0, lt=2**31)] = 0
    correction: Annotated[str, Field(min_length=1, description="what the answer should have been")]
