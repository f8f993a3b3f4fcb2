"""Mapping an engine's weights over gRPC: borrowed, never copied, and noticed when they go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from kiln_common.pb import common_pb2, engine_pb2, engine_pb2_grpc
from kiln_nn.sharing import WeightServer, attach
from kiln_trainer.domain.errors import DeviceBroken, WeightsLost
from kiln_trainer.domain.gpu_share import EngineLoad, Shares
from kiln_trainer.settings import TrainerSettings
from kiln_trainer.torch_backend.backend import MappedModel, TorchBackend
from kiln_trainer.torch_backend.engine_load import EngineLoadReader
from kiln_trainer.torch_backend.errors import WeightsNotBorrowed
from kiln_trainer.torch_backend.from_settings import TrainerDeviceNotAvailable, backend_from_settings
from kiln_trainer.torch_backend.gpu_share import GpuUse, LoadWatch, TimeSlices
from kiln_trainer.torch_backend.training_run import TrainingRun
from kiln_trainer.torch_backend.weights import WeightLocation, WeightSession, engine_locator
from tests.support.training import MODEL_ID, RecordingHooks, ServedModel, served_model, sft_request, task


class SharingEngine(engine_pb2_grpc.EngineServicer):
    """The two calls of an engine that the trainer makes, on a real weight server."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    async def GetInfo(self, request: Any, context: Any) -> engine_pb2.EngineInfo:
        return engine_pb2.EngineInfo(base_model=common_pb2.BaseModel(model_id=MODEL_ID))

    async def ShareWeights(self, request: Any, context: Any) -> engine_pb2.ShareWeightsResponse:
        manifest = self._served.loaded.manifest
        return engine_pb2.ShareWeightsResponse(
            socket_path=str(self._served.server.socket_path),
            boot_id=manifest.boot_id,
            model_hash=manifest.model_hash,
        )


