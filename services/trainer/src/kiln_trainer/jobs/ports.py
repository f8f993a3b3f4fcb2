"""What the job machinery needs from outside: a backend, and somewhere to publish to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from kiln_common.pb import engine_pb2, evaluations_pb2, registry_pb2
from kiln_trainer.domain.capacity import Capacity
from kiln_trainer.domain.training import AdapterContent, StartingPoint, TrainingBackend
from kiln_trainer.recipes.opd_options import TeacherModel


class MappedModelView(Protocol):
    """Which engine's weights are mapped; all empty while none are."""

    @property
    def engine_boot_id(self) -> str: ...
    @property
    def model_hash(self) -> str: ...
    @property
    def num_borrowed_bytes(self) -> int: ...
    @property
    def num_allocated_base_bytes(self) -> int: ...


class GpuUseView(Protocol):
    """How training shares its device with an engine: "mps", "time_slices", "own_gpu" or "none".

    `share` is the fraction it takes now, `num_sms` the size of its partition, 0 without one.
    """

    @property
    def mode(self) -> str: ...
    @property
    def share(self) -> float: ...
    @property
    def num_sms(self) -> int: ...


class JobBackend(TrainingBackend, Protocol):
    """A training backend that can also say what it has mapped, and how it shares its device."""

    @property
    def mapped_model(self) -> MappedModelView: ...

    @property
    def gpu_use(self) -> GpuUseView: ...

    @property
    def capacity(self) -> Capacity | None:
        """Its memory, once weights are mapped and a first step has been taken. Any thread may ask."""
        ...

    def keep_mapped(self) -> None:
        """Called again and again while there is no job, so that the next one finds the weights.

        Maps them unless they are mapped, and lets go of those whose engine has gone. Never raises
        for an engine that is away.
        """
        ...

    def close(self) -> None:
        """Give the weights back."""
        ...


# Which engines get a version as it is published: all, or the one that draws a job's completions.
Audience = Literal["all", "sampler"]


@dataclass(frozen=True, slots=True)
class LiveReport:
    """Which engines serve a version now."""

    not_live: tuple[str, ...]  # boot ids, or addresses of engines that are away
    seconds: float  # from the registry's commit until the last engine answered


class Publisher(Protocol):
    """The registry and the engines, as a worker thread calls them.

    Any method may raise an error of kind UNAVAILABLE: the caller tries again.
    """

    def resolve(self, reference: str) -> registry_pb2.AdapterVersion:
        """The version a reference means now. Raises adapter_not_found."""
        ...

    def download(self, version: registry_pb2.AdapterVersion, folder: Path) -> StartingPoint:
        """Put the version's files into `folder`."""
        ...

    def publish(
        self, header: registry_pb2.PublishHeader, content: AdapterContent, audience: Audience = "all"
    ) -> registry_pb2.AdapterVersion:
        """Publish a version, idempotent by header.publish_key, and meanwhile hand its bytes to its engines."""
        ...

    def max_adapter_rank(self) -> int:
        """Highest rank that the engines' slots hold; 0 while no engine has said. Never raises."""
        ...

    def make_live(self, version: registry_pb2.AdapterVersion) -> LiveReport:
        """Have its engines serve the version published last. Never raises: engines that fail are in the report."""
        ...

    def generate(
        self,
        requests: Sequence[engine_pb2.GenerateRequest],
        check: Callable[[], None],
        teacher: TeacherModel | None = None,
    ) -> list[list[engine_pb2.SequenceOutput]]:
        """What the first engine, or the teacher's, answers to each request, in order; the last output ends it.

        `check` is called now and then; what it raises ends the requests. Raises what the engine
        refuses, and what passes only where it has not for a long time; TeacherUnavailable, TeacherChanged.
        """
        ...

    def start_evaluation(self, request: evaluations_pb2.SubmitRunRequest) -> evaluations_pb2.EvalRun:
        """Queue a run for the gateways, idempotent by request.idempotency_key."""
        ...

    def evaluation(self, run_id: str, owner: str) -> evaluations_pb2.EvalRun:
        """A run as it stands. Raises eval_run_not_found."""
        ...

    def withdraw(self, name: str, version: int = 0) -> None:
        """Delete a version, or every version of a name (0); there may be none."""
        ...

    def versions(self, name: str) -> Sequence[registry_pb2.AdapterVersion]:
        """Every version of a name; empty where there is none."""
        ...

    def default_adapter(self) -> str:
        """The deployment's default as "name@version", "" for none."""
        ...

    def attach(self, reference: str) -> None:
        """Make a version the default, or none (""). Raises adapter_not_found."""
        ...
