"""config.json in its published forms, and what is refused by name."""

import json

import pytest

from kiln_nn.config import ModelConfig
from kiln_nn.errors import InvalidModelConfig, ModelNotFound, UnsupportedModel
from tests.support.tiny_models import make_checkpoint, tiny_config

# The published 4B checkpoint's numbers, in the multimodal form it is published in.
QWEN_4B = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "text_config": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "eos_token_id": 248044,
    },
    "tie_word_embeddings": True,
    "vision_config": {"depth": 24},
}


def with_text(**changes):
    return {**QWEN_4B, "text_config": {**QWEN_4B["text_config"], **changes}}


def test_published_multimodal_form_is_read():
    config = ModelConfig.from_dict(QWEN_4B)
    assert [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"] == list(
        range(3, 32, 4)
    )
    assert (config.num_full_layers, config.num_linear_layers) == (8, 24)
    assert (config.key_dim, config.value_dim, config.conv_dim) == (2048, 4096, 8192)
    assert (config.rotary_dim, config.rope_theta) == (64, 1e7)
    assert config.tie_word_embeddings
    assert config.num_mtp_layers == 1
    assert config.eos_token_ids == (248044,)


def test_text_form_round_trips():
    config = tiny_config(layer_types=("full_attention", "linear_attention"), eos_token_ids=(5, 9))
    assert ModelConfig.from_dict(config.to_hf_dict()) == config


def test_flat_rope_fields_are_read():
    flat = {**tiny_config().to_hf_dict(), "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    del flat["rope_parameters"]
    config = ModelConfig.from_dict(flat)
    assert (config.rope_theta, config.rotary_fraction) == (5e5, 0.5)


def test_generation_config_adds_stop_ids(tmp_path):
    make_checkpoint(tmp_path, eos_token_ids=(7,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 7]}))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (7, 9)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"hidden_size": None}, InvalidModelConfig, "hidden_size"),
        ({"num_hidden_layers": 0}, InvalidModelConfig, "num_hidden_layers"),
        ({"head_dim": True}, InvalidModelConfig, "head_dim"),
        ({"num_key_value_heads": 3}, InvalidModelConfig, "16 attention heads cannot share 3"),
        ({"linear_num_value_heads": 24}, InvalidModelConfig, "24 DeltaNet value heads"),
        ({"layer_types": ["full_attention"]}, InvalidModelConfig, "1 of 32"),
        ({"layer_types": ["sliding_attention"] * 32}, UnsupportedModel, "sliding_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, InvalidModelConfig, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e7, "rope_type": "yarn"}}, UnsupportedModel, "yarn"),
        ({"eos_token_id": "end"}, InvalidModelConfig, "eos_token_id"),
        ({"model_type": "qwen3_5_moe_text"}, UnsupportedModel, "qwen3_5_moe_text"),
        ({"hidden_act": "gelu"}, UnsupportedModel, "hidden_act"),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias"),
    ],
)
def test_impossible_and_uncomputed_fields_are_named(changes, error, named):
    with pytest.raises(error, match=named):
        ModelConfig.from_dict(with_text(**changes))


def test_missing_and_broken_files_are_told_apart(tmp_path):
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidModelConfig, match="not readable JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InvalidModelConfig, match="not a JSON object"):
        ModelConfig.from_folder(tmp_path)
