"""The seam between a durable job and the arithmetic that carries it out.

`jobs/` owns the queue, claims, cancellation, publishing; `recipes/` and `torch_backend/` own the
steps. They meet here: a backend runs one job from its last checkpoint to its end and calls the
hooks at each step boundary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kiln_common.pb import trainer_pb2


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished optimiser step."""

    step: int  # from 1
    num_steps: int
    num_tokens: int  # trained on since the job began, this step included
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Adapter version to start from, as a PEFT folder's two files."""

    reference: str  # "name@version"
    config_json: str
    safetensors_path: Path


class StudentSampler(Protocol):
    """Draws completions from the engine for a job that learns from its own."""

    def sample(
        self, student: AdapterContent | None, prompts: Sequence[tuple[Sequence[int], int]]
    ) -> list[trainer_pb2.OpdRollout]:
        """One completion for each prompt (token ids) and seed, in order.

        `student`: the adapter that draws them, None for the job's starting point.

        Raises:
            JobCancelled, ClaimLost, WorkerStopping; KilnError of kind UNAVAILABLE while the
            registry or the engine is away: sample again.
        """
        ...


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """A teacher's `num_top` likeliest tokens at each token of one completion, one after the other.

    `token_ids` are int32, `logprobs` float32, in this machine's byte order.
    """

    num_top: int
    token_ids: bytes
    logprobs: bytes


class TeacherScorer(Protocol):
    """Asks a teacher that runs elsewhere how it would have gone on."""

    def score(self, rollouts: Sequence[trainer_pb2.OpdRollout]) -> list[TeacherScores]:
        """For each completion, in order.

        Raises:
            JobCancelled, ClaimLost, WorkerStopping; KilnError of kind UNAVAILABLE while the teacher is
            away: score again.
        """
        ...


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One claimed job, ready to run."""

    job_id: str
    request: trainer_pb2.SubmitRequest
    # None starts from a fresh adapter of request.config.lora's shape.
    starting_point: StartingPoint | None
    # Folder of this job's checkpoints; survives the process.
    checkpoint_dir: Path
    claim_epoch: int
    # The adapter that teaches, for distillation; None where the bare base model does.
    teacher: StartingPoint | None = None
    # There for jobs that sample their own completions.
    sampler: StudentSampler | None = None
    # There for jobs whose teacher is another engine's model.
    scorer: TeacherScorer | None = None


class AdapterContent(Protocol):
    """A trained adapter's files in memory that engines on this host can read too."""

    @property
    def config_json(self) -> str: ...

    def view(self) -> memoryview:
        """The bytes of adapter_model.safetensors, which nobody can change."""
        ...

    def hand_over(self, socket_path: str, name: str, timeout_s: float) -> str:
        """Give the bytes to an engine; returns the sha256 of what it took. Raises an error of its own."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """An adapter as training left it after `step`; whoever gets it as a result closes the content."""

    content: AdapterContent
    metrics: Mapping[str, float]  # the last ones
    step: int


class StepHooks(Protocol):
    """Called by the backend on its own thread at every optimiser step boundary.

    Any method may raise JobCancelled, ClaimLost or WeightsLost; the backend lets them travel and
    leaves nothing half-written.
    """

    def after_step(self, report: StepReport) -> None:
        """Report progress; the step has been applied."""
        ...

    def before_checkpoint(self, step: int) -> None:
        """About to write the checkpoint of `step`; raises ClaimLost if another trainer took over."""
        ...

    def after_checkpoint(self, step: int) -> None: ...

    def publish(self, trained: TrainedAdapter) -> None:
        """The adapter between two steps, for a job that publishes on the way; the backend closes it."""
        ...


class TrainingBackend(Protocol):
    """Runs training jobs on the mapped weights."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Software versions, and the device once one is known: what else a result may depend on."""
        ...

    def run(self, task: TrainingTask, hooks: StepHooks) -> TrainedAdapter:
        """Train from the last checkpoint in task.checkpoint_dir (or from the start) to the end.

        Deterministic on the CPU: the same task gives the same bytes, interrupted or not.
        """
        ...
