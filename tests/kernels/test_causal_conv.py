"""The depthwise convolution against a direct sum, document by document."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.causal_conv import causal_conv, causal_conv_step
from kiln_nn.kernels.checks import ShapeMismatch

WIDTH, TAIL, CHANNELS = 4, 3, 5


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _direct(x: torch.Tensor, tail: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = torch.cat((tail, x))
    out = [(rows[t : t + WIDTH] * weight.t()).sum(0) for t in range(x.shape[0])]
    mixed = torch.stack(out) if out else x
    return mixed * torch.sigmoid(mixed)


@pytest.mark.parametrize("cu_seqlens", [(0, 9), (0, 1, 3, 3, 20), (0, 2)])
def test_each_document_is_convolved_with_its_own_past(cu_seqlens):
    num_docs = len(cu_seqlens) - 1
    x, weight = _draw(cu_seqlens[-1], CHANNELS), _draw(CHANNELS, WIDTH, seed=1)
    tails = _draw(num_docs, TAIL, CHANNELS, seed=2)
    out, new_tails = causal_conv(x, weight, cu_seqlens, tails)
    for doc in range(num_docs):
        part = slice(cu_seqlens[doc], cu_seqlens[doc + 1])
        assert torch.allclose(out[part], _direct(x[part], tails[doc], weight), rtol=1e-12)
        assert torch.equal(new_tails[doc], torch.cat((tails[doc], x[part]))[-TAIL:])


def test_documents_start_from_zeros_by_default():
    x, weight = _draw(8, CHANNELS), _draw(CHANNELS, WIDTH, seed=1)
    out, _ = causal_conv(x, weight, (0, 5, 8))
    assert torch.allclose(out[5:], _direct(x[5:], torch.zeros(TAIL, CHANNELS), weight), rtol=1e-12)


def test_steps_equal_the_whole():
    x, weight, tail = _draw(7, CHANNELS), _draw(CHANNELS, WIDTH, seed=1), _draw(1, TAIL, CHANNELS, seed=2)
    whole, _ = causal_conv(x, weight, (0, 7), tail)
    rows = torch.cat((tail[0], x))
    steps = [causal_conv_step(x[t : t + 1], rows[None, t : t + TAIL], weight)[0] for t in range(7)]
    assert torch.allclose(torch.stack(steps), whole, rtol=1e-12)


def test_a_tail_of_the_wrong_length_is_named():
    with pytest.raises(ShapeMismatch, match="initial_tails"):
        causal_conv(_draw(4, CHANNELS), _draw(CHANNELS, WIDTH), (0, 4), _draw(1, WIDTH, CHANNELS))


def test_bf16_inputs_are_summed_in_float32_by_both_forms():
    x, weight = _draw(9, CHANNELS).bfloat16(), _draw(CHANNELS, WIDTH, seed=1).bfloat16()
    tail = _draw(1, TAIL, CHANNELS, seed=2).bfloat16()
    exact = _direct(x.double(), tail[0].double(), weight.double())
    whole, new_tails = causal_conv(x, weight, (0, 9), tail)
    step = causal_conv_step(x[:1], tail, weight)
    assert torch.allclose(whole.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.allclose(step[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    assert new_tails.dtype == torch.bfloat16
