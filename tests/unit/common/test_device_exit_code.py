"""How a process whose device has failed ends, which the supervisor goes by."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from kiln_common.settings import EXIT_CONFIG, EXIT_DEVICE
from kiln_engine import __main__ as engine_main
from kiln_trainer import __main__ as trainer_main
from kiln_trainer.domain.errors import DeviceBroken
from kiln_trainer.torch_backend.errors import GpuPartitionUnavailable


@pytest.mark.parametrize(("has_failed", "expected"), [(True, EXIT_DEVICE), (False, 0)])
async def test_an_engine_whose_steps_fail_ends_with_a_code_of_its_own(monkeypatch, has_failed, expected):
    stopped = asyncio.Event()

    async def stop():
        stopped.set()

    async def start(settings, parts):
        engine = SimpleNamespace(has_failed=asyncio.Event(), stop=stop)
        if has_failed:
            engine.has_failed.set()
        return engine

    async def signal():
        if has_failed:
            await asyncio.Event().wait()

    monkeypatch.setattr(engine_main, "load_device_side", lambda settings: None)
    monkeypatch.setattr(engine_main, "start_engine", start)
    monkeypatch.setattr(engine_main, "freeze_heap", lambda: None)
    monkeypatch.setattr(engine_main, "wait_for_stop_signal", signal)
    assert await engine_main.serve(None) == expected
    assert stopped.is_set()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (DeviceBroken("illegal memory access"), EXIT_DEVICE),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), EXIT_DEVICE),
        (OSError(28, "No space left on device"), 1),
        (KeyError("a plain bug"), 1),
        (None, 0),
    ],
)
def test_only_a_failed_device_ends_a_trainer_with_the_same(monkeypatch, failure, expected):
    """None: the worker lives on, and somebody asks the trainer to stop."""
    stopped = asyncio.Event()

    async def stop():
        stopped.set()

    async def start(settings):
        worker = SimpleNamespace(is_alive=failure is None, failure=failure)
        return SimpleNamespace(worker=worker, stop=stop)

    async def signal():
        if failure is not None:
            await asyncio.Event().wait()

    settings = SimpleNamespace(log_level="ERROR", cpu_niceness=0)
    monkeypatch.setattr(trainer_main, "read_settings", lambda settings_class: settings)
    monkeypatch.setattr(trainer_main, "configure_logs", lambda *args: None)
    monkeypatch.setattr(trainer_main, "end_on_stop_signals", lambda: None)
    monkeypatch.setattr(trainer_main.os, "nice", lambda increment: None)
    monkeypatch.setattr(trainer_main, "start_trainer", start)
    monkeypatch.setattr(trainer_main, "wait_for_stop_signal", signal)
    with pytest.raises(SystemExit) as ended:
        trainer_main.main()
    assert ended.value.code == expected
    assert stopped.is_set()


def test_a_trainer_that_cannot_start_now_says_why_without_a_traceback(monkeypatch):
    async def start(settings):
        raise GpuPartitionUnavailable("the driver refuses 32 multiprocessors")

    settings = SimpleNamespace(log_level="ERROR", cpu_niceness=0)
    monkeypatch.setattr(trainer_main, "read_settings", lambda settings_class: settings)
    monkeypatch.setattr(trainer_main, "configure_logs", lambda *args: None)
    monkeypatch.setattr(trainer_main, "end_on_stop_signals", lambda: None)
    monkeypatch.setattr(trainer_main.os, "nice", lambda increment: None)
    monkeypatch.setattr(trainer_main, "start_trainer", start)
    with capture_logs() as lines, pytest.raises(SystemExit) as ended:
        trainer_main.main()
    assert ended.value.code == 1
    (line,) = lines
    assert (line["event"], line["code"]) == ("trainer_not_started", GpuPartitionUnavailable.code)
    assert line["reason"] == "the driver refuses 32 multiprocessors"
    assert line["hint"] == GpuPartitionUnavailable.hint


def test_the_codes_differ_from_each_other_and_from_ordinary_failures():
    assert len({0, 1, 2, EXIT_CONFIG, EXIT_DEVICE}) == 5
