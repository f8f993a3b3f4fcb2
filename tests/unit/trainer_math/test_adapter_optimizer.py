"""AdamW and Muon over an adapter: its arithmetic, clipping, and going on from saved moments."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kiln_nn.lora import LoraSpec
from kiln_nn.lora.parameters import LoraParameters
from kiln_trainer.recipes.options import OptimizerOptions
from kiln_trainer.torch_backend.optimizer import AdapterOptimizer
from tests.support.tiny_models import random_tensors, tiny_config

OPTIONS = OptimizerOptions(learning_rate=0.1, weight_decay=0.01, schedule="cosine", warmup_ratio=0.3)


def fresh_adapter() -> LoraParameters:
    return LoraParameters.create(tiny_config(), LoraSpec(2, 4.0, ("q_proj", "in_proj_b")), seed=3)


def give_gradients(lora: LoraParameters, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in lora.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_one_step_is_adamw_worked_out_by_hand():
    lora = fresh_adapter()
    optimizer = AdapterOptimizer(lora, OptimizerOptions(0.1, weight_decay=0.5), num_steps=10)
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    give_gradients(lora, 1)
    grads = {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}
    assert optimizer.step() == 0.1
    for name, tensor in lora.state_dict().items():
        # After bias correction the first moments are the gradient and its square.
        update = grads[name] / (grads[name].abs() + 1e-8)
        torch.testing.assert_close(tensor, before[name] * (1 - 0.1 * 0.5) - 0.1 * update)


def test_the_pass_after_a_step_computes_with_what_it_wrote():
    lora = LoraParameters.create(tiny_config(), LoraSpec(2, 4.0, ("gate_proj",)), seed=3)
    weights, paths = random_tensors(tiny_config()), ("model.layers.0.mlp.gate_proj",)
    optimizer = AdapterOptimizer(lora, OptimizerOptions(0.1), num_steps=2)
    kept, x = lora.linear_fn(weights), torch.ones(1, tiny_config().hidden_size)
    for step in (1, 2):
        kept(paths, x)
        give_gradients(lora, step)
        optimizer.step()
        assert torch.equal(kept(paths, x)[0], lora.linear_fn(weights)(paths, x)[0])


def test_one_step_of_muon_is_the_gradient_with_all_its_directions_made_equal():
    lora = fresh_adapter()
    optimizer = AdapterOptimizer(lora, OptimizerOptions(0.1, weight_decay=0.5, kind="muon"), num_steps=10)
    before = {name: tensor.clone() for name, tensor in lora.state_dict().items()}
    give_gradients(lora, 1)
    grads = {name: parameter.grad.clone() for name, parameter in lora.named_parameters()}
    assert optimizer.step() == 0.1
    for name, tensor in lora.state_dict().items():
        update = before[name] * (1 - 0.1 * 0.5) - tensor
        # 0.2 sqrt(longer side): the rms of an AdamW update. Newton and Schulz come near the polar factor.
        u, _, v = torch.linalg.svd(grads[name], full_matrices=False)
        expected = 0.1 * 0.2 * max(tensor.shape) ** 0.5 * (u @ v)
        assert torch.cosine_similarity(update.flatten(), expected.flatten(), dim=0) > 0.97
        assert 0.6 < float(update.norm() / expected.norm()) < 1.3


def test_clipping_scales_all_gradients_to_the_limit_and_reports_the_norm_before():
    lora = fresh_adapter()
    optimizer = AdapterOptimizer(lora, OptimizerOptions(0.1, max_grad_norm=1.0), num_steps=1)
    give_gradients(lora, 1)
    grads = [parameter.grad.clone() for parameter in lora.parameters()]
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    assert float(optimizer.clip()) == pytest.approx(norm, rel=1e-5)
    for parameter, grad in zip(lora.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad / norm)


def test_without_a_limit_gradients_stay_as_they_are():
    lora = fresh_adapter()
    optimizer = AdapterOptimizer(lora, OptimizerOptions(0.1), num_steps=1)
    give_gradients(lora, 1)
    grads = [parameter.grad.clone() for parameter in lora.parameters()]
    optimizer.clip()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(lora.parameters(), grads, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_going_on_from_saved_moments_gives_the_same_bits(kind):
    options = replace(OPTIONS, kind=kind)
    undisturbed = fresh_adapter()
    optimizer = AdapterOptimizer(undisturbed, options, num_steps=6)
    for step in range(6):
        give_gradients(undisturbed, step)
        optimizer.step()

    first = fresh_adapter()
    optimizer = AdapterOptimizer(first, options, num_steps=6)
    for step in range(3):
        give_gradients(first, step)
        optimizer.step()
    second = fresh_adapter()
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    moments = {name: tensor.clone() for name, tensor in optimizer.moments().items()}
    optimizer = AdapterOptimizer(second, options, num_steps=6)
    optimizer.restore(moments, num_steps_done=3)
    for step in range(3, 6):
        give_gradients(second, step)
        optimizer.step()

    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_moments_exist_for_every_parameter_before_the_first_step():
    lora = fresh_adapter()
    moments = AdapterOptimizer(lora, OPTIONS, num_steps=1).moments()
    assert len(moments) == 2 * len(lora.parameters())
    assert all(not tensor.any() for tensor in moments.values())
