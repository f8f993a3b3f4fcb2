"""The engine process of the sharing benchmark: measures decode steps while a trainer works beside it."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import torch

from benchmarks.engine.recording import Distribution, Recording, RequestFailed, TooFewSteps
from benchmarks.engine.requests import random_requests
from benchmarks.engine.results import COLUMNS, ResultFile, device_name
from benchmarks.engine.spine import Spine, make_settings
from benchmarks.sharing.trainer_process import TrainerFailed, TrainerProcess
from kiln_common.logs import configure_logs
from kiln_common.pb import engine_pb2, engine_pb2_grpc

OWN_GPU = "cuda:1"  # the trainer's, in the mode that is called after it
# Of an H200's 132 multiprocessors.
_PARTITIONS = (32, 64, 96)
_IDLE_S = 2.0
_LEAST_TRAINING_STEPS = 4
_MOST_STRETCH = 3


@dataclass(frozen=True)
class Sizes:
    """`decode_steps` to a wave of requests; training packs `num_documents` of `document_tokens`."""

    batches: tuple[int, ...]
    prompt_tokens: int
    decode_steps: int
    num_documents: int
    document_tokens: int


TABLE = Sizes((16, 64), prompt_tokens=896, decode_steps=256, num_documents=2, document_tokens=1024)
TINY = Sizes((2,), prompt_tokens=24, decode_steps=40, num_documents=2, document_tokens=16)


@dataclass(frozen=True)
class Way:
    """One way of sharing: its name, the trainer's shares, and whether the engine idles now and then."""

    name: str
    shares: dict[str, float]
    yield_s: float = 0.0
    has_idle_times: bool = False


def ways(mode: str, num_sms: int) -> list[Way]:
    """Fixed shares first, then the one that follows the load, as the trainer's defaults are."""
    follows = Way("follows the load", {}, yield_s=1.0, has_idle_times=True)
    if mode == "own_gpu":
        return [Way("a GPU of the trainer's own", _always(1.0))]
    if mode == "mps":
        fixed = [Way(f"green context of {n} SMs", _always(n / num_sms)) for n in _PARTITIONS]
    else:
        fixed = [Way("no pauses", _always(1.0)), Way("half of the time", _always(0.5))]
    return [*fixed, follows]


def _always(share: float) -> dict[str, float]:
    return {"idle": share, "light": share, "heavy": share}


class EngineFacts(engine_pb2_grpc.EngineServicer):
    """What a trainer asks of an engine, answered from the spine: identity, weights and load."""

    def __init__(self, spine: Spine) -> None:
        self._spine = spine

    def GetInfo(self, request: Any, context: Any) -> engine_pb2.EngineInfo:
        return self._spine.parts.info

    def GetStats(self, request: Any, context: Any) -> engine_pb2.EngineStats:
        stats = self._spine.loop.stats
        return engine_pb2.EngineStats(num_running=stats.num_running, num_waiting=stats.num_waiting)

    def ShareWeights(self, request: Any, context: Any) -> engine_pb2.ShareWeightsResponse:
        info = self._spine.parts.info
        return engine_pb2.ShareWeightsResponse(
            socket_path=self._spine.parts.weights.socket_path,
            boot_id=info.boot_id,
            model_hash=info.base_model.model_hash,
        )


