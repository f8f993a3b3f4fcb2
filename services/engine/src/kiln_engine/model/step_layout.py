"""Where everything of one step lies: a BatchPlan turned into index tensors.

The step's tokens are flat: first one per decode row, then the prefill chunks, end to end.

Legend: `T` tokens, `R` decode rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_engine.domain.plan import BatchPlan
from kiln_engine.model.decode_layout import DecodeLayout, decode_fields, decode_layout
from kiln_engine.model.prefill_layout import PrefillLayout, prefill_numbers
from kiln_engine.model.store_shape import StoreShape
from kiln_engine.model.transfers import to_device


@dataclass(frozen=True)
class StepLayout:
    """One step's index tensors."""

    num_tokens: int
    num_decode_rows: int
    # -1 where the token is the one drawn last for the row's live slot: `SampledIds.feed_` puts it in.
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    token_slots_T: torch.Tensor
    # Where the hidden state of the token before each is found, as CarriedHidden says it.
    carried_slots_T: torch.Tensor
    # The last tokens of rows and chunks, and the live slots with which their hidden states stay (-1:
    # none); None is every token.
    last_tokens: torch.Tensor | None
    last_slots: torch.Tensor
    # The tokens whose next one is sampled, in the order of StepResult.rows; None is every one.
    sample_tokens: torch.Tensor | None
    # The live slots their tokens stay with.
    kept_slots: torch.Tensor
    decode: DecodeLayout | None
    prefill: PrefillLayout | None


def build_layout(plan: BatchPlan, shape: StoreShape, device: torch.device) -> StepLayout:
    """Work out one step's indices on the host and send them to the device."""
    decode = prefill = None
    if plan.decode_rows:
        fields = decode_fields(plan.decode_rows, shape)
        decode = decode_layout(to_device(torch.from_numpy(fields), device))
    if plan.prefill_chunks:
        numbers = prefill_numbers(plan.prefill_chunks, shape)
        prefill = numbers.layout(to_device(torch.from_numpy(numbers.flat), device))
    return join_layouts(decode, prefill)


def join_layouts(decode: DecodeLayout | None, prefill: PrefillLayout | None) -> StepLayout:
    """One layout of the rows and the chunks of a step."""
    if prefill is None:
        assert decode is not None
        return StepLayout(
            num_tokens=decode.num_rows,
            num_decode_rows=decode.num_rows,
            token_ids_T=decode.token_ids_R,
            positions_T=decode.positions_R,
            token_slots_T=decode.token_slots_R,
            carried_slots_T=decode.delta.ring_slots_R,
            last_tokens=None,
            last_slots=decode.kept_slots_R,
            sample_tokens=None,
            kept_slots=decode.kept_slots_R,
            decode=decode,
            prefill=None,
        )
    if decode is None:
        return StepLayout(
            num_tokens=prefill.num_tokens,
            num_decode_rows=0,
            token_ids_T=prefill.token_ids_T,
            positions_T=prefill.positions_T,
            token_slots_T=prefill.token_slots_T,
            carried_slots_T=prefill.carried_slots_T,
            last_tokens=prefill.last_tokens_N,
            last_slots=prefill.delta.live_slots_N,
            sample_tokens=prefill.sample_tokens_N,
            kept_slots=prefill.kept_slots_N,
            decode=None,
            prefill=prefill,
        )
    num_rows = decode.num_rows
    rows = torch.arange(num_rows, device=decode.token_ids_R.device)
    return StepLayout(
        num_tokens=num_rows + prefill.num_tokens,
        num_decode_rows=num_rows,
        token_ids_T=torch.cat((decode.token_ids_R, prefill.token_ids_T)),
        positions_T=torch.cat((decode.positions_R, prefill.positions_T)),
        token_slots_T=torch.cat((decode.token_slots_R, prefill.token_slots_T)),
        carried_slots_T=torch.cat((decode.delta.ring_slots_R, prefill.carried_slots_T)),
        last_tokens=torch.cat((rows, prefill.last_tokens_N + num_rows)),
        last_slots=torch.cat((decode.kept_slots_R, prefill.delta.live_slots_N)),
        sample_tokens=torch.cat((rows, prefill.sample_tokens_N + num_rows)),
        kept_slots=torch.cat((decode.kept_slots_R, prefill.kept_slots_N)),
        decode=decode,
        prefill=prefill,
    )


def begun_pages(plan: BatchPlan, page_tokens: int) -> list[int]:
    """Pages that a step begins without filling them."""
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


def moved_to_slots(plan: BatchPlan) -> list[int]:
    """Live slots in which rows go on after a step, other than the ones they had."""
    slots = [(row.state_slot, row.state_commit_slot) for row in plan.decode_rows]
    return [to for slot, to in slots if to is not None and to != slot]
