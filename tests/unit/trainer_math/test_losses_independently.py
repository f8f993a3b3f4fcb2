"""Each loss against its formula written out token by token in float64, gradients included.

The whole recipe is under test: rewards to advantages, which completions count, weights, ratios,
bounds, corrections and penalties. Streams are float32, hence the tolerance.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from kiln_nn.kernels.logprobs import TokenLogprobs
from kiln_trainer.data.packing import pack
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.options import GrpoOptions
from kiln_trainer.torch_backend.step import StepSums, forward_backward
from tests.support.policy_loss_formulas import Completion, expected_loss
from tests.support.training import grpo_spec, rollout

TOLERANCE = {"rtol": 2e-5, "atol": 1e-6}
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


def make_groups(loss_type: str) -> list[list[Completion]]:
    """Three groups, the second without a signal; ratios on both sides of every bound."""
    rng = random.Random(11)
    spread = 6e-4 if loss_type == "gspo" else 0.4
    groups = []
    for rewards in ([0.0, 1.0, 0.25, 1.0], [0.5, 0.5], [2.0, -1.0, 0.5]):
        group = []
        for place, reward in enumerate(rewards):
            old = [-rng.uniform(0.3, 2.5) for _ in range(rng.randint(1, 7))]
            shift = rng.choice([-1, 1]) * spread
            now = [logprob + shift * rng.uniform(0.2, 2.0) for logprob in old]
            group.append(
                Completion(
                    reward=reward,
                    # float32, as the wire carries them
                    sampler=[] if place == 2 else as_float32([x + rng.uniform(-1, 1) for x in old]),
                    old=as_float32(old),
                    reference=as_float32([x + rng.uniform(-1, 1) for x in old]),
                    now=[torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in now],
                    is_truncated=place == 1,
                )
            )
        groups.append(group)
    return groups


def as_float32(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


class GivenPolicy:
    """A policy whose log-probabilities are given: a leaf with gradients in place of a model."""

    def __init__(self, logprobs: list[torch.Tensor]) -> None:
        self.logprob_S = torch.tensor([x.item() for x in logprobs], dtype=torch.float64, requires_grad=True)

    def run(self, batch: Any) -> None:
        """There are no hidden states behind what is given."""

    def score(self, batch: Any, hidden: None) -> TokenLogprobs:
        return TokenLogprobs(self.logprob_S, torch.zeros_like(self.logprob_S))


def recipe_loss(
    groups: list[list[Completion]], wire: dict[str, Any]
) -> tuple[list[float], dict[str, float], list[Completion]]:
    """The gradient of each chosen token and the step's metrics, from the recipe itself."""
    drawn = [
        [
            rollout(
                [1, 2],
                range(3, 3 + c.num_tokens),
                c.reward,
                behaviour_logprobs=c.sampler,
                is_truncated=c.is_truncated,
            )
            for c in group
        ]
        for group in groups
    ]
    job = prepare_grpo(grpo_spec(drawn, **wire))
    masks = wire.get("mask_truncated_completions", False)
    chosen = [
        c
        for group in groups
        if len({c.reward for c in group}) > 1
        for c in group
        if not (masks and c.is_truncated)
    ]
    policy = GivenPolicy([now for c in chosen for now in c.now])
    batch = pack(
        job.documents,
        [torch.tensor(c.old) for c in chosen],
        [torch.tensor(c.reference) for c in chosen],
    )
    sums = StepSums()
    normaliser = math.fsum(document.normaliser for document in job.documents)
    forward_backward(policy, batch, job.objective, normaliser, sums, is_first_step=False)  # type: ignore[arg-type]
    assert policy.logprob_S.grad is not None
    return policy.logprob_S.grad.tolist(), sums.metrics() | dict(job.facts), chosen


@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("mode", ["none", "token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_is_its_formula(loss_type, mode, mask):
    wire = {"type": loss_type, "importance_mode": mode, "mask_truncated_completions": mask}
    assert_is_the_formula(loss_type, {**wire, "importance_cap": 1.3})


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_with_its_pull_towards_the_reference(loss_type, scale, estimator):
    wire = {"type": loss_type, "scale_rewards": scale, "kl_coef": 0.3, "kl_estimator": estimator}
    assert_is_the_formula(loss_type, wire)


def assert_is_the_formula(loss_type: str, wire: dict[str, Any]) -> None:
    groups = make_groups(loss_type)
    spelled_out = GrpoOptions.from_proto(grpo_spec([], **wire).loss).to_proto()
    loss = {field.name: getattr(spelled_out, field.name) for field in spelled_out.DESCRIPTOR.fields}
    expected, expected_metrics = expected_loss(groups, loss)
    grads, metrics, chosen = recipe_loss(groups, wire)
    tokens = [now for completion in chosen for now in completion.now]
    expected_grads = [
        0.0 if grad is None else grad.item()
        for grad in torch.autograd.grad(expected, tokens, allow_unused=True)
    ]
    torch.testing.assert_close(torch.tensor(grads), torch.tensor(expected_grads), **TOLERANCE)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=2e-5, abs=1e-6)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value), name
    assert metrics["num_groups_skipped"] == 1


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_cases_lie_on_both_sides_of_the_bounds(loss_type):
    """Or the comparison above would show little."""
    # cispo's own bounds are wide, and it has no lower one.
    bounds = {"clip_low": 0.2, "clip_high": 0.2} if loss_type == "cispo" else {}
    wire = {"type": loss_type, **bounds}
    assert_is_the_formula(loss_type, wire)
    _, metrics, _ = recipe_loss(make_groups(loss_type), wire)
    assert 0 < metrics["clip_fraction_high"] < 1
    assert 0 < metrics["clip_fraction_low"] < 1
    assert metrics["ratio_min"] < metrics["ratio_mean"] < metrics["ratio_max"]
    assert metrics["ratio_min"] < 1 < metrics["ratio_max"]
    assert metrics["importance_max"] == 2.0
    assert 0 < metrics["importance_capped_fraction"] < 1
