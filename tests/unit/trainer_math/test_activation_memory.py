"""When a micro-batch's activations are computed again instead of kept."""

from __future__ import annotations

from kiln_trainer.torch_backend.activation_memory import needs_recomputation
from tests.support.tiny_models import tiny_config


def test_a_small_model_keeps_and_a_large_one_recomputes():
    qwen_4b = tiny_config(hidden_size=2560, intermediate_size=9216, layer_types=("linear_attention",) * 32)
    assert not needs_recomputation(tiny_config(), batch_tokens=8192)
    assert needs_recomputation(qwen_4b, batch_tokens=8192)


def test_the_number_of_tokens_decides():
    config = tiny_config()
    per_token = config.num_layers * (12 * config.hidden_size + 6 * config.intermediate_size) * 4
    assert not needs_recomputation(config, batch_tokens=100, kept_bytes=100 * per_token)
    assert needs_recomputation(config, batch_tokens=101, kept_bytes=100 * per_token)
