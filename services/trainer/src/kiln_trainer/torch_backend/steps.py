"""Where a job's optimiser steps come from: data that is given, or completions sampled on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from kiln_common.pb import trainer_pb2
from kiln_nn.config import ModelConfig
from kiln_trainer.data.documents import Document, PreparedJob, TeacherTop
from kiln_trainer.data.packing import StepPlan, first_fit, plan_steps
from kiln_trainer.domain.training import AdapterContent, StudentSampler
from kiln_trainer.recipes.opd import plan_draws, prepare_opd
from kiln_trainer.recipes.opd_options import Objective, OpdOptions
from kiln_trainer.recipes.options import RunOptions
from kiln_trainer.torch_backend.checkpoints import write_durably
from kiln_trainer.torch_backend.document_checks import check_documents
from kiln_trainer.torch_backend.teacher_scores import TeacherTops

log = structlog.get_logger()
SealStudent = Callable[[], AdapterContent | None]


@dataclass(frozen=True)
class StepData:
    """What one optimiser step learns from; `plan` counts through `documents`."""

    documents: tuple[Document, ...]
    plan: StepPlan
    facts: Mapping[str, float]

    @property
    def num_tokens(self) -> int:
        return sum(self.documents[index].num_tokens for index in self.plan.documents)


class StepSource(Protocol):
    """A job's steps, numbered from 1. The number of steps is known from the start."""

    @property
    def objective(self) -> Objective | None: ...
    @property
    def num_steps(self) -> int: ...

    def open(self, step: int, seal_student: SealStudent) -> StepData:
        """The step's data. `seal_student` gives the present student, None while it is the starting
        version."""
        ...

    def forget(self, step: int) -> None:
        """A checkpoint of `step` is safe: nothing before it will be asked for again."""
        ...


class FixedSteps:
    """Steps over documents that are there before the first one; `documents` are the same in each."""

    def __init__(self, job: PreparedJob, options: RunOptions) -> None:
        self.documents = job.documents
        self.objective = job.objective
        self._facts = job.facts
        self.plans = plan_steps([document.num_tokens for document in job.documents], options)

    @property
    def num_steps(self) -> int:
        return len(self.plans)

    def open(self, step: int, seal_student: SealStudent) -> StepData:
        return StepData(self.documents, self.plans[step - 1], self._facts)

    def forget(self, step: int) -> None:
        pass


class SampledSteps:
    """Steps over completions that the student draws in rounds of `refresh_every` steps.

    A round's completions are on disk before the first of its steps: a resumed job learns from the
    same ones. Where they are not (another machine), the student as it is draws them again, with
    the same seeds. `folder` and `job_hash` are those of the job's checkpoints. `teacher` judges the
    completions where it is not the trainer's own.

    Raises:
        InvalidTokenIds, InvalidRequest: the model cannot read a prompt or a completion.
    """

    def __init__(
        self,
        spec: trainer_pb2.OpdSpec,
        sampler: StudentSampler,
        options: RunOptions,
        config: ModelConfig,
        folder: Path,
        job_hash: str,
        teacher: TeacherTops | None = None,
    ) -> None:
        self._options = OpdOptions.from_proto(spec.settings)
        self.objective = self._options.objective
        self._prompts = spec.prompts
        self._sampler = sampler
        self._batch_tokens = options.batch_tokens
        self._config = config
        self._folder = folder
        self._job_tag = job_hash[:16]
        self._draws = plan_draws(len(spec.prompts), self._options, epochs=options.epochs, seed=options.seed)
        self._round = -1
        self._rollouts: list[trainer_pb2.OpdRollout] = []
        self._teacher = teacher
        self._tops: list[TeacherTop] | None = None

    @property
    def num_steps(self) -> int:
        return len(self._draws)

    def open(self, step: int, seal_student: SealStudent) -> StepData:
        round_number = (step - 1) // self._options.refresh_every
        if round_number != self._round:
            self._rollouts = self._read(round_number) or self._sample(round_number, seal_student)
            if self._teacher is not None:
                self._tops = self._teacher.of(f"{round_number:06d}", self._rollouts)
            self._round = round_number
        num_before = sum(len(draws) for draws in self._draws[self._first_step(round_number) - 1 : step - 1])
        own = slice(num_before, num_before + len(self._draws[step - 1]))
        tops = self._tops[own] if self._tops is not None else None
        job = prepare_opd(self._rollouts[own], self.objective, tops)
        check_documents(job.documents, self._config)
        lengths = [document.num_tokens for document in job.documents]
        plan = StepPlan(tuple(first_fit(range(len(lengths)), lengths, self._batch_tokens)))
        return StepData(job.documents, plan, {**job.facts, "round": float(round_number + 1)})

    def forget(self, step: int) -> None:
        for path in (*self._folder.glob("rollouts-*.pb"), *self._folder.glob("scores-*.safetensors")):
            last_step = self._first_step(int(path.stem.split("-")[1]) + 1) - 1
            if last_step <= step:
                path.unlink()

    def _first_step(self, round_number: int) -> int:
        return round_number * self._options.refresh_every + 1

    def _path(self, round_number: int) -> Path:
        return self._folder / f"rollouts-{round_number:06d}-{self._job_tag}.pb"

    def _read(self, round_number: int) -> list[trainer_pb2.OpdRollout]:
        path = self._path(round_number)
        return [*trainer_pb2.OpdSpec.FromString(path.read_bytes()).rollouts] if path.exists() else []

    def _sample(self, round_number: int, seal_student: SealStudent) -> list[trainer_pb2.OpdRollout]:
        first = self._first_step(round_number)
        draws = [draw for step in self._draws[first - 1 :][: self._options.refresh_every] for draw in step]
        wanted = [(self._prompts[draw.prompt_index].token_ids, draw.seed) for draw in draws]
        with contextlib.ExitStack() as stack:
            student = seal_student()
            if student is not None:
                stack.callback(student.close)
            rollouts = self._sampler.sample(student, wanted)
        spec = trainer_pb2.OpdSpec(rollouts=rollouts)
        write_durably(self._path(round_number), spec.SerializeToString(deterministic=True))
        num_tokens = sum(len(rollout.completion_token_ids) for rollout in rollouts)
        log.info("student_sampled", round=round_number + 1, rollouts=len(rollouts), tokens=num_tokens)
        return rollouts
