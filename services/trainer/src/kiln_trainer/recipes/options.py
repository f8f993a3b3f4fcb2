"""A job's settings as the recipes and the optimiser read them: protobuf zeros become the defaults.

A field that a gRPC client leaves out arrives as zero or the empty string; this is the one place
that says what it then means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from kiln_common.errors import InvalidValue
from kiln_common.pb import trainer_pb2
from kiln_trainer.recipes.errors import UnknownOption

OptimizerKind = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]
LossType = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
KlEstimator = Literal["k1", "k2", "k3"]
ImportanceMode = Literal["none", "token", "sequence"]
RewardScale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class _LossDefaults:
    clip_low: float
    clip_high: float
    scale_rewards: RewardScale = "group"


# From each loss's paper, but for cispo's upper bound, which its paper does not give: Khatri et al.
# 2025 (arXiv 2510.13786) found weights up to 4, 5 and 8 to do equally well. A lower bound of
# 1 - 1 = 0 never binds.
_LOSS_DEFAULTS: dict[LossType, _LossDefaults] = {
    "grpo": _LossDefaults(0.2, 0.2),
    "dr_grpo": _LossDefaults(0.2, 0.2, "none"),
    "dapo": _LossDefaults(0.2, 0.28),
    "gspo": _LossDefaults(3e-4, 4e-4),
    "cispo": _LossDefaults(1.0, 4.0),
}


@dataclass(frozen=True)
class OptimizerOptions:
    """The optimiser and its learning-rate schedule. `max_grad_norm` 0 does not clip.

    beta1, beta2 and eps are AdamW's; muon has none of them.
    """

    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    warmup_ratio: float = 0.0
    schedule: Schedule = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    kind: OptimizerKind = "adamw"

    @classmethod
    def from_proto(cls, wire: trainer_pb2.OptimizerConfig) -> OptimizerOptions:
        """Read the wire form; beta1, beta2 and eps of 0 mean their defaults."""
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio"):
            value = getattr(wire, name)
            if not 0 <= value < float("inf"):
                raise InvalidValue(f"{name} is {value}, it must be finite and at least 0", param=name)
        return cls(
            learning_rate=wire.learning_rate,
            weight_decay=wire.weight_decay,
            max_grad_norm=wire.max_grad_norm,
            warmup_ratio=wire.warmup_ratio,
            schedule=cast(Schedule, choice("schedule", wire.schedule or "constant", get_args(Schedule))),
            beta1=wire.adam_beta1 or cls.beta1,
            beta2=wire.adam_beta2 or cls.beta2,
            eps=wire.adam_eps or cls.eps,
            kind=cast(OptimizerKind, choice("optimizer", wire.type or "adamw", get_args(OptimizerKind))),
        )


@dataclass(frozen=True)
class RunOptions:
    """How often the data is gone through, and how it is cut into optimiser steps.

    `gradient_accumulation` counts the micro-batches of one step; 0 puts a whole epoch into each.
    `publish_every` counts the steps between two versions; 0 publishes none on the way.
    `dropout` is that of the adapter's inputs. `trains_mtp`: the multi-token-prediction layer is adapted too.
    """

    epochs: int = 1
    batch_tokens: int = 4096
    gradient_accumulation: int = 0
    seed: int = 0
    checkpoint_every: int = 10
    publish_every: int = 0
    dropout: float = 0.0
    trains_mtp: bool = False

    @classmethod
    def from_proto(cls, wire: trainer_pb2.JobConfig) -> RunOptions:
        """Read the wire form; 0 means the default, but for gradient_accumulation and seed.

        Raises:
            InvalidValue: lora.dropout leaves everything out, or is no share.
        """
        if not 0 <= wire.lora.dropout < 1:
            raise InvalidValue(
                f"lora.dropout is {wire.lora.dropout}, it must be in [0, 1)", param="lora.dropout"
            )
        return cls(
            epochs=wire.epochs or cls.epochs,
            batch_tokens=wire.batch_tokens or cls.batch_tokens,
            gradient_accumulation=wire.gradient_accumulation,
            seed=wire.seed,
            checkpoint_every=wire.checkpoint_every or cls.checkpoint_every,
            publish_every=int(wire.publish) if wire.publish.isdecimal() else 0,
            dropout=wire.lora.dropout,
            trains_mtp=wire.train_mtp,
        )


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped policy loss and what is added to it; see recipes/losses.py."""

    loss_type: LossType = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    importance_mode: ImportanceMode = "token"
    importance_cap: float = 2.0


@dataclass(frozen=True)
class GrpoOptions:
    """How rewards become advantages, which completions count, and the objective they enter."""

    scale_rewards: RewardScale = "group"
    masks_truncated: bool = False
    objective: PolicyObjective = PolicyObjective()

    @classmethod
    def from_proto(cls, wire: trainer_pb2.GrpoLoss) -> GrpoOptions:
        """Read the wire form; 0 and "" mean the loss type's defaults, but for kl_coef.

        Raises:
            UnknownOption: a variant that does not exist.
        """
        loss_type = cast(LossType, choice("loss.type", wire.type or "grpo", get_args(LossType)))
        defaults = _LOSS_DEFAULTS[loss_type]
        estimator = choice("loss.kl.estimator", wire.kl_estimator or "k3", get_args(KlEstimator))
        mode = choice("loss.importance.mode", wire.importance_mode or "token", get_args(ImportanceMode))
        scale = wire.scale_rewards or defaults.scale_rewards
        objective = PolicyObjective(
            loss_type=loss_type,
            clip_low=wire.clip_low or defaults.clip_low,
            clip_high=wire.clip_high or defaults.clip_high,
            kl_coef=wire.kl_coef,
            kl_estimator=cast(KlEstimator, estimator),
            importance_mode=cast(ImportanceMode, mode),
            importance_cap=wire.importance_cap or PolicyObjective.importance_cap,
        )
        return cls(
            scale_rewards=cast(RewardScale, choice("loss.scale_rewards", scale, get_args(RewardScale))),
            masks_truncated=wire.mask_truncated_completions,
            objective=objective,
        )

    def to_proto(self) -> trainer_pb2.GrpoLoss:
        """The wire form with every default spelled out."""
        objective = self.objective
        return trainer_pb2.GrpoLoss(
            type=objective.loss_type,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            kl_coef=objective.kl_coef,
            kl_estimator=objective.kl_estimator,
            importance_mode=objective.importance_mode,
            importance_cap=objective.importance_cap,
            scale_rewards=self.scale_rewards,
            mask_truncated_completions=self.masks_truncated,
        )


def choice(field: str, value: str, known: tuple[str, ...]) -> str:
    """`value`, if it is one of the known ones. Raises UnknownOption."""
    if value not in known:
        raise UnknownOption(field, value, known)
    return value
