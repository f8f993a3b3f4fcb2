"""The one step function: every recipe's documents become gradients here.

Legend: `S` scored tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kiln_trainer.data.packing import PackedBatch
from kiln_trainer.recipes.losses import PolicyLosses, cross_entropy, policy_losses
from kiln_trainer.recipes.options import PolicyObjective
from kiln_trainer.torch_backend.policy import Policy


@dataclass
class StepSums:
    """Running sums over an optimiser step's micro-batches, kept on the device until it ends."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add a scalar to the sum `name`."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def metrics(self) -> dict[str, float]:
        """Means over the step's scored tokens, and its loss. One transfer from the device."""
        names = list(self.sums)
        if not names:
            return {}
        values = torch.stack([self.sums[name].double() for name in names]).tolist()
        sums = dict(zip(names, values, strict=True))
        num_scored, num_compared = sums.pop("num_scored"), sums.pop("num_compared", 0.0)
        mismatch = sums.pop("mismatch", 0.0)
        metrics = {"loss": sums.pop("loss"), "num_scored_tokens": num_scored}
        metrics |= {name: value / num_scored for name, value in sums.items()}
        if num_compared:
            metrics["sampler_trainer_kl"] = mismatch / num_compared
        return metrics


def forward_backward(
    policy: Policy,
    batch: PackedBatch,
    objective: PolicyObjective | None,
    normaliser: float,
    sums: StepSums,
    *,
    is_first_step: bool,
) -> torch.Tensor | None:
    """Add one micro-batch's share of the step's gradient to the adapter's parameters.

    `normaliser` is the whole step's: shares add up to the step's loss however it was cut.
    `is_first_step`: no update was applied yet in this job.

    Returns: the old policy's log-probabilities [S] with what this pass revealed of them, or None
    without a policy objective.
    """
    scored = policy.score(batch)
    loss_S = batch.ce_weight_S * cross_entropy(scored.logprobs_T)
    losses = None
    if objective is not None:
        losses = policy_losses(scored.logprobs_T, batch, objective, is_first_step=is_first_step)
        loss_S = loss_S + batch.policy_weight_S * losses.loss_S
    loss = loss_S.sum() / normaliser
    loss.backward()  # type: ignore[no-untyped-call]
    sums.add("loss", loss)
    sums.add("num_scored", loss.new_tensor(float(batch.rows_S.shape[0])))
    sums.add("entropy", scored.entropies_T.sum())
    if losses is None:
        return None
    _add_policy_metrics(sums, losses, objective)
    return losses.old_logprob_S


def _add_policy_metrics(sums: StepSums, losses: PolicyLosses, objective: PolicyObjective | None) -> None:
    sums.add("clip_fraction", losses.is_clipped_S.float().sum())
    if objective is not None and objective.kl_coef:
        sums.add("kl", losses.kl_S.sum())
    is_known_S = ~losses.mismatch_S.isnan()
    sums.add("mismatch", losses.mismatch_S.nan_to_num(nan=0.0).sum())
    sums.add("num_compared", is_known_S.sum())
