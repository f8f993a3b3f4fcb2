"""Bodies of the adapter routes."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from kiln_gateway.schemas.base import Body, Reference


class AttachBody(Body):
    version: Annotated[int, Field(ge=1)] | None = None


class RollbackBody(Body):
    """The version that the adapter's name is to mean again."""

    version: Annotated[int, Field(ge=1)]


class MergeSource(Body):
    name: Reference
    weight: float = Field(1.0, description="how much it counts; negative subtracts, 0 is refused")


class MergeBody(Body):
    """Several adapters as a new version of `output`."""

    sources: list[MergeSource] = Field(min_length=1, max_length=16)
    mode: Literal["linear", "ties", "concat"] = Field(
        description="concat is the exact weighted sum and adds the ranks up; the others keep the rank"
    )
    output: str = Field(min_length=1, max_length=128, description="name to publish the result under")
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of each matrix's entries that ties keeps; 0.5 unless given"
    )

    @model_validator(mode="after")
    def _has_density_only_with_ties(self) -> Self:
        if self.density is not None and self.mode != "ties":
            raise ValueError(f"density is for the mode ties, mode is {self.mode}")
        if any(source.weight == 0 for source in self.sources):
            raise ValueError("sources has a weight of 0: leave that source out")
        return self


class EmptyBody(Body):
    pass
