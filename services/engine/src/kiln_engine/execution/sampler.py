"""From logits to tokens and log-probabilities, every row by its own rules.

A row that asks for nothing special costs one pass over its logits; nothing is sorted for it.

Legend: `R` rows, `V` vocabulary, `B` blocks of the vocabulary, `E` entries of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kiln_engine.domain.plan import RowSampling
from kiln_engine.execution.draws import uniform_draw
from kiln_engine.execution.logit_edits import changes_logits, edit_logits_
from kiln_engine.execution.truncation import thresholds, truncates
from kiln_engine.model import to_device

_BLOCK = 256
# Below this the division by the temperature would leave float32; the best token has all the mass anyway.
_LOWEST_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class DrawnRow:
    """One row's token; log-probabilities as in RowResult. NaN logits give a NaN `logprob`."""

    token_id: int
    logprob: float
    sampled_logprob: float
    top_logprobs: tuple[tuple[int, float], ...]


class PendingDraws:
    """Drawn rows on their way to the host, in one copy; `token_ids_R` stay on the device."""

    def __init__(self, token_ids_R: torch.Tensor, packed: torch.Tensor, rows: Sequence[RowSampling]) -> None:
        self.token_ids_R = token_ids_R
        self._num_top = [row.params.num_top_logprobs for row in rows]
        self._arrived: torch.cuda.Event | None = None
        if packed.device.type == "cuda":
            pinned = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._packed = pinned.copy_(packed, non_blocking=True)
            # Sleeps in `wait` instead of spinning: the device has its next step already.
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()
        else:
            self._packed = packed

    def wait(self) -> list[DrawnRow]:
        """The rows, in order."""
        if self._arrived is not None:
            self._arrived.synchronize()
        drawn = []
        for num_top, (token, logprob, sampled, *top) in zip(
            self._num_top, self._packed.tolist(), strict=True
        ):
            ids, logprobs = top[: len(top) // 2], top[len(top) // 2 :]
            pairs = tuple((int(i), p) for i, p in zip(ids[:num_top], logprobs[:num_top], strict=True))
            drawn.append(DrawnRow(int(token), logprob, sampled, pairs))
        return drawn


def sample(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> PendingDraws:
    """Draw one token per row from float32 logits, which are not changed.

    Order: bias, penalties and bans (`edit_logits_`), temperature, top-k, top-p, min-p, then one
    uniform number of the row's own through the inverse distribution function.
    """
    log_total_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    edited = logits_RV
    if any(changes_logits(row) for row in rows):
        edited = logits_RV.clone()
        edit_logits_(edited, rows)
    is_greedy = [row.params.temperature <= 0.0 for row in rows]
    if all(is_greedy):
        token_R1 = edited.argmax(dim=-1, keepdim=True)
        sampled_R1 = torch.zeros_like(log_total_R1)
    else:
        token_R1, sampled_R1 = _draw(edited, rows)
        if any(is_greedy):
            greedy_R1 = to_device(is_greedy, logits_RV.device)[:, None]
            token_R1 = torch.where(greedy_R1, edited.argmax(dim=-1, keepdim=True), token_R1)
            sampled_R1 = sampled_R1.masked_fill(greedy_R1, 0.0)
    logprob_R1 = logits_RV.gather(1, token_R1) - log_total_R1
    columns = [token_R1.double(), logprob_R1.double(), sampled_R1.double()]
    if any(row.params.num_top_logprobs for row in rows):
        columns.extend(_top_logprobs(logits_RV, log_total_R1, rows))
    return PendingDraws(token_R1[:, 0], torch.cat(columns, dim=1), rows)


def _draw(edited_RV: torch.Tensor, rows: Sequence[RowSampling]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token per row and its log-probability under what it was drawn from, each `[R, 1]`."""
    device = edited_RV.device
    settings = [
        (
            1.0 / max(row.params.temperature, _LOWEST_TEMPERATURE) if row.params.temperature > 0 else 1.0,
            uniform_draw(row.params.seed, row.output_index),
        )
        for row in rows
    ]
    inverse_temperature_R1, u_R1 = to_device(settings, device, torch.float64).split(1, dim=1)
    best = edited_RV.amax(dim=-1, keepdim=True)
    scaled = (edited_RV - best).mul_(inverse_temperature_R1.to(edited_RV.dtype))
    cut = [i for i, row in enumerate(rows) if row.params.temperature > 0 and truncates(row.params)]
    if cut:
        _cut_(scaled, cut, rows)
    weights = scaled.exp_()
    token_R1, total_R1 = inverse_distribution(weights, u_R1)
    sampled = weights.gather(1, token_R1).double().log() - total_R1.log()
    return token_R1, sampled


def _cut_(scaled_RV: torch.Tensor, cut: list[int], rows: Sequence[RowSampling]) -> None:
    """Leave out, in place, what the given rows' top-k, top-p and min-p leave out."""
    params = [rows[i].params for i in cut]
    if len(cut) == len(rows):
        scaled_RV.masked_fill_(scaled_RV < thresholds(scaled_RV, params), -torch.inf)
        return
    index = to_device(cut, scaled_RV.device)
    part = scaled_RV.index_select(0, index)
    part.masked_fill_(part < thresholds(part, params), -torch.inf)
    scaled_RV.index_copy_(0, index, part)


def inverse_distribution(weights_RV: torch.Tensor, u_R1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token whose cumulative weight exceeds `u` times the total, and the total.

    Goes by blocks: sums of blocks first, then the entries of one block, so that only one pass
    reads the vocabulary. A token of weight 0 is never chosen.

    Returns: tokens int64 and totals float64, each `[R, 1]`.
    """
    num_rows, vocab_size = weights_RV.shape
    blocks_RBE = F.pad(weights_RV, (0, -vocab_size % _BLOCK)).view(num_rows, -1, _BLOCK)
    upto_RB = blocks_RBE.sum(dim=-1).double().cumsum(dim=-1)
    total_R1 = upto_RB[:, -1:]
    target_R1 = u_R1 * total_R1
    block_R1 = _first_above(upto_RB, target_R1)
    before_R1 = torch.where(block_R1 > 0, upto_RB.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    entries_RE = blocks_RBE.gather(1, block_R1[..., None].expand(-1, -1, _BLOCK)).squeeze(1)
    entry_R1 = _first_above(entries_RE.double().cumsum(dim=-1), target_R1 - before_R1)
    return block_R1 * _BLOCK + entry_R1, total_R1


def _first_above(cumulative_RN: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """Index of the first entry above the target, `[R, 1]`; where rounding left none, of the last rise."""
    first = (cumulative_RN <= target_R1).sum(dim=-1, keepdim=True)
    last_rise = (cumulative_RN < cumulative_RN[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(first, last_rise).clamp_(max=cumulative_RN.shape[1] - 1)


def _top_logprobs(
    logits_RV: torch.Tensor, log_total_R1: torch.Tensor, rows: Sequence[RowSampling]
) -> list[torch.Tensor]:
    """Ids and log-probabilities of the most likely tokens, each `[R, most wanted]`; unwanted rows are 0."""
    wanting = [i for i, row in enumerate(rows) if row.params.num_top_logprobs]
    most = min(max(row.params.num_top_logprobs for row in rows), logits_RV.shape[1])
    index = to_device(wanting, logits_RV.device)
    values, ids = logits_RV.index_select(0, index).topk(most, dim=-1)
    columns = torch.zeros(2, len(rows), most, dtype=torch.float64, device=logits_RV.device)
    columns[0, index] = ids.double()
    columns[1, index] = (values - log_total_R1.index_select(0, index)).double()
    return list(columns.unbind(0))
