"""Kernels compiled ahead of their launches are those that the launches would have compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_nn.kernels import compile_ahead as module
from kiln_nn.kernels.compile_ahead import (
    CompilingStalled,
    KernelNotCompiled,
    compile_ahead,
    stopping_at_missing_kernels,
)
from kiln_nn.kernels.linear import linear, linear_swiglu
from kiln_nn.kernels.quantised import quantise_rtn
from kiln_nn.kernels.rms_norm import rms_norm
from kiln_nn.kernels.swiglu import swiglu
from tests.support.pretend_gpu import PretendDriver, compiled_files, pretend_gpu
from tests.support.triton_kernels import needs_triton

pytestmark = needs_triton
# Each kernel of `_launches` once, whatever its arguments.
_NUM_KERNELS = 6


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PretendDriver:
    return pretend_gpu(monkeypatch, tmp_path / "cache")


def _launches() -> None:
    """Kernels in Triton and in Gluon, over plain and quantised weights, with pointers and descriptors."""
    x_TI, w_OI = torch.zeros(16, 256).bfloat16(), torch.zeros(128, 256).bfloat16()
    for _ in range(2):
        rms_norm(x_TI, w_OI[0].contiguous(), 1e-6, offset=1.0)
        rms_norm(x_TI[:, :255], w_OI[0, :255], 1e-6, offset=1.0)  # of another width, at other addresses
        swiglu(x_TI, x_TI)
        linear(x_TI, w_OI)
        for scheme in ("fp8", "int4"):
            linear_swiglu(x_TI, quantise_rtn(w_OI, scheme))


def _discard(value: object) -> None:
    pass


def _before_compiling(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """Let the compiler call `act` before it compiles the kernels of a name."""
    import triton.compiler

    compile_kernel = triton.compiler.compile

    def compiling(source: Any, **options: Any) -> Any:
        if source.name == name:
            act()
        return compile_kernel(source, **options)

    monkeypatch.setattr(triton.compiler, "compile", compiling)


@pytest.fixture
def cache_events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(kernel, whether it was in the cache) of every kernel asked of the compiler."""
    from triton import knobs

    events: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        knobs.compilation,
        "listener",
        lambda *, src, cache_hit, **_: events.append((src.name, cache_hit)),
    )
    return events


def test_launches_find_what_was_compiled_ahead_and_it_is_what_they_would_have_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache_events: list[tuple[str, bool]]
):
    gpu = pretend_gpu(monkeypatch, tmp_path / "ahead")
    compiled = compile_ahead(_launches, num_threads=4)
    assert compiled.errors == ()
    assert compiled.num_kernels == _NUM_KERNELS
    assert gpu.num_launches == 0
    assert len(gpu.launchers) == _NUM_KERNELS
    assert [is_cached for _, is_cached in cache_events] == [False] * _NUM_KERNELS
    ahead = compiled_files(tmp_path / "ahead")
    assert len(ahead) == _NUM_KERNELS

    # Afterwards, in this process and in a later one, which has nothing in memory.
    for is_later in (False, True):
        if is_later:
            gpu = pretend_gpu(monkeypatch, tmp_path / "ahead")
        cache_events.clear()
        _launches()
        assert gpu.num_launches == 2 * _NUM_KERNELS
        assert [is_cached for _, is_cached in cache_events] == [True] * _NUM_KERNELS

    pretend_gpu(monkeypatch, tmp_path / "launched")
    _launches()
    assert compiled_files(tmp_path / "launched") == ahead


def test_what_cannot_be_compiled_ahead_is_left_to_its_launch(
    gpu: PretendDriver, monkeypatch: pytest.MonkeyPatch
):
    failures = iter([RuntimeError("no memory for a thread")])

    def fail_once() -> None:
        for error in failures:
            raise error

    _before_compiling(monkeypatch, "_swiglu_kernel", fail_once)
    compiled = compile_ahead(_launches, num_threads=2)
    assert [str(error) for error in compiled.errors] == ["no memory for a thread"]
    assert compiled.num_kernels == _NUM_KERNELS
    _launches()
    assert gpu.num_launches == 2 * _NUM_KERNELS


