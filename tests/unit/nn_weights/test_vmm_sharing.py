"""Weights shared by descriptor: the real binding and the real handover, on a driver made of host memory.

The same on a GPU is in tests/kernels/test_cuda_sharing.py.
"""

import faulthandler
import gc
import os
import signal

import pytest
import torch

from kiln_nn.errors import OutOfDeviceMemory, ShareUnsupported
from kiln_nn.sharing import WeightServer, attach
from kiln_nn.weights import cuda_driver, vmm_memory
from kiln_nn.weights.arena import allocate, finish
from kiln_nn.weights.cuda_driver import POSIX_DESCRIPTORS_SUPPORTED, VIRTUAL_MEMORY_SUPPORTED
from kiln_nn.weights.manifest import TensorEntry
from tests.support import fake_cuda
from tests.support.tiny_models import tiny_config

NOT_PERMITTED, OUT_OF_MEMORY, INVALID_VALUE = 800, 2, 1
NUM_ROWS = 9_000  # more than one granule, and not a whole number of them


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return fake_cuda.compile_library(tmp_path_factory.mktemp("fake-cuda"))


@pytest.fixture
def driver(library, monkeypatch):
    fake = fake_cuda.install(monkeypatch, library)
    yield fake
    gc.collect()
    assert fake.num_live == 0, "handles, reservations or mappings were left behind"
    cuda_driver.driver.cache_clear()


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "private" / "weights.sock"


def make_arena():
    nbytes = NUM_ROWS * 64 * 4
    memory = allocate(nbytes, fake_cuda.DEVICE, "vmm")
    memory.writable_u8().copy_(torch.arange(nbytes) % 251)
    entry = TensorEntry("matrix", "own", 0, (NUM_ROWS, 64), (64, 1), "float32")
    try:
        return finish(memory, [entry], "hash", tiny_config(), fake_cuda.DEVICE)
    except ShareUnsupported:
        memory.close()  # as the loader does
        raise


def exit_code_of(function):
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_reader_maps_the_owners_bytes_and_copies_none(driver, socket_path):
    arena = make_arena()
    assert arena.manifest.transport == "cuda_vmm"
    with WeightServer(arena, socket_path) as server, attach(socket_path) as shared:
        assert server.num_leases == 1
        assert shared.manifest == arena.manifest
        assert shared.checksum() == arena.checksum()
        views = shared.views()
        assert shared.num_foreign_bytes(views) == 0
        assert torch.equal(views["matrix"], arena.views()["matrix"])
        assert views["matrix"].data_ptr() != arena.views()["matrix"].data_ptr()
        del views
    arena.close()


@pytest.mark.parametrize("who", ["reader", "owner"])
def test_writing_kills_the_writer_and_changes_nothing(driver, socket_path, who):
    arena = make_arena()
    checksum = arena.checksum()

    def write():
        shared = attach(socket_path) if who == "reader" else arena
        shared.views()["matrix"][0, 0] = 1.0

    with WeightServer(arena, socket_path) as server:
        assert exit_code_of(write) == -signal.SIGSEGV
        assert server.wait_for_leases(0, 20.0)
        assert arena.checksum() == checksum
    arena.close()


def test_memory_lives_while_a_reader_maps_it(driver, socket_path):
    arena = make_arena()
    checksum = arena.checksum()
    with WeightServer(arena, socket_path):
        shared = attach(socket_path)
    arena.close()
    assert shared.checksum() == checksum
    shared.close()


def test_readers_do_not_inherit_descriptors_by_accident(driver):
    arena = make_arena()
    assert not os.get_inheritable(arena.memory.fd)
    fd = arena.memory.fd
    arena.close()
    arena.close()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_what_the_driver_lacks_is_named(driver):
    assert vmm_memory.why_not(fake_cuda.DEVICE) is None
    driver.set_attribute(POSIX_DESCRIPTORS_SUPPORTED, 0)
    assert "POSIX descriptor" in vmm_memory.why_not(fake_cuda.DEVICE)
    driver.set_attribute(VIRTUAL_MEMORY_SUPPORTED, 0)
    assert "virtual memory" in vmm_memory.why_not(fake_cuda.DEVICE)


@pytest.mark.parametrize(
    "name", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemExportToShareableHandle"]
)
def test_a_refusal_of_the_driver_is_told_with_its_name_and_leaves_nothing(driver, name):
    driver.fail(name, NOT_PERMITTED)
    reason = vmm_memory.why_not(fake_cuda.DEVICE)
    assert reason == f"{name} failed with CUDA_ERROR_NOT_PERMITTED (800)"
    with pytest.raises(ShareUnsupported, match=name):
        make_arena()


def test_a_client_of_an_mps_server_knows_it(driver, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not cuda_driver.runs_under_mps(fake_cuda.DEVICE)
    (tmp_path / "control").touch()
    assert cuda_driver.runs_under_mps(fake_cuda.DEVICE)


def test_a_full_gpu_is_no_reason_for_another_transport(driver):
    driver.fail("cuMemCreate", OUT_OF_MEMORY)
    with pytest.raises(OutOfDeviceMemory, match=r"the weights need \d+ bytes on cuda:0"):
        make_arena()


def test_a_reader_that_is_refused_the_descriptor_says_what_to_set(driver, socket_path):
    arena = make_arena()
    with WeightServer(arena, socket_path) as server:
        driver.fail("cuMemImportFromShareableHandle", INVALID_VALUE)
        with pytest.raises(ShareUnsupported, match="cuMemImportFromShareableHandle") as caught:
            attach(socket_path)
        assert "KILN_ENGINE_WEIGHT_TRANSPORT=legacy" in caught.value.hint
        assert server.wait_for_leases(0, 20.0)
    arena.close()
