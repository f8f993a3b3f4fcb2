"""What a request is told beside its tokens."""

from __future__ import annotations

from dataclasses import replace

from kiln_engine.domain.result import SequenceEvent
from kiln_engine.scheduling.sequence import Sequence


def with_beginning(event: SequenceEvent, sequence: Sequence) -> SequenceEvent:
    """A request's first event of its kind: what only its beginning tells goes with it."""
    assert sequence.first_scheduled_s is not None
    return replace(
        event,
        is_first=True,
        num_cached_tokens=sequence.num_cached_tokens or 0,
        queue_s=sequence.first_scheduled_s - sequence.request.arrival_s,
        seed=sequence.request.sampling.seed,
    )
