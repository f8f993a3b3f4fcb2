"""What the packed model owes its callers besides the right numbers."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.packed_model import PackedModel
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config


def test_serving_first_does_not_spoil_training_in_one_process():
    # Index tensors are cached by packing; made under inference mode, autograd would refuse them.
    config = tiny_config()
    model, lora = PackedModel(config, random_tensors(config)), random_lora(config)
    ids, cu_seqlens = torch.arange(23), (0, 9, 23)
    with torch.inference_mode():
        served = model.hidden_states(ids, cu_seqlens, lora.linear_fn(model.weights))
    trained = model.hidden_states(ids, cu_seqlens, lora.linear_fn(model.weights))
    trained.sum().backward()
    assert torch.equal(served, trained)
    assert all(parameter.grad is not None for parameter in lora.parameters())


def test_the_weights_are_borrowed_and_left_as_they_are():
    config = tiny_config()
    weights = random_tensors(config)
    before = {name: t.clone() for name, t in weights.items()}
    model, lora = PackedModel(config, weights, num_kept_layers=0), random_lora(config)
    model.hidden_states(torch.arange(8), (0, 8), lora.linear_fn(weights)).sum().backward()
    assert all(model.weights[name] is t for name, t in weights.items())
    assert all(torch.equal(before[name], t) and t.grad is None for name, t in weights.items())


def test_a_tied_head_is_the_embedding_itself():
    tied, untied = tiny_config(), tiny_config(tie_word_embeddings=False)
    weights = random_tensors(untied)
    assert PackedModel(tied, weights).head_weight is weights["model.embed_tokens.weight"]
    assert PackedModel(untied, weights).head_weight is weights["lm_head.weight"]


@pytest.mark.parametrize("cu_seqlens", [(0, 7), (1, 8), (0, 5, 4, 8), (0,), (8,)])
def test_boundaries_that_do_not_cover_the_tokens_are_refused(cu_seqlens):
    config = tiny_config()
    model = PackedModel(config, random_tensors(config))
    with pytest.raises(ShapeMismatch, match="cu_seqlens"):
        model.hidden_states(torch.arange(8), cu_seqlens)
