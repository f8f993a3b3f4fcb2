"""The floor of a step against the figures of the design, worked out by hand there."""

import pytest

from benchmarks.engine.floor import ModelCosts, Yardsticks
from kiln_nn.config import ModelConfig
from scripts.gpu.make_random_checkpoint import shape_config

WEIGHT_BYTES = 8_411_512_832
H200 = Yardsticks(copy_bytes_per_s=4.29e12, matmul_flops_per_s=780e12)


def costs(**itemsizes):
    config = ModelConfig.from_dict(shape_config("4b"))
    return ModelCosts(config, WEIGHT_BYTES, **{"kv_itemsize": 2, "state_itemsize": 2, **itemsizes})


def test_sizes_of_what_a_sequence_remembers():
    assert costs().kv_bytes_per_token == 32 * 1024
    assert costs(kv_itemsize=1).kv_bytes_per_token == 16 * 1024
    assert costs(state_itemsize=4).state_bytes == 24 * 32 * 128 * 128 * 4


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 1.97), (16, 2.2), (64, 2.9), (256, 6.7)])
def test_decode_step(batch, floor_ms):
    assert 1e3 * costs().decode_step(batch, 1024).floor_s(H200) == pytest.approx(floor_ms, rel=0.03)


def test_smaller_weights_leave_the_arithmetic_as_it_is():
    assert costs().num_weights == pytest.approx(WEIGHT_BYTES / 2, rel=1e-3)
    config = ModelConfig.from_dict(shape_config("4b"))
    small = ModelCosts(config, WEIGHT_BYTES // 4, kv_itemsize=2, state_itemsize=2)
    few, many = (small.decode_step(batch, 1024) for batch in (1, 256))
    assert few.floor_s(H200) < costs().decode_step(1, 1024).floor_s(H200) / 3
    assert many.num_flops == costs().decode_step(256, 1024).num_flops


@pytest.mark.parametrize(("num_tokens", "floor_ms"), [(8192, 80), (32768, 386)])
def test_prefill(num_tokens, floor_ms):
    assert 1e3 * costs().prefill(num_tokens).floor_s(H200) == pytest.approx(floor_ms, rel=0.05)


def test_cached_tokens_leave_the_new_ones():
    assert costs().prefill(64, 4096).floor_s(H200) < 0.003


def test_yardsticks_are_measured():
    measured = Yardsticks.measure("cpu")
    assert measured.copy_bytes_per_s > 0
    assert measured.matmul_flops_per_s > 0
