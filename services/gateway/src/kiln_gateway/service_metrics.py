"""What the other services count, for Prometheus: one table each, read from the messages of their stats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from kiln_common.pb import common_pb2, engine_pb2, trainer_pb2

Stats = TypeVar("Stats")
_FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}


@dataclass(frozen=True)
class Figure(Generic[Stats]):
    """One metric read from a message: a number, a histogram, or with `label` a number for each of its values."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Stats], Any]
    label: str = ""

    def family(self, prefix: str, labels: Sequence[str]) -> Any:
        """An empty family under the metric's whole name; counters get their `_total` from it."""
        wanted = [*labels, self.label] if self.label else [*labels]
        return _FAMILIES[self.kind](prefix + self.name, self.help, labels=wanted)

    def add_to(self, family: Any, labels: Sequence[str], stats: Stats) -> None:
        value = self.read(stats)
        if self.kind == "histogram":
            add_histogram(family, labels, value)
        elif self.label:
            for key, number in value.items():
                family.add_metric([*labels, key], number)
        else:
            family.add_metric([*labels], value)


def add_histogram(family: Any, labels: Sequence[str], histogram: common_pb2.Histogram) -> None:
    """Bucket counts as Prometheus wants them: each with all that is below it."""
    bounds = [*map(str, histogram.upper_bounds), "+Inf"]
    buckets, total = [], 0
    for bound, count in zip(bounds, histogram.counts or [0] * len(bounds), strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric([*labels], buckets, histogram.sum)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _pages(stats: engine_pb2.EngineStats) -> dict[str, int]:
    in_use, cached = stats.num_pages_in_use, stats.num_pages_cached
    return {"sequences": in_use - cached, "cache": cached, "free": stats.num_pages - in_use}


def _slots(stats: engine_pb2.EngineStats) -> dict[str, int]:
    in_use, cached = stats.num_state_slots_in_use, stats.num_state_slots_cached
    return {"sequences": in_use - cached, "cache": cached, "free": stats.num_state_slots - in_use}


def _adapter_slots(stats: engine_pb2.EngineStats) -> dict[str, int]:
    resident = len(stats.resident_adapters)
    pinned = sum(adapter.num_pins > 0 for adapter in stats.resident_adapters)
    return {
        "pinned": pinned, "resident": resident - pinned, "free": stats.num_adapter_slots - resident
    }  # fmt: skip


def _drafts(field: str) -> Callable[[engine_pb2.EngineStats], dict[str, int]]:
    return lambda stats: {each.adapter or "(base)": getattr(each, field) for each in stats.drafts}


def _device_memory(stats: engine_pb2.EngineStats) -> dict[str, int]:
    used = stats.num_device_bytes - stats.num_device_bytes_free
    return {"used": used, "free": stats.num_device_bytes_free}


EngineFigure = Figure[engine_pb2.EngineStats]
ENGINE_FIGURES: tuple[EngineFigure, ...] = (
    EngineFigure("uptime_seconds", "gauge", "Since the engine started", lambda s: s.uptime_s),
    EngineFigure("draining", "gauge", "1 while it takes no new requests", lambda s: float(s.is_draining)),
    EngineFigure("requests_running", "gauge", "Sequences being computed", lambda s: s.num_running),
    EngineFigure(
        "requests_waiting", "gauge", "Sequences that wait for room, a grammar or an adapter",
        lambda s: s.num_waiting,
    ),
    EngineFigure(
        "kv_cache_usage_ratio", "gauge", "Pages held by sequences, which cannot be given to others, of all",
        lambda s: _ratio(s.num_pages_in_use - s.num_pages_cached, s.num_pages),
    ),
    EngineFigure("kv_pages", "gauge", "Pages by who holds them", _pages, "holder"),
    EngineFigure(
        "state_cache_usage_ratio", "gauge", "State slots held by sequences, of all",
        lambda s: _ratio(s.num_state_slots_in_use - s.num_state_slots_cached, s.num_state_slots),
    ),
    EngineFigure("state_slots", "gauge", "Recurrent state slots by who holds them", _slots, "holder"),
    EngineFigure("step_seconds", "histogram", "One step of the model", lambda s: s.step_seconds),
    EngineFigure("prompt_tokens", "counter", "Prompt tokens, cached ones too", lambda s: s.num_prompt_tokens),
    EngineFigure("generated_tokens", "counter", "Tokens drawn", lambda s: s.num_generated_tokens),
    EngineFigure(
        "prefix_cache_hit_tokens", "counter", "Prompt tokens that came from the prefix cache",
        lambda s: s.num_cached_tokens,
    ),
    EngineFigure(
        "prefix_cache_lost_tokens", "counter",
        "Tokens that matched cached pages and had to be computed for want of a state checkpoint",
        lambda s: s.num_tokens_lost_for_want_of_checkpoint,
    ),
    EngineFigure(
        "preemptions", "counter", "Times a sequence gave its memory to others", lambda s: s.num_preemptions
    ),
    EngineFigure(
        "spec_decode_draft_tokens", "counter", "Tokens guessed ahead, by the request's adapter",
        _drafts("num_proposed"), "adapter",
    ),
    EngineFigure(
        "spec_decode_accepted_tokens", "counter", "Guessed tokens that turned out to be the ones drawn",
        _drafts("num_accepted"), "adapter",
    ),
    EngineFigure("adapter_slots", "gauge", "Adapter slots by their use", _adapter_slots, "use"),
    EngineFigure(
        "adapter_load_seconds", "histogram", "From when a version was needed until steps could use it",
        lambda s: s.adapter_load_seconds,
    ),
    EngineFigure("weight_leases", "gauge", "Processes that map the weights", lambda s: s.num_weight_leases),
    EngineFigure(
        "memory_bytes", "gauge", "What the engine allocated, by use",
        lambda s: {part.name: part.num_bytes for part in s.memory_parts}, "part",
    ),
    EngineFigure(
        "device_memory_bytes", "gauge", "The device's memory, whoever uses it; the machine's on a CPU",
        _device_memory, "state",
    ),
)  # fmt: skip

TrainerFigure = Figure[trainer_pb2.TrainerStatus]
TRAINER_FIGURES: tuple[TrainerFigure, ...] = (
    TrainerFigure("jobs_queued", "gauge", "Jobs that wait", lambda s: s.num_queued),
    TrainerFigure("jobs_running", "gauge", "1 while a job runs", lambda s: float(bool(s.running_job_id))),
    TrainerFigure(
        "jobs_ended", "counter", "Jobs that ended, by status", lambda s: dict(s.num_jobs_ended), "status"
    ),
    TrainerFigure("trained_tokens", "counter", "Tokens trained on", lambda s: s.num_trained_tokens),
    TrainerFigure(
        "step_seconds", "histogram", "From the end of one training step to the next", lambda s: s.step_seconds
    ),
    TrainerFigure(
        "swap_seconds", "histogram", "From the registry's commit of a version until its engines served it",
        lambda s: s.swap_seconds,
    ),
    TrainerFigure(
        "step_metric", "gauge", "Metrics of the last step, such as loss, reward_mean and kl",
        lambda s: dict(s.metrics), "name",
    ),
    TrainerFigure(
        "gpu_share_ratio", "gauge", "Training's part of the GPU, or of its time, now", lambda s: s.gpu_share
    ),
    TrainerFigure(
        "gpu_multiprocessors", "gauge", "Multiprocessors of training's partition; 0 without one",
        lambda s: s.gpu_sms,
    ),
    TrainerFigure(
        "borrowed_weight_bytes", "gauge", "Base weights mapped from the engine", lambda s: s.num_borrowed_bytes
    ),
    TrainerFigure(
        "copied_weight_bytes", "gauge", "Base weights of the trainer's own: 0, or one copy on its own GPU",
        lambda s: s.num_allocated_base_bytes,
    ),
    TrainerFigure(
        "memory_bytes", "gauge", "Memory the trainer holds on its device, mapped weights not counted",
        lambda s: s.num_device_bytes,
    ),
)  # fmt: skip


class ServiceMetrics:
    """A collector of what the services last said; one that does not answer has `up` 0 and nothing else."""

    def __init__(self) -> None:
        self._engines: Mapping[str, engine_pb2.EngineStats | None] = {}
        self._trainers: Mapping[str, trainer_pb2.TrainerStatus | None] = {}

    def show(
        self,
        engines: Mapping[str, engine_pb2.EngineStats | None],
        trainers: Mapping[str, trainer_pb2.TrainerStatus | None],
    ) -> None:
        """Replace what is shown. All by their label; None where one does not answer."""
        self._engines, self._trainers = engines, trainers

    def collect(self) -> Iterator[Metric]:
        yield from _families("engine", ENGINE_FIGURES, self._engines)
        yield from _families("trainer", TRAINER_FIGURES, self._trainers)


def _families(
    kind: str, figures: Sequence[Figure[Stats]], services: Mapping[str, Stats | None]
) -> Iterator[Metric]:
    prefix = f"kiln_{kind}_"
    up = GaugeMetricFamily(f"{prefix}up", f"1 while the {kind} answers", labels=[kind])
    for name, stats in services.items():
        up.add_metric([name], float(stats is not None))
    yield up
    for figure in figures:
        family = figure.family(prefix, [kind])
        for name, stats in services.items():
            if stats is not None:
                figure.add_to(family, [name], stats)
        yield family
