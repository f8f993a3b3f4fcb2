"""Keeps Python's collector away from what start-up made."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Leave every object that is alive now out of later collections; once, when the engine stands.

    torch, Triton and gRPC make some 220,000 objects that stay. A full collection walks them in 120 ms,
    during which no step is launched, and a batch of 256 sequences makes enough objects for one every
    hundred steps or so.
    """
    gc.collect()
    gc.freeze()
