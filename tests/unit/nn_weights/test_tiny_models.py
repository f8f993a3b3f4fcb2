"""The random checkpoints that other tests stand on remember for as long as they promise."""

import math

import torch
import torch.nn.functional as F

from tests.support.tiny_models import MAX_HALF_LIFE_TOKENS, SHAPES, random_tensors, tiny_config


def test_half_lives_spread_over_the_whole_range():
    config = tiny_config(**SHAPES["deltanet_16_32"])
    tensors = random_tensors(config)
    for index, kind in enumerate(config.layer_types):
        if kind != "linear_attention":
            continue
        prefix = f"model.layers.{index}.linear_attn."
        rate = tensors[prefix + "A_log"].exp() * F.softplus(tensors[prefix + "dt_bias"])
        octaves = torch.sort(torch.log2(math.log(2) / rate)).values
        assert octaves[0] >= -1e-3
        assert octaves[-1] <= math.log2(MAX_HALF_LIFE_TOKENS) + 1e-3
        # One head in each equal slice of the octaves: log-uniform, not merely in range.
        slices = (
            (octaves / math.log2(MAX_HALF_LIFE_TOKENS) * len(octaves)).floor().clamp(max=len(octaves) - 1)
        )
        assert torch.equal(slices, torch.arange(len(octaves), dtype=slices.dtype))


def test_seed_decides_the_values():
    config = tiny_config()
    first, again, other = (random_tensors(config, seed)["model.embed_tokens.weight"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
