"""How an evaluation draws its answers, and the gate of a training job."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from kiln_gateway.schemas.base import Body


class EvalSettings(Body):
    """How the answers are drawn; the same for every case and for all versions to be compared."""

    max_tokens: Annotated[int, Field(ge=1, le=2**20)] = 512
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    thinking: Annotated[bool | None, Field(description="left out: as the server does by default")] = None


class GateFields(Body):
    """What a training job's result has to reach before it is published."""

    suite: Annotated[str, Field(min_length=1, max_length=160)]
    min_score: Annotated[float, Field(ge=0, le=1)] = Field(description="lowest mean score that passes")
    sampling: EvalSettings = EvalSettings()
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        3600.0, description="longest wait for the evaluation; after it the result has not passed"
    )