@asynccontextmanager
async def engine_at(served: ServedModel, socket: Path) -> AsyncIterator[str]:
    address = f"unix:{socket}"
    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(SharingEngine(served), server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield address
    finally:
        await server.stop(grace=None)


async def test_a_job_runs_on_a_thread_while_the_same_process_serves_grpc(served, tmp_path):
    async with engine_at(served, tmp_path / "engine.sock") as address:
        backend = TorchBackend.for_engine(address)
        assert backend.mapped_model == MappedModel()
        hooks = RecordingHooks()
        request = sft_request([[1, 2, 3, 4]], epochs=3)
        result = await asyncio.to_thread(backend.run, task(request, tmp_path / "job"), hooks)
    assert len(hooks.reports) == 3
    assert f'"base_model_name_or_path": "{MODEL_ID}"' in result.content.config_json
    manifest = served.loaded.manifest
    own_bytes = sum(entry.nbytes for entry in manifest.entries if entry.kind != "alias")
    assert backend.mapped_model == MappedModel(manifest.boot_id, manifest.model_hash, own_bytes, 0)
    backend.close()
    assert backend.mapped_model == MappedModel()


def test_every_parameter_is_borrowed_and_a_copy_is_noticed(served):
    session = WeightSession.open(served.locate)
    assert session.num_allocated_base_bytes(session.weights) == 0
    session.check_borrowed(session.weights)
    name = "model.layers.0.mlp.up_proj.weight"
    copied = {**session.weights, name: session.weights[name].clone()}
    assert session.num_allocated_base_bytes(copied) == session.weights[name].nbytes
    with pytest.raises(WeightsNotBorrowed, match=r"up_proj"):
        session.check_borrowed(copied)
    without = {key: tensor for key, tensor in session.weights.items() if key != name}
    with pytest.raises(WeightsNotBorrowed, match=r"up_proj"):
        session.check_borrowed(without)
    session.close()


def test_training_leaves_the_engines_bytes_alone(served, tmp_path):
    before = served.loaded.arena.checksum()
    session = WeightSession.open(served.locate)
    assert session.checksum() == before
    TorchBackend(served.locate).run(task(sft_request([[1, 2, 3]], epochs=2), tmp_path), RecordingHooks())
    assert served.loaded.arena.checksum() == before
    session.close()


def test_an_engine_that_does_not_answer_is_a_loss_to_wait_out(tmp_path):
    locate = engine_locator(f"unix:{tmp_path}/nobody.sock", timeout_s=0.2)
    with pytest.raises(WeightsLost, match="did not answer") as caught:
        TorchBackend(locate).run(task(sft_request([[1, 2]]), tmp_path), RecordingHooks())
    assert "\n" not in str(caught.value)
    assert "nobody.sock" not in str(caught.value)


def test_an_engine_that_was_replaced_between_two_questions_is_a_loss(served):
    location = served.locate()
    stale = WeightLocation(location.socket_path, "another-boot", location.model_hash, MODEL_ID)
    with pytest.raises(WeightsLost, match="another-boot"):
        WeightSession.open(lambda: stale)


def test_a_job_whose_engine_dies_goes_on_with_the_next_one(served, tmp_path):
    request = sft_request([[1, 2, 3, 4], [5, 6, 7]], epochs=6, checkpoint_every=2)
    undisturbed = TorchBackend(served.locate).run(task(request, tmp_path / "calm"), RecordingHooks())

    with served_model(tmp_path / "other") as engine:
        backend = TorchBackend(engine.locate)

        class EndsEngine(RecordingHooks):
            def after_step(self, report):
                super().after_step(report)
                if report.step == 3:
                    engine.server.close()

        hooks = EndsEngine()
        with pytest.raises(WeightsLost):
            backend.run(task(request, tmp_path / "job"), hooks)
        # The step after the engine's end was computed, but neither applied nor reported.
        assert [report.step for report in hooks.reports] == [1, 2, 3]
        with pytest.raises(WeightsLost):
            backend.run(task(request, tmp_path / "job"), RecordingHooks())

        engine.server = WeightServer(engine.loaded.arena, engine.server.socket_path)
        resumed = RecordingHooks()
        result = backend.run(task(request, tmp_path / "job"), resumed)
        assert [report.step for report in resumed.reports] == [3, 4, 5, 6]
        backend.close()
    assert result.content.view() == undisturbed.content.view()


def test_the_lease_ends_with_the_backend(served, tmp_path):
    num_before = served.server.num_leases
    backend = TorchBackend(served.locate)
    backend.run(task(sft_request([[1, 2, 3]]), tmp_path / "a"), RecordingHooks())
    backend.run(task(sft_request([[1, 2, 4]]), tmp_path / "b"), RecordingHooks())
    assert served.server.wait_for_leases(num_before + 1, timeout_s=60)  # one mapping for both jobs
    backend.close()
    assert served.server.wait_for_leases(num_before, timeout_s=60)


def test_weights_are_mapped_before_a_job_and_let_go_of_when_their_engine_has_gone(tmp_path):
    with served_model(tmp_path) as engine:
        is_up = False

        def locate() -> WeightLocation:
            if not is_up:
                raise WeightsLost("not yet")
            return engine.locate()

        backend = TorchBackend(locate)
        backend.keep_mapped()
        assert backend.mapped_model == MappedModel()
        is_up = True
        for _ in range(2):
            backend.keep_mapped()
            assert backend.mapped_model.engine_boot_id == engine.loaded.manifest.boot_id
            assert engine.server.num_leases == 1
        engine.server.close()
        is_up = False
        backend.keep_mapped()  # its successor waits for this before it sizes its caches
        assert backend.mapped_model == MappedModel()


def test_a_failure_of_the_device_is_told_apart_from_one_of_the_job(served, tmp_path, monkeypatch):
    def fail(*args: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    backend = TorchBackend(served.locate)
    monkeypatch.setattr(TrainingRun, "execute", fail)
    with pytest.raises(DeviceBroken, match="illegal memory access"):
        backend.run(task(sft_request([[1, 2]]), tmp_path), RecordingHooks())
    backend.close()


def test_an_idle_trainer_outlives_a_device_without_room_for_the_weights(served, monkeypatch):
    backend, attempts = TorchBackend(served.locate), []

    def fail(*args: Any) -> None:
        attempts.append(args)
        raise torch.OutOfMemoryError("tried to allocate 18 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(WeightSession, "open", fail)
        for _ in range(2):
            backend.keep_mapped()
    assert len(attempts) == 2
    assert backend.mapped_model == MappedModel()
    backend.keep_mapped()  # there is room now
    assert backend.mapped_model != MappedModel()
    backend.close()


def test_a_device_that_fails_while_the_weights_are_mapped_is_told_as_broken(served, monkeypatch):
    def fail(*args: Any) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(WeightSession, "open", fail)
    with pytest.raises(DeviceBroken, match="unspecified launch failure"):
        TorchBackend(served.locate).keep_mapped()


def test_the_number_of_threads_is_the_settings(tmp_path):
    def nobody() -> WeightLocation:
        raise WeightsLost("no engine")

    before = torch.get_num_threads()
    try:
        with pytest.raises(WeightsLost):
            TorchBackend(nobody, num_threads=2).run(task(sft_request([[1, 2]]), tmp_path), RecordingHooks())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_weights_for_a_device_of_its_own_are_copied_once(served, monkeypatch):
    """There is one device here: the mapping says it lies on another, so that the copy is a real one."""
    elsewhere = torch.device("cuda", 0)
    mapped = served.loaded.arena.bytes_u8()

    class Elsewhere:
        device = elsewhere

        def to(self, device: torch.device) -> torch.Tensor:
            assert device == torch.device("cpu")
            return mapped.clone()

    shared = attach(served.server.socket_path)
    with monkeypatch.context() as patch:
        patch.setattr(shared, "bytes_u8", Elsewhere)
        session = WeightSession(shared, MODEL_ID, torch.device("cpu"))
    assert session.is_own_device
    assert session.num_allocated_base_bytes(session.weights) == served.loaded.manifest.nbytes
    assert session.checksum() == served.loaded.arena.checksum()
    first = min(tensor.data_ptr() for tensor in session.weights.values())
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in session.weights.values())
    assert last - first == served.loaded.manifest.nbytes  # one piece
    session.check_borrowed(session.weights)
    assert session.is_alive()
    session.close()


def test_a_session_on_the_engines_device_copies_nothing(served):
    session = WeightSession.open(served.locate, torch.device("cpu"))
    assert not session.is_own_device
    assert session.num_allocated_base_bytes(session.weights) == 0
    session.close()


async def test_the_engines_load_is_asked_for_and_its_silence_is_no_failure(tmp_path):
    address = f"unix:{tmp_path}/engine.sock"
    read_load = EngineLoadReader(address, timeout_s=0.2)
    assert await asyncio.to_thread(read_load) is None

    class LoadedEngine(engine_pb2_grpc.EngineServicer):
        async def GetStats(self, request: Any, context: Any) -> engine_pb2.EngineStats:
            return engine_pb2.EngineStats(num_running=3, num_waiting=2)

    server = grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(LoadedEngine(), server)
    server.add_insecure_port(address)
    await server.start()
    try:
        async with asyncio.timeout(60):
            while (load := await asyncio.to_thread(read_load)) is None:
                await asyncio.sleep(0.05)  # gRPC connects again a moment later
        assert load == EngineLoad(num_running=3, num_waiting=2)
    finally:
        await server.stop(grace=None)


def test_a_job_that_takes_turns_gives_the_bytes_of_one_that_does_not(served, tmp_path):
    request = sft_request([[1, 2, 3, 4], [5, 6, 7]], epochs=3, batch_tokens=4)
    alone = TorchBackend(served.locate).run(task(request, tmp_path / "alone"), RecordingHooks())
    watch = LoadWatch(lambda: EngineLoad(1, 0), Shares(light=0.5), yield_s=0.0)
    backend = TorchBackend(served.locate, make_share=lambda session: TimeSlices(session.device, watch))
    assert backend.gpu_use == GpuUse()
    hooks = RecordingHooks()
    beside = backend.run(task(request, tmp_path / "beside"), hooks)
    assert backend.gpu_use == GpuUse("time_slices", 0.5)
    assert [report.metrics["gpu_share"] for report in hooks.reports] == [0.5] * 3
    assert all(report.metrics["gpu_yield_s"] > 0 for report in hooks.reports)
    assert beside.content.view() == alone.content.view()
    backend.close()


def test_settings_choose_the_device_and_how_it_is_shared(served, tmp_path, monkeypatch):
    fields = {
        "redis_url": "redis://x",
        "registry_address": "x",
        "engine_addresses": "x",
        "state_dir": tmp_path,
    }
    with pytest.raises(TrainerDeviceNotAvailable, match="cuda:7 was asked for, and torch sees 0 GPUs"):
        backend_from_settings(TrainerSettings(**fields, device="cuda:7"))
    monkeypatch.setattr("kiln_trainer.torch_backend.backend.engine_locator", lambda address: served.locate)
    backend = backend_from_settings(TrainerSettings(**fields, gpu_sharing="time_slices"))
    backend.keep_mapped()
    assert backend.gpu_use.mode == "time_slices"
    backend.close()
