"""Compiles what a series of launches needs on many cores, before the first of them is made.

Triton compiles a kernel when it is first launched, on the thread that launches it. Here the launches are
gone through once without any being made: each hands its kernel to a pool of threads, and what the threads
leave is Triton's own cache on disk, by Triton's own names. Nothing is kept in memory. Whoever launches
afterwards finds in that cache what it would have compiled, or compiles what is missing there, as ever: this
can cost a start its time, but changes no kernel and no launch.

Threads are enough because the passes of MLIR and LLVM release Python's lock, and ptxas and the C compiler
(launchers, up to Triton 3.6) are processes of their own; docs/decisions/0017 has the shares.

Reaches into `JITFunction` (`run`, `_do_compile`, `device_caches`) as Triton 3.6 and 3.7 have it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_PROGRESS_INTERVAL_S = 2.0
# Longer than any kernel takes, on a busy machine too.
_MOST_STALLED_S = 300.0
_FRONT_END = threading.Lock()


class KernelNotCompiled(Exception):
    """A kernel was in no cache when it was launched; now it is compiled, and was not launched."""


class CompilingStalled(Exception):
    """No kernel was finished for so long that the threads must be waiting for something else."""


@dataclass(frozen=True)
class CompiledAhead:
    """How many kernels were wanted, and what the compiler raised for some of them."""

    num_kernels: int
    seconds: float
    errors: tuple[BaseException, ...]


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def stopping_at_missing_kernels() -> Iterator[None]:
    """Let a launch inside that finds its kernel in no cache raise once it is compiled, instead of launching.

    Launches into a CUDA graph are let be: a capture does not survive an error.

    Raises:
        KernelNotCompiled: from such a launch.
    """
    from triton import knobs

    def stop(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit and not torch.cuda.is_current_stream_capturing():
            raise KernelNotCompiled(src.name)

    listener = knobs.compilation.listener
    knobs.compilation.listener = stop
    try:
        yield
    finally:
        knobs.compilation.listener = listener


def compile_ahead(
    launch_all: Callable[[], None],
    num_threads: int,
    progress: Callable[[int, int], None] = lambda num_done, num_kernels: None,
) -> CompiledAhead:
    """Compile the kernels that `launch_all` launches, none of which runs; on this thread only.

    What else `launch_all` does, happens. Memory that it allocates without a value is zeros, so that numbers
    which no kernel has written are in range wherever they are used as an index. `progress` is called every
    few seconds with kernels done and kernels wanted.

    Raises:
        CompilingStalled: no kernel was finished for minutes.
        Whatever `launch_all` raises, when what it has launched before is compiled.
    """
    started_s = time.monotonic()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="compile")
    futures: list[Future[None]] = []
    try:
        with _submitting_launches(pool, futures), _ZeroedMemory():
            launch_all()
    finally:
        try:
            _wait_for_all(futures, progress)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    failed = tuple(error for each in futures if (error := each.exception()) is not None)
    return CompiledAhead(len(futures), time.monotonic() - started_s, failed)


def _wait_for_all(futures: list[Future[None]], progress: Callable[[int, int], None]) -> None:
    """Raises CompilingStalled."""
    left, moved_s = set(futures), time.monotonic()
    told_s = moved_s
    while left:
        done, left = wait(left, timeout=_PROGRESS_INTERVAL_S, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        if done:
            moved_s = now
        elif now - moved_s > _MOST_STALLED_S:
            raise CompilingStalled(
                f"{len(left)} kernels are left, none was finished for {now - moved_s:.0f} s"
            )
        if now - told_s >= _PROGRESS_INTERVAL_S:
            told_s = now
            progress(len(futures) - len(left), len(futures))


@contextmanager
def _submitting_launches(pool: ThreadPoolExecutor, futures: list[Future[None]]) -> Iterator[None]:
    """Make this thread's launches submit their kernels, each once, and do nothing else."""
    from triton.runtime.jit import JITFunction

    thread = threading.get_ident()
    run, do_compile = JITFunction.run, JITFunction._do_compile
    submitted: list[tuple[dict[str, Any], str]] = []

    def look_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if threading.get_ident() != thread:
            return run(kernel, *args, grid=grid, warmup=warmup, **options)
        return run(kernel, *args, grid=grid, warmup=True, **options)

    def submit(
        kernel: Any,
        key: str,
        signature: Any,
        device: int,
        constants: Any,
        options: Any,
        attributes: Any,
        warmup: bool,
    ) -> Any:
        if threading.get_ident() != thread:
            return do_compile(kernel, key, signature, device, constants, options, attributes, warmup)
        in_memory, _, target, *_ = kernel.device_caches[device]
        source = kernel.ASTSource(kernel, signature, constants, attributes)
        source.hash()  # hashes the kernel's text once, here: the threads only read it
        _take_turns(source)
        future = pool.submit(_compile, kernel.compile, source, target, dict(options.__dict__))
        futures.append(future)
        # Found here by the next such launch; what is launched for real must not find it.
        in_memory[key] = future
        submitted.append((in_memory, key))
        return future

    JITFunction.run, JITFunction._do_compile = look_up, submit
    try:
        yield
    finally:
        JITFunction.run, JITFunction._do_compile = run, do_compile
        for in_memory, key in submitted:
            in_memory.pop(key, None)


def _take_turns(source: Any) -> None:
    """Let one thread at a time go from Python's syntax tree to the first IR.

    Triton's front end is not made for several: functions that kernels share are parsed in place. It
    holds Python's lock nearly all the time, so that little is lost.
    """
    make_ir = source.make_ir

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        with _FRONT_END:
            return make_ir(*args, **kwargs)

    source.make_ir = in_turn


def _compile(compile_kernel: Callable[..., Any], source: Any, target: Any, options: dict[str, Any]) -> None:
    """Leave the kernel and its launcher in Triton's cache on disk."""
    from triton.runtime.driver import driver

    compiled = compile_kernel(source, target=target, options=options)
    driver.active.launcher_cls(compiled.src, compiled.metadata)


class _ZeroedMemory(torch.overrides.TorchFunctionMode):
    """New tensors without values have zeros."""

    _EMPTY = (
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in self._EMPTY else made
