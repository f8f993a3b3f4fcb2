"""A GPU made of host memory: the driver calls of weight sharing run, through the real binding."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kiln_nn.weights import cuda_driver
from kiln_nn.weights.device_region import DeviceRegion

DEVICE = torch.device("cuda", 0)
DEVICE_ID = "GPU-fake"
_SOURCE = Path(__file__).with_name("fake_libcuda.c")


class FakeDriver:
    """The compiled library and its switches."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.fake_reset()

    def set_attribute(self, attribute: int, value: int) -> None:
        self._library.fake_set_attribute(attribute, value)

    def fail(self, name: str, code: int) -> None:
        """Let a driver function return that code from now on."""
        self._library.fake_fail(name.encode(), code)

    @property
    def num_live(self) -> int:
        """Handles, reservations and mappings that were not given back."""
        return int(self._library.fake_num_live())


def compile_library(folder: Path) -> Path:
    """Build the library; skips the test where there is no C compiler or no cuda.h."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if compiler is None or not (include / "cuda.h").is_file():
        pytest.skip("needs a C compiler and NVIDIA's cuda.h, which triton brings")
    library = folder / "libfakecuda.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-isystem{include}"]
    subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(library)], check=True)
    return library


def install(monkeypatch: pytest.MonkeyPatch, library: Path) -> FakeDriver:
    """Put the fake in the driver's place, and torch's few calls around it aside."""
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(library))
    cuda_driver.driver.cache_clear()
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(DeviceRegion, "as_tensor", _host_tensor)
    monkeypatch.setattr("kiln_nn.weights.arena.device_id", lambda device: DEVICE_ID)
    monkeypatch.setattr("kiln_nn.sharing.client.find_device", lambda wanted: DEVICE)
    return FakeDriver(library)


def _host_tensor(region: DeviceRegion) -> torch.Tensor:
    (nbytes,) = region.__cuda_array_interface__["shape"]
    memory = (ctypes.c_uint8 * nbytes).from_address(region.address)
    memory.owner = region  # type: ignore[attr-defined]
    return torch.frombuffer(memory, dtype=torch.uint8)
