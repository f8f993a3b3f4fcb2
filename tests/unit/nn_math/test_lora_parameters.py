"""The adapter that learns: how it starts, what it adds, and how it is saved and resumed."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.blocks import base_linear
from kiln_nn.errors import InvalidAdapter
from kiln_nn.lora.parameters import LoraParameters
from kiln_nn.lora.spec import LoraSpec, adapter_table
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config

SPEC = LoraSpec(rank=4, alpha=8.0)


def test_a_new_adapter_covers_every_linear_layer_and_changes_nothing_yet():
    config = tiny_config()
    weights = random_tensors(config)
    lora = LoraParameters.create(config, SPEC, seed=1)
    assert lora.tensors().keys() == adapter_table(config).keys()
    base, adapted = base_linear(weights), lora.linear_fn(weights)
    for path, (num_inputs, _) in adapter_table(config).items():
        x = torch.ones(2, num_inputs)
        assert torch.equal(adapted((path,), x)[0], base((path,), x)[0])


def test_one_seed_gives_one_adapter():
    config = tiny_config()
    first, same, other = (LoraParameters.create(config, SPEC, seed=seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.lora_A"
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].abs().max() <= config.hidden_size**-0.5


def test_linear_adds_the_scaled_update_only_where_targeted():
    config = tiny_config()
    weights = random_tensors(config)
    lora = random_lora(config, targets=("up_proj",))
    linear, x = lora.linear_fn(weights), torch.ones(2, config.hidden_size)
    path = "model.layers.1.mlp.up_proj"
    a, b = lora.tensors()[path]
    expected = x @ (weights[path + ".weight"] + lora.spec.scaling * b @ a).t()
    assert torch.allclose(linear((path,), x)[0], expected, rtol=1e-4, atol=1e-5)
    untouched = "model.layers.1.mlp.gate_proj"
    assert torch.equal(linear((untouched,), x)[0], base_linear(weights)((untouched,), x)[0])


def test_bf16_weights_keep_float32_parameters():
    config = tiny_config()
    weights = {name: t.bfloat16() for name, t in random_tensors(config).items()}
    lora = random_lora(config)
    path = "model.layers.0.mlp.up_proj"
    (y,) = lora.linear_fn(weights)((path,), torch.ones(2, config.hidden_size, dtype=torch.bfloat16))
    y.float().sum().backward()
    gradients = {name: parameter.grad for name, parameter in lora.named_parameters()}
    assert y.dtype == torch.bfloat16
    assert gradients[path + ".lora_A"].dtype == torch.float32


def test_a_checkpoint_restores_the_values_in_place():
    config = tiny_config()
    source, target = random_lora(config), LoraParameters.create(config, LoraSpec(3, 6.0), seed=9)
    leaves = [id(parameter) for parameter in target.parameters()]
    target.load_state_dict(source.state_dict())
    assert [id(parameter) for parameter in target.parameters()] == leaves
    assert all(torch.equal(source.state_dict()[name], value) for name, value in target.state_dict().items())


def test_a_checkpoint_of_another_adapter_is_refused_and_changes_nothing():
    config = tiny_config()
    lora = LoraParameters.create(config, SPEC, seed=1)
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    with pytest.raises(InvalidAdapter, match="does not fit"):
        lora.load_state_dict(random_lora(config).state_dict())  # rank 3
    with pytest.raises(InvalidAdapter, match=r"mlp\.up_proj\.lora_A"):
        lora.load_state_dict({k: v for k, v in before.items() if k != "model.layers.0.mlp.up_proj.lora_A"})
    assert all(torch.equal(before[name], value) for name, value in lora.state_dict().items())


def test_an_existing_adapter_is_copied_not_shared():
    config = tiny_config()
    source = random_lora(config)
    lora = LoraParameters.from_tensors(config, source.spec, source.tensors())
    with torch.no_grad():
        lora.parameters()[0].zero_()
    assert source.parameters()[0].abs().max() > 0
    mlp_only = LoraSpec(3, 6.0, targets="mlp")
    with pytest.raises(InvalidAdapter, match="outside its targets"):
        LoraParameters.from_tensors(config, mlp_only, source.tensors())
