"""The loss of single tokens against values worked out by hand, and its gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kiln_trainer.data.packing import PackedBatch
from kiln_trainer.recipes.losses import PolicyLosses, kl_penalty, policy_losses
from kiln_trainer.recipes.options import PolicyObjective

NAN = math.nan


def batch_of(
    advantage: list[float],
    *,
    old: list[float] | None = None,
    sampler: list[float] | None = None,
    reference: list[float] | None = None,
    document: list[int] | None = None,
) -> PackedBatch:
    num_tokens = len(advantage)
    unknown = [NAN] * num_tokens
    document = document or [0] * num_tokens
    zeros = torch.zeros(num_tokens)
    return PackedBatch(
        cu_seqlens=tuple(range(max(document) + 2)),
        token_ids_T=zeros.long(),
        rows_S=zeros.long(),
        targets_S=zeros.long(),
        document_S=torch.tensor(document),
        temperature_S=zeros + 1,
        ce_weight_S=zeros,
        policy_weight_S=zeros + 1,
        advantage_S=torch.tensor(advantage),
        old_logprob_S=torch.tensor(old or unknown),
        sampler_logprob_S=torch.tensor(sampler or unknown),
        reference_logprob_S=torch.tensor(reference or unknown),
        drafted_M=zeros[:0].long(),
    )


def evaluate(
    logprobs: list[float], batch: PackedBatch, *, is_first_step: bool = False, **objective: Any
) -> tuple[PolicyLosses, list[float]]:
    """Losses, and the gradient of their sum with respect to each log-probability."""
    logprob_S = torch.tensor(logprobs, requires_grad=True)
    losses = policy_losses(logprob_S, batch, PolicyObjective(**objective), is_first_step=is_first_step)
    losses.loss_S.sum().backward()
    assert logprob_S.grad is not None
    return losses, logprob_S.grad.tolist()


def test_on_policy_the_gradient_is_minus_the_advantage():
    losses, grads = evaluate([-1.0, -2.0], batch_of([0.7, -0.3]), is_first_step=True)
    assert losses.loss_S.tolist() == pytest.approx([-0.7, 0.3])
    assert grads == pytest.approx([-0.7, 0.3])
    assert losses.old_logprob_S.tolist() == [-1.0, -2.0]
    assert not (losses.is_clipped_low_S | losses.is_clipped_high_S).any()


def test_ratios_outside_the_bounds_stop_learning_on_the_side_they_should():
    old = [math.log(0.5)] * 4
    now = [math.log(0.5 * ratio) for ratio in (1.5, 0.6, 1.5, 0.6)]
    batch = batch_of([1.0, 1.0, -1.0, -1.0], old=old)
    losses, grads = evaluate(now, batch, clip_low=0.2, clip_high=0.3)
    # Better tokens: 1.5 is cut to 1.3, 0.6 learns on. Worse ones: 1.5 learns on, 0.6 is cut to 0.8.
    assert losses.loss_S.tolist() == pytest.approx([-1.3, -0.6, 1.5, 0.8])
    assert grads == pytest.approx([0.0, -0.6, 1.5, 0.0])
    assert losses.is_clipped_high_S.tolist() == [True, False, False, False]
    assert losses.is_clipped_low_S.tolist() == [False, False, False, True]


def test_lower_and_upper_bound_are_separate():
    old = [0.0 - 1.0] * 2
    now = [math.log(1.25) - 1.0, math.log(0.75) - 1.0]
    batch = batch_of([1.0, -1.0], old=old)
    _, wide_above = evaluate(now, batch, clip_low=0.2, clip_high=0.28)
    _, wide_below = evaluate(now, batch, clip_low=0.28, clip_high=0.2)
    assert [grad != 0 for grad in wide_above] == [True, False]
    assert [grad != 0 for grad in wide_below] == [False, True]


def test_without_correction_the_samplers_logprob_is_the_denominator_where_known():
    batch = batch_of([1.0, 1.0], old=[-1.0, -1.0], sampler=[-1.1, NAN])
    losses, _ = evaluate([-1.0, -0.9], batch, importance_mode="none")
    assert losses.loss_S.tolist() == pytest.approx([-math.exp(0.1), -math.exp(0.1)])


def test_token_correction_weighs_by_old_over_sampler_up_to_the_cap():
    sampler = [-1.0, -1.0, -1.0, NAN]
    old = [-1.0 + math.log(0.5), -1.0 + math.log(1.5), -1.0 + math.log(9.0), -1.0]
    losses, grads = evaluate(old, batch_of([1.0] * 4, old=old, sampler=sampler), importance_cap=2.0)
    assert losses.loss_S.tolist() == pytest.approx([-0.5, -1.5, -2.0, -1.0])
    assert grads == pytest.approx([-0.5, -1.5, -2.0, -1.0])


def test_sequence_correction_weighs_a_whole_completion_by_the_product():
    old = [-1.0 + math.log(0.5), -1.0 + math.log(1.5), -1.0 + math.log(3.0)]
    batch = batch_of([1.0] * 3, old=old, sampler=[-1.0] * 3, document=[0, 0, 1])
    losses, _ = evaluate(old, batch, importance_mode="sequence", importance_cap=2.5)
    assert losses.loss_S.tolist() == pytest.approx([-0.75, -0.75, -2.5])


def test_mismatch_is_the_k3_estimate_between_sampler_and_trainer():
    batch = batch_of([1.0, 1.0], sampler=[-1.0, NAN])
    losses, _ = evaluate([-1.0 + math.log(2.0), -1.0], batch, is_first_step=True)
    assert losses.mismatch_S[0].item() == pytest.approx(2 - 1 - math.log(2.0))
    assert losses.mismatch_S[1].isnan()


@pytest.mark.parametrize(
    ("estimator", "value", "grad"),
    [
        # With log p - log ref = d = log 2: k1 is d (taken through the sampled token: gradient d),
        # k2 is d^2 / 2 (gradient d), k3 is e^-d - 1 + d (gradient 1 - e^-d).
        ("k1", math.log(2), math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 0.5),
    ],
)
def test_kl_estimators(estimator, value, grad):
    batch = batch_of([0.0], old=[-1.0], reference=[-1.0 - math.log(2)])
    losses, grads = evaluate([-1.0], batch, kl_coef=0.1, kl_estimator=estimator)
    assert losses.kl_S.tolist() == pytest.approx([value])
    assert losses.loss_S.tolist() == pytest.approx([0.1 * value], abs=1e-6)
    assert grads == pytest.approx([0.1 * grad], abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_expected_penalty_gradient_is_that_of_the_true_kl(estimator):
    """Over the policy's own distribution: d KL(p || ref) / d logits, worked out by autograd."""
    torch.manual_seed(0)
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    (true_grad,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits, retain_graph=True)
    penalty, _ = kl_penalty(log_p, reference, estimator)
    (grad,) = torch.autograd.grad((log_p.detach().exp() * penalty).sum(), logits)
    # The plain difference alone would give 0 here, whatever the two distributions are.
    torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-12)
    assert true_grad.abs().max() > 0.01


def test_a_ratio_beyond_floating_point_stays_finite():
    losses, grads = evaluate([-1e-3], batch_of([-1.0], old=[-200.0]))
    assert math.isfinite(losses.loss_S.item())
    assert math.isfinite(grads[0])
