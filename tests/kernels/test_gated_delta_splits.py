"""However a sequence is cut into prefill chunks and decode steps, it computes the same.

This follows what a server does with one sequence: a state at the last page boundary, a ring
with the tokens since, chunks that may begin and end in the middle of a page.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kiln_nn.kernels.gated_delta import (
    DeltaRing,
    gated_delta_chunked,
    gated_delta_recurrent,
    gated_delta_ring_commit,
    gated_delta_ring_step,
    ring_mask,
)
from tests.support.delta_inputs import random_delta_inputs, relative_error

PAGE_TOKENS = 16
TOLERANCE = 1e-12  # float64 throughout: only the order of the sums differs
INPUTS = random_delta_inputs(150, num_value_heads=2, key_dim=8, value_dim=8)


class _Served:
    """One sequence's committed state and ring, advanced by chunks or by single tokens."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.state = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        nonsense = torch.full((1, 2, PAGE_TOKENS, 8), 9.0, dtype=torch.float64)
        self.ring = DeltaRing(nonsense, nonsense.clone(), nonsense[..., 0].clone())

    @property
    def ring_length(self) -> torch.Tensor:
        return torch.tensor([self.num_tokens % PAGE_TOKENS])

    def decode(self) -> torch.Tensor:
        token = INPUTS.part(self.num_tokens, self.num_tokens + 1).tensors()
        step = gated_delta_ring_step(self.state, self.ring, ring_mask(self.ring_length, PAGE_TOKENS), *token)
        self.ring.append_(self.ring_length, token[1], step)
        self.num_tokens += 1
        if self.num_tokens % PAGE_TOKENS == 0:
            self.state = gated_delta_ring_commit(self.state, self.ring, torch.tensor([PAGE_TOKENS]))
        return step.out_RHV

    def prefill(self, num_new: int) -> torch.Tensor:
        start, end = self.num_tokens, self.num_tokens + num_new
        part, in_ring = INPUTS.part(start, end), start % PAGE_TOKENS
        boundary = end - end % PAGE_TOKENS
        here = gated_delta_ring_commit(self.state, self.ring, self.ring_length)
        wanted = [(boundary - start,)] if boundary > start else [()]
        run = gated_delta_chunked(*part.tensors(), (0, num_new), here, boundaries=wanted)
        if boundary > start:  # the ring begins anew with the tokens behind the boundary
            self.state, in_ring = run.boundary_states_BHKV, 0
        first = max(boundary, start) - start
        places = slice(in_ring, in_ring + num_new - first)
        before = self.ring.log_decay_RHP[0, :, in_ring - 1] if in_ring else torch.zeros(2).double()
        self.ring.k_RhPK[0, :, places] = part.k[first:].transpose(0, 1)
        self.ring.u_RHPV[0, :, places] = run.corrected_THV[first:].transpose(0, 1)
        self.ring.log_decay_RHP[0, :, places] = before[:, None] + part.g[first:].cumsum(0).t()
        self.num_tokens = end
        return run.out_THV


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(st.just(1), st.integers(2, 60)), min_size=1, max_size=12))
def test_any_mixture_of_chunks_and_steps_equals_the_recurrence(advances):
    served, outputs = _Served(), []
    for num_new in advances:
        if served.num_tokens + num_new > 150:
            break
        outputs.append(served.decode() if num_new == 1 else served.prefill(num_new))
    count = served.num_tokens
    expected, final = gated_delta_recurrent(*INPUTS.part(0, count).tensors(), (0, count))
    state = gated_delta_ring_commit(served.state, served.ring, served.ring_length)
    assert relative_error(torch.cat(outputs), expected) < TOLERANCE
    assert relative_error(state, final) < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.sampled_from([7, 16, 64]))
def test_any_packing_equals_the_recurrence(lengths, chunk):
    inputs = random_delta_inputs(sum(lengths), num_value_heads=2, key_dim=8, value_dim=8)
    cu_seqlens = (0, *torch.tensor(lengths).cumsum(0).tolist())
    states = torch.randn(len(lengths), 2, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    expected, final = gated_delta_recurrent(*inputs.tensors(), cu_seqlens, states)
    run = gated_delta_chunked(*inputs.tensors(), cu_seqlens, states, chunk=chunk)
    assert relative_error(run.out_THV, expected) < TOLERANCE
    assert relative_error(run.final_states_NHKV, final) < TOLERANCE
