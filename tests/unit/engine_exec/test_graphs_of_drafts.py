"""What graphs hold around the kernels of drafts asks nothing of the host, on a CPU already.

While a GPU captures, no number may come from the host or go there: that fails, and only there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kiln_engine.execution import drafting
from kiln_engine.execution.drafting import DraftPass
from kiln_engine.execution.sampled_ids import DraftIds, SampledIds
from kiln_engine.model.carried_hidden import IN_PASS, NOT_KEPT, CarriedHidden
from kiln_engine.model.store_shape import StoreShape
from kiln_engine.model.verify_layout import verify_layout, verify_numbers
from kiln_nn.kernels.draft_rows import accept_lines
from kiln_nn.kernels.joined_inputs import joined_inputs
from tests.unit.engine_exec.test_verifying import make_row

CPU, WIDTH, NUM_SLOTS, MAX_DRAFTS = torch.device("cpu"), 8, 4, 3
SHAPE = StoreShape.of(page_tokens=8, max_model_len=64, num_state_slots=NUM_SLOTS)
aten = torch.ops.aten
_ASKS_THE_HOST = {
    aten._local_scalar_dense.default,  # .item(), bool(), .tolist()
    aten.nonzero.default,
    aten.masked_select.default,
    aten.lift_fresh.default,  # torch.tensor
    aten.lift_fresh_copy.default,
}


class AsCaptured(TorchDispatchMode):
    """Fails at what a capturing GPU would fail at."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _ASKS_THE_HOST, func
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            assert all(index is None or index.dtype is torch.long for index in args[1]), "a mask is counted"
            assert len(args) < 3 or args[2].dim(), "a number comes from the host"
        return func(*args, **(kwargs or {}))


class OneLayer:
    """Stands for the layer, whose kernels have tests of their own."""

    def __init__(self) -> None:
        self.carried = CarriedHidden(NUM_SLOTS, MAX_DRAFTS + 1, WIDTH, torch.float32, CPU)

    def forward(self, token_ids_R, hidden_RD, positions_R, places, linears):
        return hidden_RD + 1

    def logits(self, hidden_RD, linears, num_tokens):
        return hidden_RD


@pytest.mark.parametrize(
    "breaks", [lambda x, i: x[i == 1], lambda x, i: x.__setitem__(i, 0), lambda x, i: x[i].sum().item()]
)
def test_what_a_capture_would_fail_at_is_noticed(breaks):
    with AsCaptured(), pytest.raises(AssertionError):
        breaks(torch.zeros(3), torch.arange(3))


def test_hidden_states_are_carried_without_the_host():
    carried, slots = CarriedHidden(NUM_SLOTS, 4, WIDTH, torch.float32, CPU), torch.tensor([1, -1])
    before = torch.tensor([2, IN_PASS, NOT_KEPT])
    lines, counts = torch.rand(2, 3, WIDTH), torch.tensor([2, 1])
    embedding, norm = torch.rand(5, WIDTH), torch.rand(WIDTH)
    with AsCaptured():
        carried.keep_lines(slots, lines)
        carried.accept(slots, counts)
        second = carried.last(slots)[0].clone()
        carried.keep(slots, lines[:, 2])
        joined_inputs(embedding, before.abs(), lines[0], norm, norm, 1e-6, carried=carried.before(before))
    assert second.equal(lines[0, 1])
    assert carried.last(slots)[0].equal(lines[0, 2])


def test_tokens_are_fed_accepted_and_drafted_without_the_host(monkeypatch):
    def draw(logits_RV, settings_RF, edits_EF, *, out):
        out[0].copy_(logits_RV.argmax(1))

    monkeypatch.setattr(drafting, "draw_tokens", draw)
    layer: Any = OneLayer()
    draft_ids, sampled_ids = DraftIds(NUM_SLOTS, MAX_DRAFTS, CPU), SampledIds(NUM_SLOTS, CPU)
    draft_ids.ids_SK[0] = torch.tensor([5, 9, 9])
    row = replace(make_row(5, 6, on_device=True), page_ids=(0, 1), num_next_drafts=2)
    drafts = DraftPass(layer, layer, draft_ids, capacity=3, num_tokens=None)
    drafts.send([row])
    verify = verify_layout(torch.from_numpy(verify_numbers([row], SHAPE, 3, capacity=2)), 3)
    drawn = torch.tensor([[5, 6, 7], [0, 0, 0]])
    layer.carried.keep_lines(verify.live_slots_R, torch.eye(3, WIDTH).expand(2, 3, WIDTH))
    with AsCaptured():
        draft_ids.feed_lines_(verify.token_ids_RN, verify.delta.ring_slots_R)
        sampled_ids.keep_rows(verify.live_slots_R, drawn[:, 0])
        accepted = accept_lines(verify.token_ids_RN, drawn, verify.num_new_R)
        drafts.begin(verify, drawn, accepted)
        drafts.run([row])
    # The 5 was drawn and the 9 was not; the state of the second line goes on.
    assert accepted.tolist() == [2, 1]
    assert draft_ids.ids_SK[0].tolist() == [1, 1, 9]
