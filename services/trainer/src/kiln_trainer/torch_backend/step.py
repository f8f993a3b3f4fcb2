"""The one step function: every recipe's documents become gradients here.

Legend: `S` scored tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kiln_nn.packed_model import PackedHidden
from kiln_trainer.data.packing import PackedBatch
from kiln_trainer.recipes.losses import PolicyLosses, cross_entropy, k3_estimate, policy_losses
from kiln_trainer.recipes.opd_options import DistillationObjective, Objective
from kiln_trainer.recipes.options import PolicyObjective
from kiln_trainer.torch_backend.policy import Policy

_OF_DRAFTS = ("num_drafted", "mtp_kl", "mtp_acceptance")


@dataclass
class StepSums:
    """Running sums over an optimiser step's micro-batches, kept on the device until it ends."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    extremes: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a scalar to the sum `name`."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def add_range(self, name: str, values_S: torch.Tensor) -> None:
        """Add to the sum `name`, and keep the smallest and largest value seen."""
        self.add(f"{name}_mean", values_S.sum())
        for suffix, reduce in (("min", torch.minimum), ("max", torch.maximum)):
            found = values_S.min() if suffix == "min" else values_S.max()
            key = f"{name}_{suffix}"
            self.extremes[key] = reduce(self.extremes[key], found) if key in self.extremes else found

    def metrics(self) -> dict[str, float]:
        """Means over the step's scored tokens, extremes, and its loss. One transfer from the device."""
        names = [*self.sums, *self.extremes]
        if not names:
            return {}
        tensors = [*self.sums.values(), *self.extremes.values()]
        values = torch.stack([tensor.double() for tensor in tensors]).tolist()
        found = dict(zip(names, values, strict=True))
        drafts = {name: found.pop(name) for name in [*found] if name in _OF_DRAFTS}
        num_scored, num_compared = found.pop("num_scored"), found.pop("num_compared", 0.0)
        mismatch = found.pop("mismatch", 0.0)
        metrics = {"loss": found.pop("loss"), "num_scored_tokens": num_scored}
        metrics |= {
            name: value if name in self.extremes else value / num_scored for name, value in found.items()
        }
        if num_compared:
            metrics["sampler_trainer_kl"] = mismatch / num_compared
        if num_drafted := drafts.pop("num_drafted", 0.0):
            metrics |= {name: value / num_drafted for name, value in drafts.items()}
        return metrics


def forward_backward(
    policy: Policy,
    batch: PackedBatch,
    objective: Objective | None,
    normaliser: float,
    sums: StepSums,
    *,
    is_first_step: bool,
    num_drafted: int = 0,
) -> torch.Tensor | None:
    """Add one micro-batch's share of the step's gradient to the adapter's parameters.

    `normaliser` is the whole step's: shares add up to the step's loss however it was cut.
    `is_first_step`: no update was applied yet in this job. `num_drafted`: the whole step's tokens that a
    draft could have foreseen, if the multi-token-prediction layer learns as well.

    Returns: the old policy's log-probabilities [S] with what this pass revealed of them, or None
    without a policy objective.
    """
    if isinstance(objective, DistillationObjective):
        hidden = _distil(policy, batch, objective, normaliser, sums)
        old_S = None
    else:
        hidden, old_S = _learn(policy, batch, objective, normaliser, sums, is_first_step=is_first_step)
    if num_drafted:
        _follow(policy, batch, hidden, num_drafted, sums)
    return old_S


def _learn(
    policy: Policy,
    batch: PackedBatch,
    objective: PolicyObjective | None,
    normaliser: float,
    sums: StepSums,
    *,
    is_first_step: bool,
) -> tuple[PackedHidden, torch.Tensor | None]:
    hidden = policy.run(batch)
    scored = policy.score(batch, hidden)
    loss_S = batch.ce_weight_S * cross_entropy(scored.logprobs_T)
    losses = None
    if objective is not None:
        losses = policy_losses(scored.logprobs_T, batch, objective, is_first_step=is_first_step)
        loss_S = loss_S + batch.policy_weight_S * losses.loss_S
    _backward(loss_S, batch, normaliser, sums)
    sums.add("entropy", scored.entropies_T.sum())
    if losses is None or objective is None:
        return hidden, None
    _add_policy_metrics(sums, losses, objective)
    return hidden, losses.old_logprob_S


def _distil(
    policy: Policy, batch: PackedBatch, objective: DistillationObjective, normaliser: float, sums: StepSums
) -> PackedHidden:
    teacher_SD = policy.teach(batch)  # before there are activations to keep
    hidden = policy.run(batch)
    found = policy.compare(batch, hidden, teacher_SD, objective)
    _backward(batch.policy_weight_S * found.divergences_T, batch, normaliser, sums)
    sums.add("teacher_kl", found.reverse_kls_T.sum())
    sums.add("entropy", found.entropies_T.sum())
    _add_mismatch(sums, k3_estimate(found.logprobs_T - batch.sampler_logprob_S))
    return hidden


def _follow(
    policy: Policy, batch: PackedBatch, hidden: PackedHidden, num_drafted: int, sums: StepSums
) -> None:
    """Bring the drafts to where the model now is; nothing else moves."""
    if not batch.drafted_M.shape[0]:
        return
    found = policy.draft(batch, hidden)
    (found.divergences_T.sum() / num_drafted).backward()  # type: ignore[no-untyped-call]
    sums.add("mtp_kl", found.divergences_T.sum())
    sums.add("mtp_acceptance", found.overlaps_T.sum())
    sums.add("num_drafted", found.overlaps_T.new_tensor(float(found.overlaps_T.shape[0])))


def _backward(loss_S: torch.Tensor, batch: PackedBatch, normaliser: float, sums: StepSums) -> None:
    loss = loss_S.sum() / normaliser
    loss.backward()  # type: ignore[no-untyped-call]
    sums.add("loss", loss)
    sums.add("num_scored", loss.new_tensor(float(batch.rows_S.shape[0])))


def _add_policy_metrics(sums: StepSums, losses: PolicyLosses, objective: PolicyObjective) -> None:
    sums.add("clip_fraction_low", losses.is_clipped_low_S.float().sum())
    sums.add("clip_fraction_high", losses.is_clipped_high_S.float().sum())
    sums.add("clip_fraction", (losses.is_clipped_low_S | losses.is_clipped_high_S).float().sum())
    sums.add_range("ratio", losses.ratio_S)
    if objective.importance_mode != "none":
        is_capped_S = losses.importance_S >= objective.importance_cap
        sums.add_range("importance", losses.importance_S)
        sums.add("importance_capped_fraction", is_capped_S.float().sum())
    if objective.kl_coef:
        sums.add("kl", losses.kl_S.sum())
    _add_mismatch(sums, losses.mismatch_S)


def _add_mismatch(sums: StepSums, mismatch_S: torch.Tensor) -> None:
    """The k3 estimate of KL(sampler || trainer), over the tokens whose sampler is known."""
    sums.add("mismatch", mismatch_S.nan_to_num(nan=0.0).sum())
    sums.add("num_compared", (~mismatch_S.isnan()).sum())
