"""Running Triton kernels in tests: in the interpreter, on a GPU, and through the compiler alone.

A test marked `@on_triton` runs natively on a GPU, and again in the interpreter in a second
process, started by a test of the same file that calls `run_under_interpreter(__file__)`:
Triton must see TRITON_INTERPRET before it is imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
# What is compiled for 8.6, which has the least shared memory, is what 8.0 and 8.9 get, but where a configuration
# follows the memory (8.0) and where there are E4M3 numbers (8.9).
CAPABILITIES = (86, 90)
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")
only_outside_interpreter = pytest.mark.skipif(INTERPRETED, reason="compiles, or starts the interpreter")


def on_triton(test: Callable) -> Callable:
    """Mark a test that launches kernels."""
    if INTERPRETED:
        return test
    needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(needs_gpu(test))


def starts_interpreter(test: Callable) -> Callable:
    """Mark the test that calls `run_under_interpreter`: those in there have a time limit each, it has none."""
    return pytest.mark.timeout(0)(only_outside_interpreter(needs_triton(test)))


def run_under_interpreter(file: str) -> None:
    """Run a test file's kernels in Triton's interpreter, in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`‖actual - expected‖ / ‖expected‖` in float64; infinite where `actual` is not finite."""
    if not actual.isfinite().all():
        return float("inf")
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `Tensor.new_empty` hand out NaN, so that what a kernel does not write is seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        memory = new_empty(self, *args, **options)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


class _Everything:
    def __contains__(self, operation: object) -> bool:
        return True


def trust_backward_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let public functions take every backward kernel, as they will once all have passed on a GPU."""
    monkeypatch.setattr("kiln_nn.kernels.dispatch.PROVEN_BACKWARD", _Everything())


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one GPU."""

    name: str
    capability: int
    shared_memory_bytes: int
    cubin: bytes

    @property
    def spilled_bytes(self) -> int:
        """What a thread keeps in memory because its registers do not hold it."""
        from triton import knobs

        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack, local = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", usage)[0]
        return int(stack) + int(local)


@contextmanager
def compiling_instead_of_launching(capabilities: tuple[int, ...] = CAPABILITIES) -> Iterator[list[Compiled]]:
    """Every kernel launched inside is compiled to machine code for these GPUs and not run."""
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        for capability in capabilities:
            compiled.append(_compile(kernel, args, dict(options), capability))

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch


def _compile(kernel: Any, args: tuple, options: dict[str, Any], capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    named = dict(zip(kernel.arg_names, args, strict=False))
    named.update({name: options.pop(name) for name in list(options) if name in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        kind, is_aligned = _specialise(value, parameter.is_constexpr)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif is_aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return Compiled(kernel.fn.__name__, capability, binary.metadata.shared, binary.asm["cubin"])


_POINTEE = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def _specialise(value: Any, is_constexpr: bool) -> tuple[str, bool]:
    """Type in the kernel's signature, and whether the compiler may count on 16 dividing it."""
    if is_constexpr or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if hasattr(value, "block_shape"):  # a TensorDescriptor
        return f"tensordesc<{_POINTEE[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, torch.Tensor):
        return "*" + _POINTEE[value.dtype], value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    return "fp32", False
