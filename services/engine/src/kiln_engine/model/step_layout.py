"""Where everything of one step lies: a BatchPlan turned into index tensors.

The step's tokens are flat: first one per decode row, then the prefill chunks, end to end. All
index lists travel to the device as one tensor, once per step; the layers only look things up.

Legend: `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model.decode_layout import DecodeLayout, DecodeLists
from kiln_engine.model.index_lists import IndexLists, StoreShape
from kiln_engine.model.prefill_layout import PrefillLayout, PrefillLists


@dataclass(frozen=True)
class StepLayout:
    """One step's index tensors."""

    num_tokens: int
    num_decode_rows: int
    # -1 where the token is the one drawn last for the row's live slot: `SampledIds.feed_` puts it in.
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    token_slots_T: torch.Tensor
    # The tokens whose next one is sampled, in the order of StepResult.rows.
    sample_tokens: torch.Tensor
    num_samples: int
    # The live slots their tokens stay with.
    sample_slots: torch.Tensor
    begun_pages: torch.Tensor
    moved_to_slots: torch.Tensor
    decode: DecodeLayout | None
    prefill: PrefillLayout | None


def build_layout(plan: BatchPlan, shape: StoreShape, device: torch.device) -> StepLayout:
    """Work out one step's indices on the host and send them to the device."""
    lists = IndexLists()
    decode = DecodeLists(lists, plan.decode_rows, shape) if plan.decode_rows else None
    prefill = PrefillLists(lists, plan.prefill_chunks, shape) if plan.prefill_chunks else None
    num_rows = len(plan.decode_rows)
    token_ids = [-1 if row.token_id is None else row.token_id for row in plan.decode_rows]
    positions = [row.position for row in plan.decode_rows]
    samples = list(range(num_rows))
    slots_after = [
        row.state_slot if row.state_commit_slot is None else row.state_commit_slot for row in plan.decode_rows
    ]
    num_tokens = num_rows
    for chunk in plan.prefill_chunks:
        token_ids.extend(chunk.token_ids)
        positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
        num_tokens += len(chunk.token_ids)
        if chunk.sampling is not None:
            samples.append(num_tokens - 1)
            slots_after.append(chunk.state_slot)
    ids = lists.add(token_ids)
    places = lists.add(positions)
    slots = lists.add(_token_slots(plan, shape.page_tokens))
    sampled = lists.add(samples)
    sampled_to = lists.add(slots_after)
    begun = lists.add(_begun_pages(plan, shape.page_tokens))
    moved = lists.add(
        [
            row.state_commit_slot
            for row in plan.decode_rows
            if row.state_commit_slot not in (None, row.state_slot)
        ]
    )
    parts = lists.to_device(device)
    return StepLayout(
        num_tokens=num_tokens,
        num_decode_rows=num_rows,
        token_ids_T=parts[ids],
        positions_T=parts[places],
        token_slots_T=parts[slots],
        sample_tokens=parts[sampled],
        num_samples=len(samples),
        sample_slots=parts[sampled_to],
        begun_pages=parts[begun],
        moved_to_slots=parts[moved],
        decode=decode.layout(parts) if decode else None,
        prefill=prefill.layout(parts) if prefill else None,
    )


def _token_slots(plan: BatchPlan, page_tokens: int) -> list[int]:
    slots = [
        row.page_ids[row.position // page_tokens] * page_tokens + row.position % page_tokens
        for row in plan.decode_rows
    ]
    for chunk in plan.prefill_chunks:
        end = chunk.start + len(chunk.token_ids)
        for first in range(chunk.start, end, page_tokens):
            base = chunk.page_ids[first // page_tokens] * page_tokens
            slots.extend(range(base, base + min(page_tokens, end - first)))
    return slots


def _begun_pages(plan: BatchPlan, page_tokens: int) -> list[int]:
    """Pages that this step begins without filling them."""
    pages = [
        row.page_ids[row.position // page_tokens]
        for row in plan.decode_rows
        if row.position % page_tokens == 0
    ]
    for chunk in plan.prefill_chunks:
        end = chunk.start + len(chunk.token_ids)
        if end % page_tokens:
            pages.append(chunk.page_ids[end // page_tokens])
    return pages
