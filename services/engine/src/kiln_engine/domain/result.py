"""What a step produced, and what it means for each request."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from kiln_common.errors import KilnError
from kiln_engine.domain.adapter import AdapterVersion


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class RowResult:
    """The token drawn for one row.

    `logprob` is at temperature 1 with nothing filtered; `sampled_logprob` under the distribution it
    was drawn from (temperature, penalties, bias and truncation applied; 0.0 when greedy). A
    `logprob` that is not finite says that the logits were not, and `token_id` means nothing.
    """

    sequence_id: int
    token_id: int
    logprob: float
    sampled_logprob: float
    # (token id, logprob at temperature 1), best first.
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PackedTop:
    """For each of some tokens its `num_top` alternatives, best first: native int32 ids, float32 logprobs."""

    num_top: int
    token_ids: bytes
    logprobs: bytes

    @classmethod
    def of(cls, rows: Iterable[Sequence[tuple[int, float]]]) -> PackedTop:
        """Pack (token id, logprob) pairs, as many for each token."""
        rows = [*rows]
        ids, logprobs = (
            array(code, (pair[i] for row in rows for pair in row)) for i, code in enumerate("if")
        )
        return cls(len(rows[0]) if rows else 0, ids.tobytes(), logprobs.tobytes())

    def rows(self) -> list[tuple[tuple[int, float], ...]]:
        """The pairs of each token."""
        if not self.num_top:
            return []
        pairs = [*zip(array("i", self.token_ids), array("f", self.logprobs), strict=True)]
        return [tuple(pairs[i : i + self.num_top]) for i in range(0, len(pairs), self.num_top)]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The tokens one verify row has drawn, in order: those its drafts had guessed, and the one after them."""

    sequence_id: int
    rows: tuple[RowResult, ...]


@dataclass(frozen=True, slots=True)
class ReadoutResult:
    """What one chunk told about its tokens, as its Readout asked."""

    sequence_id: int
    # log p of each target at temperature 1, nothing filtered; not finite where the logits were not.
    logprobs: tuple[float, ...] = ()
    # For each target.
    top: PackedTop = PackedTop(0, b"", b"")
    # Of length 1; empty unless it was wanted.
    embedding: tuple[float, ...] = ()

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.logprobs)) and all(map(math.isfinite, self.embedding))


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry for each decode row and each chunk with sampling, one for each chunk that is read out,
    and one for each verify row."""

    step_id: int
    rows: tuple[RowResult, ...]
    readouts: tuple[ReadoutResult, ...] = ()
    verified: tuple[VerifyResult, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """What one step means for one request; the last event of a request has a finish_reason."""

    request_id: str
    row: RowResult | None = None
    finish_reason: FinishReason | None = None
    # Set with FinishReason.ERROR.
    error: KilnError | None = None
    # Set with the first token, or with the end where there is none.
    is_first: bool = False
    num_cached_tokens: int = 0
    queue_s: float = 0.0
    seed: int = 0
    # Set with the first token that other adapters drew than those before it.
    moved_to: tuple[AdapterVersion, ...] = ()
    # What a chunk of the prompt told, where that was asked for; `packs_readout`: as the request wants it.
    readout: ReadoutResult | None = None
    packs_readout: bool = False
