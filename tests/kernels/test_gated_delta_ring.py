"""Page-committed decoding against the token-by-token recurrence in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.gated_delta import (
    DeltaRing,
    gated_delta_chunked,
    gated_delta_recurrent,
    gated_delta_ring_commit,
    gated_delta_ring_step,
    ring_mask,
)
from tests.support.delta_inputs import DeltaInputs, random_delta_inputs, relative_error

PAGE_TOKENS = 16
FP64_TOLERANCE = 1e-13


def _garbage_ring(num_rows: int, inputs: DeltaInputs, dtype: torch.dtype, capacity: int) -> DeltaRing:
    """A ring whose unused entries hold nonsense, as after a page was committed."""
    _, num_key_heads, key_dim = inputs.k.shape
    _, num_heads, value_dim = inputs.v.shape
    return DeltaRing(
        k_RhPK=torch.full((num_rows, num_key_heads, capacity, key_dim), 3.0, dtype=dtype),
        u_RHPV=torch.full((num_rows, num_heads, capacity, value_dim), -5.0, dtype=dtype),
        log_decay_RHP=torch.full((num_rows, num_heads, capacity), -2.0, dtype=dtype),
    )


def _decode(rows: list[DeltaInputs], states: torch.Tensor, dtype: torch.dtype, skip_commit: bool = False):
    """Decode rows of different ages side by side: row r joins 5 r tokens into its page."""
    num_rows, num_tokens = len(rows), rows[0].q.shape[0]
    ring = _garbage_ring(num_rows, rows[0], dtype, capacity=PAGE_TOKENS + 3)
    lengths = torch.zeros(num_rows, dtype=torch.long)
    states, outputs = states.to(dtype), []
    for t in range(num_tokens):
        q, k, v, g, beta = (torch.stack([row.tensors(dtype)[i][t] for row in rows]) for i in range(5))
        step = gated_delta_ring_step(states, ring, ring_mask(lengths, PAGE_TOKENS + 3), q, k, v, g, beta)
        ring.append_(lengths, k, step)
        lengths += 1
        full = lengths == PAGE_TOKENS
        if full.any():
            committed = gated_delta_ring_commit(states, ring, lengths)
            states = states if skip_commit else torch.where(full[:, None, None, None], committed, states)
            lengths = lengths.masked_fill(full, 0)
        outputs.append(step.out_RHV)
    return torch.stack(outputs, dim=1), gated_delta_ring_commit(states, ring, lengths)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64_TOLERANCE), (torch.float32, 2e-6)])
@pytest.mark.parametrize("num_value_heads", [2, 4])
def test_decoding_equals_the_recurrence_across_pages(dtype, tolerance, num_value_heads):
    rows = [random_delta_inputs(50, num_value_heads=num_value_heads, seed=seed) for seed in range(3)]
    states = torch.randn(3, num_value_heads, 16, 12, dtype=torch.float64)
    out, final = _decode(rows, states, dtype)
    for r, row in enumerate(rows):
        expected, expected_final = gated_delta_recurrent(*row.tensors(), (0, 50), states[r : r + 1])
        assert relative_error(out[r], expected) < tolerance
        assert relative_error(final[r], expected_final[0]) < tolerance


def test_the_comparison_sees_a_forgotten_commit():
    rows = [random_delta_inputs(40, seed=1)]
    states = torch.randn(1, 4, 16, 12, dtype=torch.float64)
    expected, _ = gated_delta_recurrent(*rows[0].tensors(), (0, 40), states)
    out, _ = _decode(rows, states, torch.float64, skip_commit=True)
    assert relative_error(out[0, :16], expected[:16]) < FP64_TOLERANCE
    assert relative_error(out[0, 16:], expected[16:]) > 0.05


def test_rows_of_different_ring_lengths_do_not_disturb_each_other():
    inputs = random_delta_inputs(12)
    lengths = torch.tensor([0, 3, 11])
    ring = _garbage_ring(3, inputs, torch.float64, PAGE_TOKENS)
    states = torch.randn(3, 4, 16, 12, dtype=torch.float64)
    for r, length in enumerate(lengths.tolist()):
        run = gated_delta_chunked(*inputs.tensors(), (0, 12), states[r : r + 1])
        ring.k_RhPK[r, :, :length] = inputs.k[:length].transpose(0, 1)
        ring.u_RHPV[r, :, :length] = run.corrected_THV[:length].transpose(0, 1)
        ring.log_decay_RHP[r, :, :length] = inputs.g[:length].cumsum(0).t()
    token = [x[lengths] for x in inputs.tensors()]
    step = gated_delta_ring_step(states, ring, ring_mask(lengths, PAGE_TOKENS), *token)
    for r, length in enumerate(lengths.tolist()):
        part = inputs.part(0, length + 1)
        expected, _ = gated_delta_recurrent(*part.tensors(), (0, length + 1), states[r : r + 1])
        assert relative_error(step.out_RHV[r], expected[length]) < FP64_TOLERANCE


def test_a_prefill_can_leave_its_last_tokens_in_the_ring():
    inputs = random_delta_inputs(60)
    run = gated_delta_chunked(*inputs.tensors(), (0, 60), boundaries=[(48,)])
    ring = _garbage_ring(1, inputs, torch.float64, PAGE_TOKENS)
    ring.k_RhPK[0, :, :12] = inputs.k[48:].transpose(0, 1)
    ring.u_RHPV[0, :, :12] = run.corrected_THV[48:].transpose(0, 1)
    ring.log_decay_RHP[0, :, :12] = inputs.g[48:].cumsum(0).t()
    state = gated_delta_ring_commit(run.boundary_states_BHKV, ring, torch.tensor([12]))
    assert relative_error(state, run.final_states_NHKV) < FP64_TOLERANCE


def test_a_rejected_token_is_a_shorter_ring():
    inputs = random_delta_inputs(6)
    states = torch.randn(1, 4, 16, 12, dtype=torch.float64)
    ring = _garbage_ring(1, inputs, torch.float64, PAGE_TOKENS)
    outputs = []
    for t, length in [(0, 0), (1, 1), (4, 2), (5, 3), (2, 2), (3, 3)]:  # 4 and 5 are rejected
        lengths = torch.tensor([length])
        token = [x[t : t + 1] for x in inputs.tensors()]
        step = gated_delta_ring_step(states, ring, ring_mask(lengths, PAGE_TOKENS), *token)
        ring.append_(lengths, token[1], step)
        outputs.append(step.out_RHV[0])
    expected, _ = gated_delta_recurrent(*inputs.part(0, 4).tensors(), (0, 4), states)
    assert relative_error(torch.stack([outputs[i] for i in (0, 1, 4, 5)]), expected) < FP64_TOLERANCE
