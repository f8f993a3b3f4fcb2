"""TorchBackend: what the job machinery calls to carry out a claimed job."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from kiln_common.errors import KilnError
from kiln_nn.errors import KilnNnError
from kiln_trainer.domain.capacity import Capacity
from kiln_trainer.domain.errors import DeviceBroken
from kiln_trainer.domain.training import StepHooks, TrainedAdapter, TrainingTask
from kiln_trainer.torch_backend.activation_memory import ActivationPlan, ActivationPlans, head_bytes
from kiln_trainer.torch_backend.available_memory import device_bytes, host_bytes
from kiln_trainer.torch_backend.errors import ModelError, OutOfTrainingMemory
from kiln_trainer.torch_backend.gpu_share import GpuShare, GpuUse, WholeDevice
from kiln_trainer.torch_backend.training_run import TrainingRun
from kiln_trainer.torch_backend.warm_up import warm_up
from kiln_trainer.torch_backend.weights import LocateWeights, WeightSession, engine_locator

log = structlog.get_logger()

# How torch says that the host has no memory left: it has no class of its own for that.
_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True)
class MappedModel:
    """What this process has mapped; all empty while nothing is."""

    engine_boot_id: str = ""
    model_hash: str = ""
    num_borrowed_bytes: int = 0
    num_allocated_base_bytes: int = 0


class TorchBackend:
    """A TrainingBackend on weights mapped from an engine.

    `run` belongs to one thread at a time (a worker thread beside the server's event loop);
    `mapped_model` and `gpu_use` may be read from any. The mapping is kept between jobs and renewed
    when its engine has gone.

    `device`: where to train, if not where the engine's weights lie. `make_share` is asked once, when
    the first weights are mapped, how training shares its device with the engine.
    """

    def __init__(
        self,
        locate: LocateWeights,
        *,
        num_threads: int = 1,
        device: torch.device | None = None,
        make_share: Callable[[WeightSession], GpuShare] = lambda session: WholeDevice("none"),
    ) -> None:
        self._locate = locate
        self._num_threads = num_threads
        self._device = device
        self._make_share = make_share
        self._share: GpuShare | None = None
        self._session: WeightSession | None = None
        self._mapped = MappedModel()
        self._last_failure = ""  # so that one outage is one line in the log
        self._is_warm = False
        self._plan: ActivationPlan | None = None  # of the last job
        self._plans = ActivationPlans()  # of the mapping there is now
        self._device_bytes: int | None = None  # of a GPU, before anything was allocated there

    @classmethod
    def for_engine(cls, engine_address: str, **options: Any) -> TorchBackend:
        """A backend on the weights of the engine at that gRPC address; options as the constructor's."""
        return cls(engine_locator(engine_address), **options)

    @property
    def mapped_model(self) -> MappedModel:
        """The mapping there is now."""
        return self._mapped

    @property
    def gpu_use(self) -> GpuUse:
        """How training shares its device; before anything was mapped, that it does not."""
        return self._share.use if self._share is not None else GpuUse()

    @property
    def capacity(self) -> Capacity | None:
        """Measured with the adapter of the last job; one with other targets differs by little."""
        session, plan = self._session, self._plan
        available_bytes = host_bytes() if self._device_bytes is None else self._device_bytes
        if session is None or plan is None or available_bytes is None:
            return None
        is_float32 = session.weights_dtype == torch.float32
        return Capacity(
            available_bytes=available_bytes,
            base_shared_bytes=self._mapped.num_borrowed_bytes,
            base_copied_bytes=self._mapped.num_allocated_base_bytes,
            token_bytes=plan.least_token_bytes,
            fixed_bytes=head_bytes(session.device),
            copy_bytes=0 if is_float32 else session.weights_dtype.itemsize,
        )

    @property
    def environment(self) -> Mapping[str, str]:
        """Versions and the device; without weights there is no device yet."""
        found = {
            "kiln": _installed_version("kiln-trainer") or "unknown",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "num_threads": str(self._num_threads),
        }
        if triton := _installed_version("triton"):
            found["triton"] = triton
        if self._session is not None:
            device = self._session.device
            found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            found["weights_dtype"] = str(self._session.weights_dtype).rpartition(".")[2]
        return found

    def run(self, task: TrainingTask, hooks: StepHooks) -> TrainedAdapter:
        """Train from the last checkpoint in task.checkpoint_dir (or from the start) to the end.

        Raises:
            WeightsLost: the engine is away or went away; run again to go on from the checkpoint.
            KilnError: the job cannot succeed; code, message and hint say why.
            DeviceBroken: nothing can be computed on the device any more in this process.
            Whatever the hooks raise.
        """
        # Per thread in OpenMP builds of torch, so it is set here and not at start-up.
        torch.set_num_threads(self._num_threads)
        with _translated_errors():
            session = self._open_session()
            share = self._share_of(session)
            with share.occupied():
                training = TrainingRun(task, session, share, self._plans)
                self._plan = training.plan
                training.execute(hooks)
                return training.trained()

    def keep_mapped(self) -> None:
        """Map the weights unless they are mapped, and let go of those whose engine has gone.

        Takes a step on nothing when they are mapped for the first time. Tries once; a failure is
        logged, and told by the next job that needs the weights.

        Raises:
            DeviceBroken: as `run`.
        """
        failure = ""
        try:
            with _translated_errors():
                session = self._open_session()
                if not self._is_warm:
                    self._is_warm = True
                    torch.set_num_threads(self._num_threads)
                    plan = warm_up(session, self._share_of(session), self._plans)
                    self._plan = plan or self._plan
        except KilnError as error:
            failure = str(error)
            if failure != self._last_failure:
                log.info("weights_not_mapped_yet", reason=failure)
        self._last_failure = failure

    def close(self) -> None:
        """Give the weights back."""
        if self._session is not None:
            self._session.close()
            self._session = None
            self._mapped = MappedModel()
            self._plans = ActivationPlans()

    def _open_session(self) -> WeightSession:
        if self._session is not None and self._session.is_alive():
            return self._session
        self.close()
        session = WeightSession.open(self._locate, self._device)
        self._session = session
        self._device_bytes = device_bytes(session.device) if session.device.type == "cuda" else None
        self._mapped = MappedModel(
            engine_boot_id=session.boot_id,
            model_hash=session.model_hash,
            num_borrowed_bytes=session.num_borrowed_bytes,
            num_allocated_base_bytes=session.num_allocated_base_bytes(session.weights),
        )
        log.info(
            "weights_mapped",
            boot_id=session.boot_id,
            model_hash=session.model_hash,
            device=str(session.device),
            gpu_sharing=self._share_of(session).use.mode,
            borrowed_bytes=session.num_borrowed_bytes,
        )
        return session

    def _share_of(self, session: WeightSession) -> GpuShare:
        if self._share is None:
            self._share = self._make_share(session)
        return self._share


def _installed_version(package: str) -> str:
    """Its version; "" where it is not installed, as when it runs from a source tree on PYTHONPATH."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextmanager
def _translated_errors() -> Iterator[None]:
    """kiln_nn's and torch's errors as errors of this service; GPU memory goes back to the engine."""
    is_usable = True
    try:
        yield
    except torch.AcceleratorError as error:
        is_usable = False
        raise DeviceBroken(str(error)) from error
    except KilnNnError as error:
        raise ModelError(error) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfTrainingMemory(str(error)) from error
    except RuntimeError as error:
        if _HOST_MEMORY not in str(error):
            raise
        raise OutOfTrainingMemory(str(error)) from error
    finally:
        if is_usable and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
