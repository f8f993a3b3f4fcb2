"""Norms and rotary embedding against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from kiln_nn.kernels.rms_norm import gated_rms_norm, l2_normalise, rms_norm
from kiln_nn.kernels.rotary import apply_rotary, rotary_tables
from tests.support.tiny_models import tiny_config


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_scales_by_offset_plus_weight(offset):
    x, weight = _draw(3, 2, 8), _draw(8, seed=1)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3) * (offset + weight)
    assert torch.allclose(rms_norm(x, weight, 1e-3, offset=offset), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_bf16_accumulates_in_float32():
    x, weight = _draw(4, 512).bfloat16(), _draw(512, seed=1).bfloat16()
    expected = rms_norm(x.float(), weight.float(), 1e-6, offset=1.0).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6, offset=1.0), expected)


def test_the_gated_norm_normalises_before_it_gates():
    x, z, weight = _draw(5, 8), _draw(5, 8, seed=1), _draw(8, seed=2)
    normalised = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)
    expected = normalised * weight * z * torch.sigmoid(z)
    assert torch.allclose(gated_rms_norm(x, z, weight, 1e-6), expected, rtol=1e-5, atol=1e-6)


def test_l2_normalise_keeps_zero_finite():
    x = torch.stack((_draw(6), torch.zeros(6)))
    unit = l2_normalise(x)
    assert unit[0].norm() == pytest.approx(1.0, rel=1e-5)
    assert torch.equal(unit[1], torch.zeros(6))


def test_rotary_turns_each_pair_by_its_own_angle():
    config = tiny_config(head_dim=16, rotary_fraction=0.25)
    positions = torch.tensor([0, 3, 1000])
    x = _draw(3, 2, 16)
    turned = apply_rotary(x, *rotary_tables(positions, config))
    assert torch.equal(turned[..., 4:], x[..., 4:])
    for t, position in enumerate(positions.tolist()):
        for pair in range(2):
            angle = position * config.rope_theta ** (-2 * pair / 4)
            before = torch.view_as_complex(torch.stack((x[t, :, pair], x[t, :, pair + 2]), -1))
            after = torch.view_as_complex(torch.stack((turned[t, :, pair], turned[t, :, pair + 2]), -1))
            assert torch.allclose(after, before * complex(math.cos(angle), math.sin(angle)), atol=1e-5)
