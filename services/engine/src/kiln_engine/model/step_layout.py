"""Where everything of one step lies: a BatchPlan turned into index tensors.

The step's tokens are flat: first one per decode row, then the prefill chunks, end to end. Verify rows
are a pass of their own, in which each has as many lines as the longest.

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
from kiln_engine.model.verify_layout import VerifyLayout, verify_layout, verify_numbers


@dataclass(frozen=True)
class StepLayout:
    """One step's index tensors."""

    num_tokens: int
    # Tokens before those of chunks.
    num_decode_rows: int
    # -1 where the token is the one drawn last for the row's live slot: `SampledIds.feed_` puts it in.
    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    token_slots_T: torch.Tensor
    # The tokens whose next one is sampled, in the order of StepResult.rows; None is every one.
    sample_tokens: torch.Tensor | None
    # The live slots their tokens stay with.
    kept_slots: torch.Tensor
    decode: DecodeLayout | None
    prefill: PrefillLayout | None
    verify: VerifyLayout | None = None

    @property
    def num_samples(self) -> int:
        return self.num_tokens if self.sample_tokens is None else self.sample_tokens.shape[0]

    @property
    def single_tokens(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Context lengths, and lines of the page table, of the tokens that attend one by one: all but chunks'."""
        if self.decode is not None:
            return self.decode.context_lengths_R, self.decode.table_rows_R
        if self.verify is not None:
            return self.verify.context_lengths_T, self.verify.table_rows_T
        return None

    # What the multi-token-prediction layer wants to know, and nobody else: joined when it asks.

    @property
    def carried_slots_T(self) -> torch.Tensor:
        """Where the hidden state of the token before each is found, as CarriedHidden says it."""
        if self.verify is not None:
            return self.verify.carried_slots_T
        rows = None if self.decode is None else self.decode.delta.ring_slots_R
        return _joined(rows, None if self.prefill is None else self.prefill.carried_slots_T)

    @property
    def last_tokens(self) -> torch.Tensor | None:
        """The last tokens of rows and chunks; None is every token."""
        if self.prefill is None:
            return None
        num_rows, of_chunks = self.num_decode_rows, self.prefill.last_tokens_N
        if not num_rows:
            return of_chunks
        return torch.cat((torch.arange(num_rows, device=of_chunks.device), of_chunks + num_rows))

    @property
    def last_slots(self) -> torch.Tensor:
        """The live slots with which the hidden states of those tokens stay (-1: none).

        Those of verify rows stay with all of their lines.
        """
        if self.verify is not None:
            return self.verify.live_slots_R
        rows = None if self.decode is None else self.decode.kept_slots_R
        return _joined(rows, None if self.prefill is None else self.prefill.delta.live_slots_N)


def _joined(rows: torch.Tensor | None, chunks: torch.Tensor | None) -> torch.Tensor:
    """What is known of rows and of chunks, end to end."""
    parts = [part for part in (rows, chunks) if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def build_layout(plan: BatchPlan, shape: StoreShape, device: torch.device) -> StepLayout:
    """Work out one step's indices on the host and send them to the device."""
    if plan.verify_rows:
        assert not plan.decode_rows
        assert not plan.prefill_chunks
        lines = verify_numbers(plan.verify_rows, shape, plan.num_verify_lines)
        on_device = to_device(torch.from_numpy(lines), device)
        return lines_layout(verify_layout(on_device, plan.num_verify_lines))
    decode = prefill = None
    if plan.decode_rows:
        fields = decode_fields(plan.decode_rows, shape)
        decode = decode_layout(to_device(torch.from_numpy(fields), device))
    if plan.prefill_chunks:
        numbers = prefill_numbers(plan.prefill_chunks, shape)
        prefill = numbers.layout(to_device(torch.from_numpy(numbers.flat), device))
    return join_layouts(decode, prefill)


def lines_layout(verify: VerifyLayout) -> StepLayout:
    """The layout of a pass of verify rows: every line is sampled."""
    num_tokens = verify.token_ids_T.shape[0]
    return StepLayout(
        num_tokens=num_tokens,
        num_decode_rows=num_tokens,
        token_ids_T=verify.token_ids_T,
        positions_T=verify.positions_T,
        token_slots_T=verify.token_slots_T,
        sample_tokens=None,
        kept_slots=verify.live_slots_R,
        decode=None,
        prefill=None,
        verify=verify,
    )


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
    for verify in plan.verify_rows:
        # Only the first line can be of a page that holds something: then it was begun before.
        first = -(-verify.position // page_tokens)
        last = (verify.position + verify.num_drafts) // page_tokens
        pages.extend(verify.page_ids[first : last + 1])
    for chunk in plan.prefill_chunks:
        end = chunk.start + len(chunk.token_ids)
        if end % page_tokens:
            pages.append(chunk.page_ids[end // page_tokens])
    return pages


def moved_to_slots(plan: BatchPlan) -> list[int]:
    """Live slots in which rows go on after a step, other than the ones they had."""
    slots = [(row.state_slot, row.state_commit_slot) for row in plan.decode_rows]
    slots += [(verify.state_slot, verify.state_fold_slot) for verify in plan.verify_rows]
    return [to for slot, to in slots if to is not None and to != slot]
