"""The production spine without its wire: device side, scheduler and loop, requests put in directly."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.engine.recording import Recorder, Recording
from kiln_engine.bootstrap import make_speculator
from kiln_engine.clock import MonotonicClock
from kiln_engine.device_side import load_device_side
from kiln_engine.domain import GenerationRequest
from kiln_engine.heap import freeze_heap
from kiln_engine.loop import EngineLoop
from kiln_engine.scheduling import Scheduler, SchedulerStats
from kiln_engine.settings import EngineSettings
from kiln_nn.config import ModelConfig

T = TypeVar("T")
_MOST_SECONDS = 300.0
AdapterSlots = tuple[tuple[int, float], ...]


class UnknownSetting(Exception):
    """This engine has no such setting (yet)."""


def make_settings(model_path: Path, **fields: Any) -> EngineSettings:
    """Engine settings with a socket folder of their own; None leaves a field to the engine.

    Raises:
        UnknownSetting: a field this version of the engine does not have.
    """
    wanted = {name: value for name, value in fields.items() if value is not None}
    unknown = sorted(set(wanted) - set(EngineSettings.model_fields))
    if unknown:
        raise UnknownSetting(", ".join(unknown))
    socket_dir = Path(tempfile.mkdtemp(prefix="kiln-bench-"))
    return EngineSettings(model_path=str(model_path), socket_dir=socket_dir, **wanted)


class Spine:
    """An engine in this process. `loaded_s` is how long the device side took to stand."""

    def __init__(self, settings: EngineSettings) -> None:
        started_s = time.perf_counter()
        self.settings = settings
        self.parts = load_device_side(settings)
        self.loaded_s = time.perf_counter() - started_s
        self.config = ModelConfig.from_folder(settings.model_path)
        run_ahead = settings.run_ahead
        if run_ahead is None:
            run_ahead = int(self.parts.info.device.startswith("cuda"))
        self.speculator = make_speculator(settings, self.parts.limits)
        eos_token_ids = frozenset(self.parts.info.base_model.eos_token_ids)
        self.scheduler = Scheduler(self.parts.limits, eos_token_ids, self.speculator)
        self.loop = EngineLoop(self.scheduler, self.parts.runner, MonotonicClock(), run_ahead=run_ahead)
        self.loop.start()
        freeze_heap()  # as the engine's process does

    @property
    def runner(self) -> Any:
        return self.parts.runner

    def label(self, overrides: Mapping[str, str]) -> str:
        """The number formats in use, whoever chose them, and what else was overridden."""
        formats = {
            "state": self.runner.states.layer(0).state_SHKV.dtype,
            "KV": self.runner.kv.layer(0)[0].dtype,
        }
        named = [f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in formats.items()]
        others = [f"{k} {v}" for k, v in overrides.items() if k not in ("state_dtype", "kv_dtype")]
        return ", ".join(named + others)

    @property
    def stats(self) -> SchedulerStats:
        """With every step that was launched taken in."""
        return self.between_steps(self.scheduler.stats)

    def between_steps(self, function: Callable[[], T]) -> T:
        """Call something on the loop's thread while no step runs."""
        done: Future[T] = self.loop.run_between_steps(function)
        return done.result(_MOST_SECONDS)

    def run(
        self, requests: Sequence[GenerationRequest], adapter_slots: Sequence[AdapterSlots] | None = None
    ) -> Recording:
        """Submit all requests at once and wait until the last has ended.

        Raises:
            RequestFailed: one of them did not run to its length.
        """
        slots = adapter_slots or [()] * len(requests)
        recorder = Recorder(len(requests))
        for request, own_slots in zip(requests, slots, strict=True):
            self.loop.submit(request, own_slots, recorder)
        return recorder.wait(_MOST_SECONDS)

    def run_clients(
        self,
        requests: Sequence[GenerationRequest],
        num_clients: int,
        *,
        may_stop: bool = False,
        adapter_slots: AdapterSlots = (),
    ) -> Recording:
        """A closed loop: whenever a request ends, the next one is submitted.

        Requests run to their length, or end by themselves where they may. All use the same adapters.

        Raises:
            RequestFailed: one of them did not run to its length.
        """
        coming = iter(requests)

        def submit(count: int) -> None:
            for request in itertools.islice(coming, count):
                self.loop.submit(request, adapter_slots, recorder)

        recorder = Recorder(len(requests), on_ends=submit)
        submit(num_clients)
        return recorder.wait(_MOST_SECONDS, may_stop=may_stop)

    def upload_adapter(self, slot: int, adapter_bytes: bytes, config_json: str) -> None:
        """Bring an adapter onto the device, as the adapter manager does."""
        store = self.parts.adapter_store
        store.stage(slot, adapter_bytes, config_json)
        self.between_steps(lambda: store.activate(slot))

    def close(self) -> None:
        self.loop.stop()
        self.parts.weights.close()

    def __enter__(self) -> Spine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
