"""The engine's words: requests, plans and results. Standard library only."""

from kiln_engine.domain.plan import (
    BatchPlan,
    DecodeRow,
    PrefillChunk,
    Readout,
    RowSampling,
    StateCheckpoint,
    VerifyRow,
)
from kiln_engine.domain.request import AdapterUse, GenerationRequest, SamplingParams
from kiln_engine.domain.result import (
    FinishReason,
    ReadoutResult,
    RowResult,
    SequenceEvent,
    StepResult,
    VerifyResult,
)

__all__ = [
    "AdapterUse",
    "BatchPlan",
    "DecodeRow",
    "FinishReason",
    "GenerationRequest",
    "PrefillChunk",
    "Readout",
    "ReadoutResult",
    "RowResult",
    "RowSampling",
    "SamplingParams",
    "SequenceEvent",
    "StateCheckpoint",
    "StepResult",
    "VerifyResult",
    "VerifyRow",
]
