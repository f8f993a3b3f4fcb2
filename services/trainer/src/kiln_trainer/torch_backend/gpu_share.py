"""Training beside an engine on one GPU: in a partition of it, or in turns with a duty cycle.

Under MPS the kernels of both run at once, and without a partition one micro-batch holds up every step
of the engine (50 times the latency). So training then runs on the stream of a green context, whose
multiprocessors are a fixed part of the GPU; between micro-batches it moves to another one as the
engine's load asks. Without MPS the driver gives the processes turns, and the trainer pauses between
micro-batches instead.

A stream and not the context itself is made current: the backward pass runs on a thread of autograd's
own, which follows the forward pass's stream but knows nothing of a context of this thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import structlog
import torch
from torch.cuda import green_contexts

from kiln_nn.weights.cuda_driver import runs_under_mps
from kiln_trainer.domain.gpu_share import EngineLoad, PressureGauge, Shares, pause_s, sm_count
from kiln_trainer.torch_backend.errors import GpuPartitionUnavailable

log = structlog.get_logger()

Mode = Literal["mps", "time_slices", "own_gpu", "none"]
Choice = Literal["auto", "mps", "time_slices"]
ReadLoad = Callable[[], EngineLoad | None]

_POLL_S = 0.02
# The longest pause for the duty cycle: a micro-batch that was slow for another reason must not cost more.
_MOST_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True)
class GpuUse:
    """How the trainer uses its device now. `num_sms` is 0 where it has no partition."""

    mode: Mode = "none"
    share: float = 1.0
    num_sms: int = 0


class GpuShare(Protocol):
    """What a training run asks between its micro-batches. Used by one thread at a time."""

    @property
    def use(self) -> GpuUse:
        """The share in force; may be read from any thread."""
        ...

    def occupied(self) -> AbstractContextManager[None]:
        """Everything a run computes on the device happens within this."""
        ...

    def between_micro_batches(self) -> None:
        """Wait until the device has done what was asked of it, and give the engine what it needs."""
        ...

    def work_done(self) -> None:
        """A step has ended: what comes before the next micro-batch (a checkpoint, sampling) is no work of
        training's on the device."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """Figures since the last call, for the metrics of a step."""
        ...


class WholeDevice:
    """A device that training has to itself, or a CPU whose scheduler does the sharing."""

    def __init__(self, mode: Literal["own_gpu", "none"]) -> None:
        self.use = GpuUse(mode)

    def occupied(self) -> AbstractContextManager[None]:
        return nullcontext()

    def between_micro_batches(self) -> None:
        pass

    def work_done(self) -> None:
        pass

    def take_metrics(self) -> dict[str, float]:
        return {}


