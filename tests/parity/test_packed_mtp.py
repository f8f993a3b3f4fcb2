"""The multi-token-prediction layer against one put together from transformers' own modules."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import (
    Qwen3_5DecoderLayer,
    Qwen3_5RMSNorm,
    Qwen3_5TextRotaryEmbedding,
)

from kiln_nn.packed_model import MtpInput, PackedModel
from tests.support.delta_inputs import relative_error
from tests.support.tiny_models import random_tensors, tiny_config

TOLERANCE = 1e-4


def _norm(weights: dict, name: str, eps: float) -> Qwen3_5RMSNorm:
    norm = Qwen3_5RMSNorm(weights[name].shape[0], eps=eps)
    norm.load_state_dict({"weight": weights[name]})
    return norm


def _oracle(config, weights: dict, carried: torch.Tensor, ids: torch.Tensor, mtp_input: MtpInput):
    """States for one document's positions 0 to n - 2."""
    hf_config = Qwen3_5TextConfig(
        **{**config.to_hf_dict(), "layer_types": ["full_attention"] * config.num_layers}
    )
    hf_config._attn_implementation = "eager"
    prefix = "mtp.layers.0."
    layer = Qwen3_5DecoderLayer(hf_config, 0)
    layer.load_state_dict(
        {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    )
    embedding = weights["model.embed_tokens.weight"][ids[1:]]
    parts = [
        _norm(weights, "mtp.pre_fc_norm_embedding.weight", config.rms_norm_eps)(embedding),
        _norm(weights, "mtp.pre_fc_norm_hidden.weight", config.rms_norm_eps)(carried[:-1]),
    ]
    if not mtp_input.is_embedding_first:
        parts = parts[::-1]
    state = (torch.cat(parts, -1) @ weights["mtp.fc.weight"].t())[None]
    count = state.shape[1]
    mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
    positions = torch.arange(count)[None]
    rotary = Qwen3_5TextRotaryEmbedding(hf_config)(state, positions[None])
    state = layer(state, position_embeddings=rotary, attention_mask=mask)
    return _norm(weights, "mtp.norm.weight", config.rms_norm_eps)(state)[0]


@pytest.mark.parametrize("is_embedding_first", [True, False])
@pytest.mark.parametrize("is_after_final_norm", [True, False])
def test_mtp_states_equal_transformers_modules(is_embedding_first, is_after_final_norm):
    config = tiny_config()
    weights = random_tensors(config)
    mtp_input = MtpInput(is_embedding_first, is_after_final_norm)
    documents = [torch.arange(3, 3 + n) * 7 % config.vocab_size for n in (30, 5)]
    model = PackedModel(config, weights)
    ids, bounds = torch.cat(documents), (0, 30, 35)
    with torch.no_grad():
        hidden = model.forward(ids, bounds)
        states = model.mtp_hidden_states(hidden, ids, bounds, mtp_input)
        carried = hidden.after_norm_TD if is_after_final_norm else hidden.before_norm_TD
        for document, start, end in zip(documents, bounds, bounds[1:], strict=False):
            expected = _oracle(config, weights, carried[start:end], document, mtp_input)
            assert relative_error(states[start : end - 1], expected) < TOLERANCE


def test_training_from_scratch_reaches_every_tensor():
    config = tiny_config(tie_word_embeddings=False)
    weights = {name: t.requires_grad_() for name, t in random_tensors(config).items()}
    model = PackedModel(config, weights)
    ids = torch.arange(20) * 3 % config.vocab_size
    hidden = model.forward(ids, (0, 12, 20))
    mtp = model.mtp_hidden_states(hidden, ids, (0, 12, 20))
    (model.logits(hidden.after_norm_TD).square().mean() + model.logits(mtp[:-1]).square().mean()).backward()
    untouched = [name for name, t in weights.items() if t.grad is None or not t.grad.abs().max() > 0]
    assert untouched == []
