"""The chunked gated delta rule against the token-by-token recurrence in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.gated_delta import gated_delta_chunked, gated_delta_recurrent
from tests.support.delta_inputs import random_delta_inputs, relative_error

FP32_TOLERANCE = 2e-6  # some tens of float32 roundings, sums of up to 64 terms
FP64_TOLERANCE = 1e-12


def _states(num_docs: int, inputs, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_docs, inputs.v.shape[1], inputs.k.shape[2], inputs.v.shape[2])
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_value_heads", [2, 4, 6])
@pytest.mark.parametrize("cu_seqlens", [(0, 1), (0, 64), (0, 65), (0, 200), (0, 17, 17, 20, 150, 214)])
def test_chunked_equals_the_recurrence(cu_seqlens, num_value_heads):
    inputs = random_delta_inputs(cu_seqlens[-1], num_value_heads=num_value_heads)
    states = _states(len(cu_seqlens) - 1, inputs)
    out, final = gated_delta_recurrent(*inputs.tensors(), cu_seqlens, states)
    run = gated_delta_chunked(*inputs.tensors(torch.float32), cu_seqlens, states.float())
    assert run.out_THV.dtype == torch.float32
    assert relative_error(run.out_THV, out) < FP32_TOLERANCE
    assert relative_error(run.final_states_NHKV, final) < FP32_TOLERANCE


@pytest.mark.parametrize("chunk", [1, 16, 32, 48, 64])
def test_chunk_length_does_not_change_the_result(chunk):
    inputs = random_delta_inputs(130)
    cu_seqlens = (0, 100, 130)
    out, final = gated_delta_recurrent(*inputs.tensors(), cu_seqlens)
    run = gated_delta_chunked(*inputs.tensors(), cu_seqlens, chunk=chunk)
    assert relative_error(run.out_THV, out) < FP64_TOLERANCE
    assert relative_error(run.final_states_NHKV, final) < FP64_TOLERANCE


def test_repeated_keys_keep_their_digits():
    inputs = random_delta_inputs(128, repeated_keys=True)
    out, final = gated_delta_recurrent(*inputs.tensors(), (0, 128))
    run = gated_delta_chunked(*inputs.tensors(torch.float32), (0, 128))
    assert relative_error(run.out_THV, out) < 10 * FP32_TOLERANCE
    assert relative_error(run.final_states_NHKV, final) < 10 * FP32_TOLERANCE


def test_heads_that_forget_at_once_stay_finite_in_both_directions():
    inputs = random_delta_inputs(80)
    q, k, v, g, beta = (x.float().requires_grad_() for x in inputs.tensors())
    run = gated_delta_chunked(q, k, v, g * 5000.0, beta, (0, 80))
    run.out_THV.sum().backward()
    assert run.out_THV.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v, g, beta))


def test_states_at_boundaries_are_those_of_a_run_that_ends_there():
    cu_seqlens, boundaries = (0, 150, 160, 176), [(16, 64, 96, 144), (), (16,)]
    inputs = random_delta_inputs(176)
    states = _states(3, inputs)
    run = gated_delta_chunked(*inputs.tensors(), cu_seqlens, states, boundaries=boundaries)
    expected = []
    for doc, offsets in enumerate(boundaries):
        for offset in offsets:
            part = inputs.part(cu_seqlens[doc], cu_seqlens[doc] + offset)
            expected.append(gated_delta_recurrent(*part.tensors(), (0, offset), states[doc : doc + 1])[1][0])
    assert run.boundary_states_BHKV.shape[0] == 5
    assert relative_error(run.boundary_states_BHKV, torch.stack(expected)) < FP64_TOLERANCE


@pytest.mark.parametrize("cut", [1, 16, 63, 64, 100])
def test_a_run_can_be_split_anywhere(cut):
    inputs = random_delta_inputs(129)
    whole = gated_delta_chunked(*inputs.tensors(), (0, 129))
    first = gated_delta_chunked(*inputs.part(0, cut).tensors(), (0, cut))
    second = gated_delta_chunked(*inputs.part(cut, 129).tensors(), (0, 129 - cut), first.final_states_NHKV)
    joined = torch.cat((first.out_THV, second.out_THV))
    assert relative_error(joined, whole.out_THV) < FP64_TOLERANCE
    assert relative_error(second.final_states_NHKV, whole.final_states_NHKV) < FP64_TOLERANCE


def test_the_comparison_sees_a_wiped_and_a_swapped_state():
    inputs = random_delta_inputs(40)
    cu_seqlens = (0, 20, 40)
    states = _states(2, inputs)
    expected, _ = gated_delta_recurrent(*inputs.tensors(), cu_seqlens, states)
    for wrong in (torch.zeros_like(states), states.flip(0)):
        run = gated_delta_chunked(*inputs.tensors(), cu_seqlens, wrong)
        assert relative_error(run.out_THV, expected) > 0.1


def test_gradients_equal_those_of_the_recurrence():
    cu_seqlens = (0, 70, 83)
    inputs = random_delta_inputs(83, key_dim=8, value_dim=8)
    states = _states(2, inputs)
    weight_generator = torch.Generator().manual_seed(3)
    leaves, grads = [], []
    for form in (gated_delta_recurrent, gated_delta_chunked):
        arguments = [x.clone().requires_grad_() for x in inputs.tensors()]
        initial = states.clone().requires_grad_()
        result = form(*arguments, cu_seqlens, initial)
        out, final = result if isinstance(result, tuple) else (result.out_THV, result.final_states_NHKV)
        weight_generator.manual_seed(3)
        loss = (out * torch.randn(out.shape, generator=weight_generator, dtype=out.dtype)).sum()
        loss = loss + (final * torch.randn(final.shape, generator=weight_generator, dtype=out.dtype)).sum()
        leaves.append(loss.item())
        grads.append(torch.autograd.grad(loss, [*arguments, initial]))
    for actual, expected in zip(grads[1], grads[0], strict=True):
        assert relative_error(actual, expected) < 1e-10


def test_misfits_are_named():
    inputs = random_delta_inputs(20)
    with pytest.raises(ShapeMismatch, match="cu_seqlens"):
        gated_delta_chunked(*inputs.tensors(), (0, 19))
    with pytest.raises(ShapeMismatch, match="boundary"):
        gated_delta_chunked(*inputs.tensors(), (0, 20), boundaries=[(21,)])
    with pytest.raises(ShapeMismatch, match="initial_states"):
        gated_delta_chunked(*inputs.tensors(), (0, 20), _states(2, inputs))