class LoadWatch:
    """The share that the engine's load leaves to training.

    `yield_s`: the longest wait, between two micro-batches, for a queue that grows.
    """

    def __init__(
        self,
        read_load: ReadLoad,
        shares: Shares,
        yield_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.clock = clock
        self._wait = wait
        self._read_load = read_load
        self._shares = shares
        self._yield_s = yield_s
        self._gauge = PressureGauge()
        self._num_waiting = 0
        self._seen: list[float] = []
        self._yielded_s = 0.0

    def look(self) -> float:
        """The share as of now."""
        return self._see(self._read_load())

    def await_turn(self) -> float:
        """Let a queue that has grown since the last micro-batch stop growing; then the share as of now."""
        began_s = self.clock()
        num_before = self._num_waiting
        while True:
            load = self._read_load()
            share = self._see(load)
            waited_s = self.clock() - began_s
            if load is None or load.num_waiting <= num_before or waited_s >= self._yield_s:
                self._yielded_s += waited_s
                self._num_waiting = load.num_waiting if load else 0
                self._seen.append(share)
                return share
            num_before = load.num_waiting
            self._wait(_POLL_S)

    def pause(self, busy_s: float, share: float, rested_s: float = 0.0) -> None:
        """Leave the device alone after `busy_s` of work; for less long when the load falls meanwhile.

        `rested_s`: for how long it has been left alone already.
        """
        began_s = self.clock()
        while share < 1.0:
            left_s = min(pause_s(busy_s, share), _MOST_PAUSE_S) - rested_s - (self.clock() - began_s)
            if left_s <= 0:
                break
            self._wait(min(_POLL_S, left_s))
            share = self.look()
        self._yielded_s += self.clock() - began_s

    def take_metrics(self) -> dict[str, float]:
        """Mean share and seconds of waiting since the last call."""
        mean = sum(self._seen) / len(self._seen) if self._seen else 1.0
        metrics = {"gpu_share": mean, "gpu_yield_s": self._yielded_s}
        self._seen, self._yielded_s = [], 0.0
        return metrics

    def _see(self, load: EngineLoad | None) -> float:
        return self._shares.at(self._gauge.see(load, self.clock()))


class TimeSlices:
    """Training takes turns with the engine: it rests between micro-batches for its share to hold."""

    def __init__(self, device: torch.device, watch: LoadWatch) -> None:
        self.use = GpuUse("time_slices")
        self._device = device
        self._watch = watch
        self._resumed_s: float | None = None  # while training works
        self._busy_s = self._ended_s = 0.0  # of the work that was done last

    @contextmanager
    def occupied(self) -> Iterator[None]:
        self._resumed_s, self._busy_s = None, 0.0
        yield

    def between_micro_batches(self) -> None:
        self.work_done()
        rested_s = self._watch.clock() - self._ended_s
        share = self._watch.await_turn()
        self.use = GpuUse("time_slices", share)
        if self._busy_s:
            self._watch.pause(self._busy_s, share, rested_s)
        self._resumed_s = self._watch.clock()

    def work_done(self) -> None:
        if self._resumed_s is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._ended_s = self._watch.clock()
        self._busy_s, self._resumed_s = self._ended_s - self._resumed_s, None

    def take_metrics(self) -> dict[str, float]:
        return self._watch.take_metrics()


class GpuPartitions:
    """Training runs on some of the GPU's multiprocessors, as many as the engine's load leaves.

    Everything runs on one stream at a time, and the last has come to its end before the next begins:
    memory that one has let go of is never written while another still reads it.
    """

    def __init__(self, device: torch.device, watch: LoadWatch) -> None:
        self.use = GpuUse("mps")
        self._device = device
        self._watch = watch
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        # The context is kept beside its stream, which lives as long as it does.
        self._partitions: dict[int, tuple[Any, torch.cuda.Stream]] = {}
        self._counts: list[int] = []

    @contextmanager
    def occupied(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._device)
        self._move_to(self._watch.look())
        try:
            yield
        finally:
            torch.cuda.current_stream(self._device).synchronize()
            torch.cuda.set_stream(outer)
            self.use = GpuUse("mps")

    def between_micro_batches(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        self._move_to(self._watch.await_turn())
        self._counts.append(self.use.num_sms)

    def work_done(self) -> None:
        pass

    def take_metrics(self) -> dict[str, float]:
        counts, self._counts = self._counts or [self.use.num_sms], []
        mean = sum(counts) / len(counts)
        return {**self._watch.take_metrics(), "gpu_sms": mean, "gpu_share": mean / self._num_sms}

    def _move_to(self, share: float) -> None:
        count = sm_count(share, self._num_sms)
        if count == self.use.num_sms:
            return
        stream = self._stream_on(count)
        torch.cuda.current_stream(self._device).synchronize()
        torch.cuda.set_stream(stream)
        # Free memory belongs to the stream it was used on: without this each partition would keep its own.
        torch.cuda.empty_cache()
        self.use = GpuUse("mps", count / self._num_sms, count)

    def _stream_on(self, count: int) -> torch.cuda.Stream:
        if count not in self._partitions:
            try:
                # torch declares what it returns as a bare object.
                context: Any = green_contexts.GreenContext.create(num_sms=count, device_id=self._device.index)
                own = context.Stream()
            except RuntimeError as error:
                raise GpuPartitionUnavailable(f"no partition of {count} multiprocessors: {error}") from error
            stream = torch.cuda.Stream(
                stream_id=own.stream_id, device_index=own.device_index, device_type=own.device_type
            )
            self._partitions[count] = (context, stream)
        return self._partitions[count][1]


def make_share(choice: Choice, device: torch.device, watch: LoadWatch, *, is_own_device: bool) -> GpuShare:
    """How training on `device` shares it with the engine; a choice that cannot be is told in the log."""
    is_mps = device.type == "cuda" and runs_under_mps(device)
    mode = choose_mode(choice, is_cuda=device.type == "cuda", is_own_device=is_own_device, is_mps=is_mps)
    if choice not in ("auto", mode) and not is_own_device:
        log.warning("gpu_sharing_not_as_chosen", chosen=choice, mode=mode, runs_under_mps=is_mps)
    if mode == "mps":
        return GpuPartitions(device, watch)
    return TimeSlices(device, watch) if mode == "time_slices" else WholeDevice(mode)


def choose_mode(choice: Choice, *, is_cuda: bool, is_own_device: bool, is_mps: bool) -> Mode:
    """How to share. Under MPS always in a partition, whatever was chosen: without one the engine stalls."""
    if is_own_device:
        return "own_gpu"
    if not is_cuda:
        return "time_slices" if choice == "time_slices" else "none"
    return "mps" if is_mps else "time_slices"
