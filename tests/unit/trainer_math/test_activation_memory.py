"""How many layers keep their activations, from what a token was measured to cost."""

from __future__ import annotations

import torch

from kiln_nn.packed_model import PackedModel
from kiln_trainer.torch_backend.activation_memory import ActivationPlan, ActivationPlans
from tests.support.lora_builders import random_lora
from tests.support.tiny_models import random_tensors, tiny_config

MIB = 2**20


def _plan(budget_bytes: int) -> ActivationPlan:
    return ActivationPlan(num_layers=10, kept_bytes=1000.0, carried_bytes=120, budget_bytes=budget_bytes)


def test_short_batches_keep_everything_and_longer_ones_fewer_layers():
    plan = _plan(11 * MIB)
    kept = [plan.num_kept_layers(num_tokens) for num_tokens in (10, 1000, 1500, 2000, 100_000)]
    assert kept[:2] == [10, 10]
    assert kept == sorted(kept, reverse=True)
    assert 0 < kept[3] < 10
    assert kept[4] == 0


def test_what_is_kept_fits_the_budget():
    for budget_bytes in (MIB, 5 * MIB, 20 * MIB):
        plan = _plan(budget_bytes)
        for num_tokens in range(50, 3000, 50):
            num_kept = plan.num_kept_layers(num_tokens)
            assert not num_kept or num_kept * 1000 * num_tokens + 120 * num_tokens <= budget_bytes


def test_the_measured_cost_grows_with_the_layers_and_leaves_the_weights_out():
    costs = []
    for num_groups in (1, 2):
        config = tiny_config(layer_types=("linear_attention", "full_attention") * num_groups)
        weights = random_tensors(config)
        model, lora = PackedModel(config, weights), random_lora(config)
        plan = ActivationPlan.measure(model, lora.linear_fn(weights), torch.device("cpu"))
        assert model.num_kept_layers is None
        costs.append(plan.kept_bytes * plan.num_layers)
        # At least the inputs of the linear layers and the MLP's three rows are kept, in float32.
        least = 4 * (2 * config.hidden_size + 3 * config.intermediate_size)
        assert least < plan.kept_bytes < 20 * least
    assert 1.7 < costs[1] / costs[0] < 2.1
    assert plan.num_kept_layers(100) == config.num_layers


def test_adapters_of_one_kind_are_measured_once():
    config = tiny_config()
    weights = random_tensors(config)
    model, lora = PackedModel(config, weights), random_lora(config)
    num_calls = 0

    def counted(module_paths, x):
        nonlocal num_calls
        num_calls += 1
        return lora.linear_fn(weights)(module_paths, x)

    plans = ActivationPlans()
    first = plans.of(lora.spec, model, counted, torch.device("cpu"))
    num_first = num_calls
    assert num_first
    assert plans.of(lora.spec, model, counted, torch.device("cpu")) == first
    assert num_calls == num_first
    plans.of("another kind", model, counted, torch.device("cpu"))
    assert num_calls == 2 * num_first
