"""A Hopper GPU that compiles kernels and runs none: tensors are in host memory, launches are only counted."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_NUM_MULTIPROCESSORS, _SHARED_MEMORY_BYTES = 132, 227 * 1024
# Triton keeps what it knows of a kernel by device; no two tests share one.
_DEVICE_IDS = itertools.count(1000)


class PretendDriver:
    """What `triton.runtime.driver.active` is asked for, for compute capability 9.0."""

    def __init__(self) -> None:
        self._device_id = next(_DEVICE_IDS)
        self.utils = self
        self.num_launches = 0
        # (kernel, signature) of the launchers made.
        self.launchers: list[str] = []

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self._device_id

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        self.launchers.append(source.name)
        return self._launch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_MEMORY_BYTES}

    def load_binary(self, name: str, binary: bytes, num_bytes: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def _launch(self, *args: Any) -> None:
        self.num_launches += 1


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> PretendDriver:
    """Let kernels take tensors in host memory, as Hopper's would, and compile into `cache_dir`."""
    from triton.runtime.driver import driver

    import kiln_nn.kernels as kernels
    from kiln_nn.kernels.dispatch import DeviceLimits

    pretended = PretendDriver()
    monkeypatch.setattr(driver, "_active", pretended)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache_dir))
    for module in pkgutil.walk_packages(kernels.__path__, "kiln_nn.kernels."):
        importlib.import_module(module.name)
    limits = DeviceLimits(_NUM_MULTIPROCESSORS, _SHARED_MEMORY_BYTES)
    answers: dict[str, Callable[..., Any]] = {
        "_are_on_gpu": lambda *tensors: True,
        "device_limits": lambda device: limits,
        "has_hopper_kernel": lambda device: True,
        "supports_dependent_launch": lambda device: True,
        # The library's product, for which there is none on a CPU.
        "_has_row_scaled_product": lambda device: False,
    }
    for name, module in list(sys.modules.items()):
        if name.startswith("kiln_nn.kernels"):
            for function, answer in answers.items():
                if function in vars(module):
                    monkeypatch.setattr(module, function, answer)
    return pretended


def compiled_files(cache_dir: Path) -> dict[str, bytes]:
    """Machine code by cache key and file name."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in cache_dir.rglob("*.cubin")}
