"""The warm-up's kernels are compiled ahead where one is missing, and those are the ones it launches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from kiln_engine.execution import captured_step
from kiln_engine.execution import warm_up as module
from kiln_engine.execution.runner import TorchRunner
from kiln_engine.execution.warm_up import warm_up
from kiln_nn.kernels.compile_ahead import KernelNotCompiled
from tests.support.engine_serving import KERNEL_SHAPE, RunAgain, make_runner
from tests.support.pretend_gpu import pretend_gpu
from tests.support.tiny_models import make_checkpoint
from tests.support.triton_kernels import needs_triton, only_outside_interpreter
from tests.support.variants import SETTING

# Rows of whole groups, so that all linear layers can be quantised.
_SHAPE = {**KERNEL_SHAPE, "intermediate_size": 256}


class _Launches:
    """Misses a kernel in its first `num_misses` attempts."""

    def __init__(self, num_misses: int = 0) -> None:
        self.num_misses = num_misses
        self.calls: list[str] = []

    def launch(self) -> None:
        self.calls.append("launch")
        if self.num_misses:
            self.num_misses -= 1
            raise KernelNotCompiled("_norm_kernel")

    def rehearse(self) -> None:
        self.calls.append("rehearse")


@pytest.mark.parametrize(
    ("num_misses", "num_threads", "calls"),
    [
        (0, 1, ["launch"]),
        (0, 8, ["launch"]),
        (1, 8, ["launch", "rehearse", "launch"]),
    ],
)
@needs_triton
def test_nothing_is_rehearsed_unless_a_kernel_is_missing(num_misses: int, num_threads: int, calls: list[str]):
    launches = _Launches(num_misses)
    warm_up(launches.launch, launches.rehearse, num_threads)
    assert launches.calls == calls


@needs_triton
def test_what_the_launches_raise_is_raised():
    def launch() -> None:
        raise ValueError("a kernel does not take this shape")

    with pytest.raises(ValueError, match="does not take"):
        warm_up(launch, lambda: None, 8)


@needs_triton
def test_a_rehearsal_that_fails_is_told_and_the_launches_are_made():
    launches = _Launches(num_misses=1)

    def rehearse() -> None:
        raise ValueError("something that only launches would have written")

    with capture_logs() as logs:
        warm_up(launches.launch, rehearse, 8)
    assert launches.calls == ["launch", "launch"]
    [warning] = [line for line in logs if line["log_level"] == "warning"]
    assert warning["event"] == "kernels_not_compiled_ahead"
    assert "only launches" in warning["reason"]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cache key of every kernel asked of the compiler, which makes none, though it remembers it."""
    import triton.compiler
    from triton import knobs
    from triton.compiler.compiler import get_cache_invalidating_env_vars, get_cache_key, make_backend

    asked: list[str] = []

    def compile_nothing(source: Any, target: Any, options: dict[str, Any]) -> Any:
        backend = make_backend(target)
        options = backend.parse_options(dict(options))
        key = get_cache_key(source, backend, options, get_cache_invalidating_env_vars())
        is_known = key in asked
        asked.append(key)
        if knobs.compilation.listener is not None:
            knobs.compilation.listener(src=source, cache_hit=is_known)
        return SimpleNamespace(
            src=source,
            metadata=None,
            function=None,
            packed_metadata=None,
            launch_metadata=lambda *args: None,
            run=lambda *args: None,
        )

    monkeypatch.setattr(triton.compiler, "compile", compile_nothing)
    return asked


def _stores(runner: TorchRunner) -> list[torch.Tensor]:
    """Everything that sequences find again, without the places of padding rows."""
    stores = [runner.kv._cache_bytes, *runner.states._tensors, runner._sampled_ids._ids_S[:-1]]
    if runner.model.mtp is not None:
        stores += [runner._draft_ids.ids_SK[:-1], runner.model.mtp.carried._lines_SND[:-1]]
    return [store.clone() for store in stores]


def _runner(folder: Path, monkeypatch: pytest.MonkeyPatch, memory: dict[str, Any]) -> TorchRunner:
    monkeypatch.setattr("kiln_engine.execution.adapter_store.AdapterUploader", lambda *args: None)
    return make_runner(folder, torch.bfloat16, max_running=4, **memory)[0]


def _without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a capture only launch: what would be launched before it, and into the graph."""

    def launched_twice(run: Callable[[], None], pool: object) -> RunAgain:
        run()
        run()
        return RunAgain(run, pool)

    monkeypatch.setattr(captured_step, "_captured", launched_twice)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@needs_triton
@only_outside_interpreter
@pytest.mark.parametrize(
    ("scheme", "memory"),
    [
        ("none", {"state_dtype": torch.bfloat16, "max_draft_tokens": 3, "drafts_by_mtp": True}),
        ("fp8", {"max_draft_tokens": 3}),
        ("int4", {"kv_dtype": torch.float8_e4m3fn, "max_draft_tokens": 3, "drafts_by_mtp": True}),
    ],
    ids=str,
)
def test_the_rehearsal_of_an_engine_compiles_what_its_warm_up_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str], scheme: str, memory: dict[str, Any]
):
    monkeypatch.setenv(SETTING, scheme)
    make_checkpoint(tmp_path, seed=6, **_SHAPE)
    pretend_gpu(monkeypatch, tmp_path / "cache")
    runner = _runner(tmp_path, monkeypatch, memory)
    before = _stores(runner)
    compiled = module.compile_ahead(lambda: runner._capture(is_rehearsal=True), num_threads=2)
    assert compiled.errors == ()
    assert compiled.num_kernels == len(keys) > 50
    rehearsed = set(keys)
    # Each once; and nobody will find anything of it.
    assert len(rehearsed) == len(keys)
    assert runner._graphs is None
    assert all(torch.equal(old, new) for old, new in zip(before, _stores(runner), strict=True))

    keys.clear()
    pretend_gpu(monkeypatch, tmp_path / "cache")
    _without_gpu(monkeypatch)
    _runner(tmp_path, monkeypatch, memory).capture()
    assert set(keys) == rehearsed


@needs_triton
@only_outside_interpreter
def test_a_first_start_compiles_ahead_and_a_later_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[str]
):
    make_checkpoint(tmp_path, seed=6, **_SHAPE)
    _without_gpu(monkeypatch)
    num_asked = []
    for expected in (["compiling_kernels", "kernels_compiled"], []):
        pretend_gpu(monkeypatch, tmp_path / "cache")  # a new one: nothing is in memory
        runner = _runner(tmp_path, monkeypatch, {"max_draft_tokens": 3, "drafts_by_mtp": True})
        with capture_logs() as logs:
            runner.capture(num_compile_threads=2)
        events = [line["event"] for line in logs if "kernels" in line["event"]]
        assert sorted(set(events)) == expected
        assert runner._graphs is not None
        assert runner._drafter is not None
        num_asked.append(len(keys))
    num_kernels = len(set(keys))
    # The one that was missed, all of them ahead, and all of them for the capture.
    assert num_asked == [1 + 2 * num_kernels, 1 + 3 * num_kernels]
