"""The numbers of the stores that decide where things lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StoreShape:
    """Sizes that a plan's ids are turned into places with.

    The page table has a line of `num_line_pages` for each state slot, and a spare one for rows that only
    fill up a batch.
    """

    page_tokens: int
    num_line_pages: int
    num_state_slots: int
    # Query heads that share a kv head: they share the tiles of prompt attention.
    num_grouped_heads: int = 1
    # Rows (tokens times grouped heads) of such a tile in the steps that graphs serve.
    graph_tile_rows: int = 64
    # Whether all steps have such tiles.
    has_one_tile_size: bool = False

    @classmethod
    def of(
        cls, *, page_tokens: int, max_model_len: int, num_state_slots: int, **attention: Any
    ) -> StoreShape:
        """`attention`: the fields that say how prompt attention is cut."""
        return cls(page_tokens, -(-max_model_len // page_tokens), num_state_slots, **attention)

    @property
    def spare_line(self) -> int:
        return self.num_state_slots
