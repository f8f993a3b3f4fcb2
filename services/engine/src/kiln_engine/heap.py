"""Keeps Python's collector away from what start-up made."""

from __future__ import annotations

import gc

# New objects until the youngest are collected; such collections until the next older, and the full one.
_THRESHOLDS = (5_000, 10, 100)


def freeze_heap() -> None:
    """Leave every object that is alive now out of later collections; once, when the engine stands.

    torch, Triton and gRPC make some 220,000 objects that stay. A full collection walks them in 120 ms,
    during which no step is launched, and a batch of 256 sequences makes enough objects for one every
    hundred steps or so. What such a batch itself keeps alive still costs 20 ms or more to walk, so full
    collections come more rarely as well: what a request leaves goes by its counts, cycles are few.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
