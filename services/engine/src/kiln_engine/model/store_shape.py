"""The numbers of the stores that decide where things lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StoreShape:
    """Sizes that a plan's ids are turned into places with.

    The page table has a line for each state slot, whose sequence it belongs to, and a spare one for
    rows that only fill up a batch.
    """

    page_tokens: int
    num_line_pages: int  # M, of the longest sequence
    num_state_slots: int

    @property
    def spare_line(self) -> int:
        return self.num_state_slots
