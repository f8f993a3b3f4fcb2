"""Dropout of the adapter's inputs: against the formula written out, and what it must not touch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kiln_nn.lora.dropout import LoraDropout
from kiln_nn.packed_model import PackedModel
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config

PATHS = tuple(f"model.layers.0.linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z"))
RATE = 0.25


def dropout(key: str = "7:1:0", rate: float = RATE) -> LoraDropout:
    made = LoraDropout(rate)
    made.begin(key)
    return made


def test_outputs_and_gradients_are_those_of_the_formula():
    config = tiny_config()
    weights = {name: tensor.double() for name, tensor in random_tensors(config).items()}
    lora = random_lora(config, dtype=torch.float64)
    x = torch.randn(9, config.hidden_size, dtype=torch.float64, requires_grad=True)
    plain_x = x.detach().clone().requires_grad_()
    outputs = lora.linear_fn(weights, dropout())(PATHS, x)
    factors = dropout().factors_of(PATHS, x)()
    pairs = [tuple(t.clone().requires_grad_() for t in lora.tensors()[path]) for path in PATHS]
    expected = [
        F.linear(plain_x, weights[path + ".weight"])
        + lora.spec.scaling * F.linear(F.linear(plain_x * factors, a), b)
        for path, (a, b) in zip(PATHS, pairs, strict=True)
    ]
    torch.testing.assert_close(outputs, tuple(expected))
    weighs = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, weighs)
    torch.autograd.backward(expected, weighs)
    torch.testing.assert_close(x.grad, plain_x.grad)
    parameters = dict(lora.named_parameters())
    for path, (a, b) in zip(PATHS, pairs, strict=True):
        torch.testing.assert_close(parameters[path + ".lora_A"].grad, a.grad)
        torch.testing.assert_close(parameters[path + ".lora_B"].grad, b.grad)


def test_factors_leave_out_the_rate_and_keep_the_mean_and_differ_by_key_and_layer():
    x = torch.empty(400, 100, requires_grad=True)
    factors = dropout().factors_of(PATHS, x)()
    assert factors.unique().tolist() == pytest.approx([0.0, 1 / (1 - RATE)])
    assert float((factors == 0).float().mean()) == pytest.approx(RATE, abs=0.01)
    assert float(factors.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(factors, dropout().factors_of(PATHS, x)())
    assert not torch.equal(factors, dropout("7:2:0").factors_of(PATHS, x)())
    assert not torch.equal(factors, dropout().factors_of(PATHS[1:], x)())


def gradients(config, weights, chosen: LoraDropout | None, num_kept_layers: int | None) -> list[torch.Tensor]:
    lora = random_lora(config)
    model = PackedModel(config, weights, num_kept_layers)
    ids = torch.arange(20)
    hidden = model.hidden_states(ids, (0, 12, 20), lora.linear_fn(weights, chosen))
    return list(torch.autograd.grad(hidden.cos().sum(), lora.parameters()))


def test_a_layer_that_is_computed_again_leaves_the_same_inputs_out():
    config = tiny_config()
    weights = random_tensors(config)
    kept = gradients(config, weights, dropout(), None)
    again = gradients(config, weights, dropout(), 0)
    assert all(torch.equal(left, right) for left, right in zip(kept, again, strict=True))
    without = gradients(config, weights, None, None)
    assert all(not torch.equal(left, right) for left, right in zip(kept, without, strict=True))


def test_without_gradients_nothing_is_left_out():
    config = tiny_config()
    weights, lora = random_tensors(config), random_lora(config)
    x = torch.randn(5, config.hidden_size)
    with torch.no_grad():
        with_it = lora.linear_fn(weights, dropout())(PATHS, x)
        without = lora.linear_fn(weights)(PATHS, x)
    assert all(torch.equal(left, right) for left, right in zip(with_it, without, strict=True))
