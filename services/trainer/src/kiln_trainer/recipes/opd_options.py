"""The settings of on-policy distillation: protobuf zeros become the defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, cast, get_args

from kiln_common.adapter_names import BASE_NAME, parse_reference
from kiln_common.errors import InvalidValue
from kiln_common.pb import trainer_pb2
from kiln_trainer.recipes.options import PolicyObjective, choice

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]


@dataclass(frozen=True)
class DistillationObjective:
    """Which divergence from the teacher is lowered; `beta`, its share of the mixture, is for jsd."""

    divergence: Divergence = "reverse_kl"
    beta: float = 0.5


Objective = PolicyObjective | DistillationObjective

MAX_TOP_K = 256  # what an engine tells of a token


@dataclass(frozen=True)
class TeacherModel:
    """Another engine's model as a teacher. `model_hash` is empty until an engine has been found."""

    model_id: str
    model_hash: str = ""
    top_k: int = 64


@dataclass(frozen=True)
class OpdOptions:
    """Whom the student learns from, and how often it is sampled.

    `teacher` is "base" or "name@version", or empty where `teacher_model` is set. One version of the
    student draws the completions of `refresh_every` optimiser steps.
    """

    teacher: str
    objective: DistillationObjective = DistillationObjective()
    samples_per_prompt: int = 1
    prompts_per_step: int = 8
    refresh_every: int = 1
    teacher_model: TeacherModel | None = None

    @classmethod
    def from_proto(cls, wire: trainer_pb2.OpdSettings) -> OpdOptions:
        """Read the wire form.

        Raises:
            InvalidAdapterName: the teacher is neither "base" nor a reference.
            InvalidValue: the teacher has no version, there are two, or a number is out of its range.
            UnknownOption: a divergence that does not exist.
        """
        teacher_model = _teacher_model(wire)
        if teacher_model is None and wire.teacher != BASE_NAME:
            _check_version(wire.teacher)
        if not 0 <= wire.beta < 1:
            raise InvalidValue(
                f"divergence.beta is {wire.beta}, it must lie between 0 and 1", param="divergence"
            )
        for name in ("samples_per_prompt", "prompts_per_step", "refresh_every"):
            if getattr(wire, name) < 0:
                raise InvalidValue(f"rollout.{name} is {getattr(wire, name)}", param="rollout")
        divergence = choice("divergence", wire.divergence or "reverse_kl", get_args(Divergence))
        return cls(
            teacher=wire.teacher,
            teacher_model=teacher_model,
            objective=DistillationObjective(
                cast(Divergence, divergence), wire.beta or DistillationObjective.beta
            ),
            samples_per_prompt=wire.samples_per_prompt or cls.samples_per_prompt,
            prompts_per_step=wire.prompts_per_step or cls.prompts_per_step,
            refresh_every=wire.refresh_every or cls.refresh_every,
        )

    def to_proto(self, wire: trainer_pb2.OpdSettings) -> trainer_pb2.OpdSettings:
        """`wire`, where the sampling is, with every default spelled out."""
        return trainer_pb2.OpdSettings(
            teacher=self.teacher,
            divergence=self.objective.divergence,
            beta=self.objective.beta,
            sampling=wire.sampling,
            samples_per_prompt=self.samples_per_prompt,
            prompts_per_step=self.prompts_per_step,
            refresh_every=self.refresh_every,
            teacher_model=trainer_pb2.TeacherModel(**asdict(self.teacher_model))
            if self.teacher_model is not None
            else None,
        )


def _teacher_model(wire: trainer_pb2.OpdSettings) -> TeacherModel | None:
    if not wire.HasField("teacher_model"):
        return None
    model = wire.teacher_model
    if wire.teacher:
        raise InvalidValue(
            f"both {wire.teacher[:160]!r} and the model {model.model_id[:160]!r} are to teach",
            param="teacher",
        )
    if not model.model_id:
        raise InvalidValue("the teacher's model has no id", param="teacher")
    if not 0 <= model.top_k <= MAX_TOP_K:
        raise InvalidValue(f"teacher.top_k is {model.top_k}, it must be 1 to {MAX_TOP_K}", param="teacher")
    return TeacherModel(model.model_id, model.model_hash, model.top_k or TeacherModel.top_k)


def _check_version(teacher: str) -> None:
    if parse_reference(teacher, param="teacher").version is None:
        raise InvalidValue(
            f"the teacher {teacher!r} has no version",
            hint='A job keeps its teacher: name a version, such as "name@3".',
            param="teacher",
        )