def test_launches_that_fail_leave_what_came_before_them_compiled(gpu: PretendDriver, tmp_path: Path):
    def launch_and_fail() -> None:
        x_TI = torch.zeros(16, 256).bfloat16()
        swiglu(x_TI, x_TI)
        raise ValueError("a shape that no kernel takes")

    with pytest.raises(ValueError, match="no kernel takes"):
        compile_ahead(launch_and_fail, num_threads=2)
    assert len(compiled_files(tmp_path / "cache")) == 1
    # Launches are launches again.
    swiglu(torch.zeros(16, 256).bfloat16(), torch.zeros(16, 256).bfloat16())
    assert gpu.num_launches == 1


def test_threads_that_wait_for_something_else_are_not_waited_for(
    gpu: PretendDriver, monkeypatch: pytest.MonkeyPatch
):
    is_over = threading.Event()
    _before_compiling(monkeypatch, "_swiglu_kernel", lambda: _discard(is_over.wait()))
    monkeypatch.setattr(module, "_MOST_STALLED_S", 0.0)
    monkeypatch.setattr(module, "_PROGRESS_INTERVAL_S", 0.01)
    x_TI = torch.zeros(16, 256).bfloat16()
    try:
        with pytest.raises(CompilingStalled, match="1 kernels are left"):
            compile_ahead(lambda: _discard(swiglu(x_TI, x_TI)), num_threads=1)
    finally:
        is_over.set()


def test_progress_counts_kernels(gpu: PretendDriver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_PROGRESS_INTERVAL_S", 0.0)
    told: list[tuple[int, int]] = []
    x_TI = torch.zeros(16, 256).bfloat16()

    def launch() -> None:
        swiglu(x_TI, x_TI)
        rms_norm(x_TI, x_TI[0].contiguous(), 1e-6, offset=1.0)

    compile_ahead(launch, 2, lambda num_done, num_kernels: told.append((num_done, num_kernels)))
    assert told == sorted(told)
    assert told[-1] == (2, 2)


def test_memory_that_no_kernel_fills_is_zeros(gpu: PretendDriver):
    made: list[torch.Tensor] = []

    def launch() -> None:
        x_TI = torch.ones(16, 256).bfloat16()
        made.append(swiglu(x_TI, x_TI))
        made.extend((torch.empty(1000), torch.empty_like(x_TI), x_TI.new_empty(7, dtype=torch.int64)))

    with torch.inference_mode():
        assert compile_ahead(launch, num_threads=1).errors == ()
    assert len(made) == 4
    assert not any(tensor.any() for tensor in made)


def test_launches_of_other_threads_are_made(gpu: PretendDriver):
    x_TI = torch.zeros(16, 256).bfloat16()

    def launch() -> None:
        other = threading.Thread(target=swiglu, args=(x_TI, x_TI))
        other.start()
        other.join()

    assert compile_ahead(launch, num_threads=1).num_kernels == 0
    assert gpu.num_launches == 1


def test_a_missing_kernel_stops_the_launches_once_it_is_compiled(
    gpu: PretendDriver, monkeypatch: pytest.MonkeyPatch
):
    # A build of torch without CUDA has no answer.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    x_TI = torch.zeros(16, 256).bfloat16()
    with pytest.raises(KernelNotCompiled, match="_swiglu_kernel"), stopping_at_missing_kernels():
        swiglu(x_TI, x_TI)
    assert gpu.num_launches == 0
    with stopping_at_missing_kernels():
        swiglu(x_TI, x_TI)
    assert gpu.num_launches == 1
    # A launch that a graph records is made whatever it takes.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with stopping_at_missing_kernels():
        rms_norm(x_TI, x_TI[0].contiguous(), 1e-6, offset=1.0)
    assert gpu.num_launches == 2