@contextmanager
def engine_address(spine: Spine) -> Iterator[str]:
    """The spine's facts over gRPC, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="kiln-") as folder:
        address = f"unix:{folder}/engine.sock"
        server = grpc.server(futures.ThreadPoolExecutor(2))
        engine_pb2_grpc.add_EngineServicer_to_server(EngineFacts(spine), server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(address)
        server.start()
        try:
            yield address
        finally:
            server.stop(grace=None)


class Table:
    """Measures and records rows; a way of sharing that fails is one line, and the others go on."""

    def __init__(self, spine: Spine, sizes: Sizes, mode: str, row_seconds: float) -> None:
        self._spine = spine
        self._sizes = sizes
        self._mode = mode
        self._row_seconds = row_seconds
        self._results = ResultFile("sharing", device_name(), (*COLUMNS, "train_tok_per_s"))
        self._seed = 0

    def add_row(self, batch: int, name: str, trainer: TrainerProcess | None, has_idle_times: bool) -> None:
        """Waves of requests until the time is over; percentiles of the steps in which all rows decode."""
        steps_s: list[float] = []
        first_tokens_s: list[float] = []
        trained: list[dict[str, Any]] = []
        started_s = time.monotonic()
        while not steps_s or self._goes_on(time.monotonic() - started_s, trainer, trained):
            if has_idle_times:
                time.sleep(_IDLE_S)
            recording = self._wave(batch)
            steps_s += recording.decode_window().steps_s
            first_tokens_s += recording.first_token_s
            trained = trainer.steps_between(started_s, time.monotonic()) if trainer else []
        context = self._sizes.prompt_tokens + self._sizes.decode_steps // 2
        times = Distribution.of(steps_s)
        rate, notes = _training_figures(trained) if trainer else (None, [])
        notes.append(f"first token p50 {1e3 * statistics.median(first_tokens_s):.0f} ms")
        if has_idle_times:
            notes.append(f"{_IDLE_S:g} s without requests before each wave")
        self._results.add(
            f"serving while training, batch {batch}, context {context}",
            f"{self._mode}, {name}",
            p50_ms=times.p50_ms,
            p90_ms=times.p90_ms,
            p99_ms=times.p99_ms,
            mean_ms=times.mean_ms,
            tok_per_s=1e3 * batch / times.mean_ms,
            num_samples=times.num_samples,
            train_tok_per_s=rate,
            note="; ".join(notes),
        )

    def warm_up(self, batch: int) -> None:
        self._wave(batch)

    def _goes_on(self, elapsed_s: float, trainer: TrainerProcess | None, trained: list[Any]) -> bool:
        """For its time, and a few times as long while training has not done enough for a rate."""
        is_short = trainer is not None and len(trained) < _LEAST_TRAINING_STEPS
        return elapsed_s < self._row_seconds * (_MOST_STRETCH if is_short else 1)

    def _wave(self, batch: int) -> Recording:
        self._seed += 1
        sizes = self._sizes
        budget = self._spine.parts.limits.step_token_budget
        num_prefill_steps = -(-batch * sizes.prompt_tokens // max(1, budget - batch)) + 2
        requests = random_requests(
            batch,
            sizes.prompt_tokens,
            num_prefill_steps + sizes.decode_steps,
            self._spine.config.vocab_size,
            (self._mode, self._seed),
        )
        return self._spine.run(requests)


def _training_figures(steps: list[dict[str, Any]]) -> tuple[float | None, list[str]]:
    """Tokens a second from the end of the first step to that of the last, and notes on the share."""
    if len(steps) < 2:
        return None, [f"{len(steps)} training steps ended in this time: too few for a rate"]
    rate = sum(step["tokens"] for step in steps[1:]) / (steps[-1]["ended_s"] - steps[0]["ended_s"])
    names = ("gpu_sms", "gpu_share", "gpu_yield_s")
    means = {
        name: statistics.fmean(step["metrics"][name] for step in steps)
        for name in names
        if name in steps[0]["metrics"]
    }
    shown = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
    return rate, [f"{len(steps)} training steps", shown]


def measure(spine: Spine, sizes: Sizes, mode: str, row_seconds: float) -> list[str]:
    """All rows of one mode; returns what failed."""
    failed: list[str] = []
    table = Table(spine, sizes, mode, row_seconds)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count if torch.cuda.is_available() else 132
    for batch in sizes.batches:
        table.warm_up(batch)
        table.add_row(batch, "no training", None, has_idle_times=False)
    with engine_address(spine) as address, ExitStack() as stack:
        trainer: TrainerProcess | None = None
        for way in ways(mode, num_sms):
            if trainer is None:
                trainer = stack.enter_context(
                    TrainerProcess(
                        address,
                        sizes.num_documents,
                        sizes.document_tokens,
                        spine.config.vocab_size,
                        OWN_GPU if mode == "own_gpu" else "",
                    )
                )
            try:
                trainer.train(way.shares, way.yield_s)
                for batch in sizes.batches:
                    table.add_row(batch, way.name, trainer, way.has_idle_times)
                trainer.rest()
                if trainer.mode != mode:
                    raise TrainerFailed(f"the trainer shares the GPU by {trainer.mode}")
            except (TrainerFailed, RequestFailed, TooFewSteps) as error:
                failed.append(way.name)
                print(f"{mode}, {way.name} failed: {type(error).__name__}: {error}", flush=True)
                if not spine.loop.is_healthy:
                    break
                stack.close()
                trainer = None
    return failed


def main() -> None:
    options = _options()
    torch.set_grad_enabled(False)
    configure_logs("bench", "WARNING", as_json=True)
    sizes = TINY if options.tiny else TABLE
    with Spine(make_settings(options.model, max_running=max(sizes.batches))) as spine:
        failed = measure(spine, sizes, options.mode, options.row_seconds)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--mode", choices=("mps", "time_slices", "own_gpu"), required=True)
    parser.add_argument("--row-seconds", type=float, default=4.0)
    parser.add_argument("--tiny", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
