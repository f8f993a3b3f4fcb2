"""Which pages each running sequence has, on the device: attention looks them up there.

Legend: `S` state slots, `M` pages of the longest sequence.
"""

from __future__ import annotations

import torch

from kiln_engine.domain.plan import BatchPlan, DecodeRow, PrefillChunk, VerifyRow
from kiln_engine.model.store_shape import StoreShape
from kiln_engine.model.transfers import to_device


def page_table_bytes(num_state_slots: int, max_model_len: int, page_tokens: int) -> int:
    """Bytes of the table: a line for each state slot, and a spare one."""
    return (num_state_slots + 1) * -(-max_model_len // page_tokens) * torch.int32.itemsize


class PageTable:
    """A line of page ids for each live state slot, that of the sequence that owns it.

    Plans name all pages of their rows; what differs from the plans before is sent. That is mostly a
    page that a row has begun, but also one that gave way to the same page in the prefix tree, and
    everything when a slot has a new owner.
    """

    def __init__(self, shape: StoreShape, device: torch.device) -> None:
        self.lines_SM = torch.zeros(
            (shape.num_state_slots + 1, shape.num_line_pages), dtype=torch.int32, device=device
        )
        self._num_line_pages = shape.num_line_pages
        # What each line begins with.
        self._known: dict[int, tuple[int, ...]] = {}

    @property
    def num_bytes(self) -> int:
        return self.lines_SM.nbytes

    def update(self, plan: BatchPlan) -> None:
        """Let every row and chunk of the plan find its pages."""
        places: list[int] = []
        page_ids: list[int] = []
        sent: dict[int, tuple[int, ...]] = {}
        parts: list[DecodeRow | PrefillChunk | VerifyRow] = [
            *plan.decode_rows,
            *plan.prefill_chunks,
            *plan.verify_rows,
        ]
        for part in parts:
            pages, known = part.page_ids, self._known.get(part.state_slot, ())
            if pages == known:
                continue
            assert len(pages) <= self._num_line_pages, (len(pages), self._num_line_pages)
            start = len(known) if pages[: len(known)] == known else 0
            first = part.state_slot * self._num_line_pages
            places.extend(range(first + start, first + len(pages)))
            page_ids.extend(pages[start:])
            sent[part.state_slot] = pages
        if places:
            numbers = to_device([places, page_ids], self.lines_SM.device, torch.long)
            self.lines_SM.view(-1).index_copy_(0, numbers[0], numbers[1].to(torch.int32))
        # Only now: what could not be sent is not on the device.
        self._known.update(sent)
