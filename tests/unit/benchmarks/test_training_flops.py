"""What a training step is counted as having computed."""

from __future__ import annotations

import pytest

from benchmarks.training import WORKLOADS, Workload, model_flops
from kiln_nn.config import ModelConfig
from scripts.gpu.make_random_checkpoint import shape_config

CONFIG = ModelConfig.from_dict({**shape_config("4b"), "eos_token_id": 0})


def test_short_documents_cost_four_operations_per_parameter_and_token():
    # 4.2 billion parameters, of them 0.6 in the head.
    workload = Workload(num_documents=100, num_prompt=1, num_scored=9)
    expected = 4 * 1000 * (3.57e9 + 0.9 * 0.636e9)
    assert model_flops(CONFIG, workload) == pytest.approx(expected, rel=0.01)


def test_attention_counts_in_long_documents():
    workload = WORKLOADS["SFT 2 x 16384"]
    one = model_flops(CONFIG, Workload(1, 1, 16383))
    assert model_flops(CONFIG, workload) == pytest.approx(2 * one)
    shorter = model_flops(CONFIG, Workload(16, 1, 1023))
    # 8 layers of 16 heads of 256, six products over half of the pairs.
    assert one - shorter == pytest.approx(8 * 6 * 16 * 256 * (16384**2 - 16 * 1024**2), rel=0.02)
