"""Training beside an engine: when it moves to another partition, and when and how long it rests."""

from __future__ import annotations

import itertools

import pytest
import torch

from kiln_trainer.domain.gpu_share import EngineLoad, Shares
from kiln_trainer.torch_backend import gpu_share
from kiln_trainer.torch_backend.errors import GpuPartitionUnavailable
from kiln_trainer.torch_backend.gpu_share import (
    GpuPartitions,
    GpuUse,
    LoadWatch,
    TimeSlices,
    WholeDevice,
    choose_mode,
    make_share,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
IDLE, ONE = EngineLoad(0, 0), EngineLoad(1, 0)


class Scene:
    """A clock that moves when somebody waits, and an engine whose load is what it was set to last."""

    def __init__(self, load: EngineLoad | None = IDLE) -> None:
        self.now_s = 100.0
        self.load = load
        self.coming: list[tuple[float, EngineLoad]] = []

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        while self.coming and self.coming[0][0] <= self.now_s:
            self.load = self.coming.pop(0)[1]

    def watch(self, shares: Shares | None = None, yield_s: float = 1.0) -> LoadWatch:
        return LoadWatch(
            lambda: self.load, shares or Shares(), yield_s, clock=lambda: self.now_s, wait=self.wait
        )


@pytest.mark.parametrize(
    ("choice", "facts", "expected"),
    [
        ("auto", {"is_cuda": True, "is_own_device": False, "is_mps": True}, "mps"),
        ("auto", {"is_cuda": True, "is_own_device": False, "is_mps": False}, "time_slices"),
        ("mps", {"is_cuda": True, "is_own_device": False, "is_mps": False}, "time_slices"),
        # Under MPS without a partition the engine would stall, whoever asked for it.
        ("time_slices", {"is_cuda": True, "is_own_device": False, "is_mps": True}, "mps"),
        ("auto", {"is_cuda": False, "is_own_device": False, "is_mps": False}, "none"),
        ("time_slices", {"is_cuda": False, "is_own_device": False, "is_mps": False}, "time_slices"),
        ("mps", {"is_cuda": True, "is_own_device": True, "is_mps": True}, "own_gpu"),
    ],
)
def test_the_mode_follows_from_what_is_there(choice, facts, expected):
    assert choose_mode(choice, **facts) == expected


def test_a_cpu_and_an_own_gpu_are_not_shared():
    share = make_share("auto", CPU, Scene().watch(), is_own_device=False)
    assert isinstance(share, WholeDevice)
    with share.occupied():
        share.between_micro_batches()
    assert share.take_metrics() == {}


def run_micro_batches(scene: Scene, share: TimeSlices, num: int, busy_s: float) -> list[float]:
    """Seconds of rest before each micro-batch."""
    rests = []
    with share.occupied():
        for _ in range(num):
            ended_s = scene.now_s
            share.between_micro_batches()
            rests.append(round(scene.now_s - ended_s, 6))
            scene.now_s += busy_s
    return rests


def test_turns_hold_the_share_while_requests_run_and_cost_nothing_while_none_do():
    scene = Scene(ONE)
    share = TimeSlices(CPU, scene.watch(Shares(light=0.25)))
    assert run_micro_batches(scene, share, 3, busy_s=0.2) == pytest.approx([0.0, 0.6, 0.6])
    metrics = share.take_metrics()
    assert metrics == {"gpu_share": 0.25, "gpu_yield_s": pytest.approx(1.2)}
    assert share.use == GpuUse("time_slices", 0.25)
    scene.load, scene.now_s = IDLE, scene.now_s + 10
    assert run_micro_batches(scene, share, 3, busy_s=0.2) == [0.0, 0.0, 0.0]
    assert share.take_metrics() == {"gpu_share": 1.0, "gpu_yield_s": 0.0}


@pytest.mark.parametrize(("away_s", "rest_s"), [(0.0, 0.6), (0.25, 0.35), (60.0, 0.0)])
def test_sampling_and_checkpoints_between_two_steps_count_as_rest_and_not_as_work(away_s, rest_s):
    scene = Scene(ONE)
    share = TimeSlices(CPU, scene.watch(Shares(light=0.25)))
    with share.occupied():
        share.between_micro_batches()
        scene.now_s += 0.2
        share.work_done()
        scene.now_s += away_s
        share.between_micro_batches()
        assert share.take_metrics()["gpu_yield_s"] == pytest.approx(rest_s)
        scene.now_s += 0.2
        share.between_micro_batches()
    assert share.take_metrics()["gpu_yield_s"] == pytest.approx(0.6)


def test_a_rest_ends_when_the_load_that_asked_for_it_is_gone():
    scene = Scene(ONE)
    share = TimeSlices(CPU, scene.watch(Shares(light=0.1)))
    scene.coming = [(scene.now_s + 1.0, IDLE)]
    rests = run_micro_batches(scene, share, 2, busy_s=0.5)
    # 4.5 s for a share of a tenth; the engine falls idle at 1 s, and has been calm for another at 2 s.
    assert rests[1] == pytest.approx(1.5, abs=0.05)


def test_one_slow_micro_batch_is_not_paid_for_with_a_minute_of_rest():
    scene = Scene(ONE)
    share = TimeSlices(CPU, scene.watch(Shares(light=0.1)))
    assert run_micro_batches(scene, share, 2, busy_s=30.0)[1] == pytest.approx(5.0)


def test_a_queue_that_grows_is_waited_for_and_one_that_stands_is_not():
    scene = Scene(EngineLoad(4, 3))
    watch = scene.watch(yield_s=1.0)
    watch.await_turn()
    assert scene.now_s == pytest.approx(100.02)  # it had grown from nothing, and stood a moment later
    watch.await_turn()
    assert scene.now_s == pytest.approx(100.02)
    scene.load = EngineLoad(4, 5)
    scene.coming = [(scene.now_s + 0.01 * n, EngineLoad(4, 5 + n)) for n in range(1, 30)]
    watch.await_turn()
    assert scene.now_s == pytest.approx(100.34, abs=0.03)


def test_waiting_for_a_queue_has_an_end():
    scene = Scene(EngineLoad(4, 1))
    scene.coming = [(scene.now_s + 0.01 * n, EngineLoad(4, 1 + n)) for n in range(1, 10_000)]
    scene.watch(yield_s=1.0).await_turn()
    assert scene.now_s == pytest.approx(101.0, abs=0.03)
    scene.watch(yield_s=0.0).await_turn()
    assert scene.now_s == pytest.approx(101.0, abs=0.03)


class FakeCuda:
    """The few things that moving between partitions asks of torch, in the order they were asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, error: Exception | None = None) -> None:
        self.current, self.calls, self.made = "outer", [], []
        fake = self

        class Context:
            @staticmethod
            def create(*, num_sms, device_id):
                if error is not None:
                    raise error
                fake.made.append(num_sms)
                context = Context()
                context.num_sms = num_sms
                return context

            def Stream(self):
                return type("Handle", (), {"stream_id": self.num_sms, "device_index": 0, "device_type": 1})

        monkeypatch.setattr(gpu_share.green_contexts, "GreenContext", Context)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: type("P", (), {"multi_processor_count": 132})
        )
        monkeypatch.setattr(torch.cuda, "Stream", lambda stream_id, **_: f"stream {stream_id}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self._named(self.current))
        monkeypatch.setattr(torch.cuda, "set_stream", self._set)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: self.calls.append("empty"))

    def _named(self, name):
        calls = self.calls

        class Current(str):
            def synchronize(self):
                calls.append(f"finish {name}")

        return Current(name)

    def _set(self, stream):
        self.current = str(stream)
        self.calls.append(f"use {stream}")


def test_training_moves_between_partitions_with_the_load_and_leaves_them_at_the_end(monkeypatch):
    cuda, scene = FakeCuda(monkeypatch), Scene(ONE)
    share = GpuPartitions(GPU, scene.watch())
    with share.occupied():
        assert share.use == GpuUse("mps", 64 / 132, 64)
        for load, seconds in [(ONE, 0.1), (EngineLoad(40, 0), 0.1), (IDLE, 0.1), (IDLE, 2.0), (ONE, 0.1)]:
            scene.load, scene.now_s = load, scene.now_s + seconds
            share.between_micro_batches()
            cuda.calls.append(f"train on {share.use.num_sms}")
    assert cuda.made == [64, 32, 112]  # each once
    trained = [call for call in cuda.calls if call.startswith("train")]
    assert trained == ["train on 64", "train on 32", "train on 32", "train on 112", "train on 64"]
    assert cuda.current == "outer"
    assert share.use == GpuUse("mps")
    metrics = share.take_metrics()
    assert metrics["gpu_sms"] == pytest.approx((64 + 32 + 32 + 112 + 64) / 5)
    assert metrics["gpu_share"] == pytest.approx(metrics["gpu_sms"] / 132)


def test_a_partition_is_left_only_when_its_work_has_ended(monkeypatch):
    cuda, scene = FakeCuda(monkeypatch), Scene(ONE)
    share = GpuPartitions(GPU, scene.watch())

    def fail():
        with share.occupied():
            scene.load = EngineLoad(40, 0)
            share.between_micro_batches()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    current = "outer"
    for before, call in itertools.pairwise(cuda.calls):
        if call.startswith("use "):
            assert before == f"finish {current}"
            current = call.removeprefix("use ")
    assert cuda.calls[-2:] == ["finish stream 32", "use outer"]


def test_a_gpu_that_cannot_be_split_ends_the_job_by_name(monkeypatch):
    FakeCuda(monkeypatch, error=RuntimeError("cuda driver too old to use green context!"))
    share = GpuPartitions(GPU, Scene(ONE).watch())
    with pytest.raises(GpuPartitionUnavailable, match="64 multiprocessors: cuda driver too old") as caught:
        share._move_to(0.5)
    assert "time_slices" in caught.value.hint
