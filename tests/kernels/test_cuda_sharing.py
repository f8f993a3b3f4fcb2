"""The weight arena on a GPU: one allocation, mapped by a second process, never copied.

Needs a CUDA device; loading, the handover and the binding are tested on the CPU. Run it without MPS:
there a write to protected memory takes the other processes of the GPU along.
"""

import time

import pytest
import torch

from kiln_nn.errors import ShareUnsupported
from kiln_nn.sharing import WeightServer, attach, wait_for_old_leases
from kiln_nn.weights import load_checkpoint, vmm_memory
from kiln_nn.weights.arena import allocate, finish
from kiln_nn.weights.device_region import device_id, find_device
from kiln_nn.weights.manifest import TensorEntry
from tests.support.tiny_models import SHAPES, make_checkpoint, read_tensors, tiny_config
from tests.support.weight_owner import OwnerProcess
from tests.support.weight_reader import ReaderProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAIT_S = 60.0
EMBEDDING = "model.embed_tokens.weight"
TRANSPORTS = ["vmm", "legacy"]


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "private" / "weights.sock"


def this_device():
    return torch.device("cuda", torch.cuda.current_device())


def gibibyte_arena(num_gib, transport):
    """An arena with one random bfloat16 matrix, made without a checkpoint on disk."""
    num_rows = num_gib << 15
    memory = allocate(num_gib << 30, this_device(), transport)
    matrix = memory.writable_u8().view(torch.bfloat16).view(num_rows, 1 << 14)
    matrix.normal_(generator=torch.Generator(this_device()).manual_seed(0))
    del matrix
    entry = TensorEntry("matrix", "own", 0, (num_rows, 1 << 14), (1 << 14, 1), "bfloat16")
    return finish(memory, [entry], "hash", tiny_config(), this_device())


def wait_for_free_memory(num_bytes):
    """Whether so much becomes free; memory of a process that died comes back a moment later."""
    deadline_s = time.monotonic() + WAIT_S
    while torch.cuda.mem_get_info()[0] < num_bytes:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


def test_descriptors_work_here():
    assert vmm_memory.why_not(this_device()) is None


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_checkpoint_keeps_its_types_in_one_allocation(tmp_path, shape, transport):
    make_checkpoint(tmp_path, dtype=torch.bfloat16, **SHAPES[shape])
    allocated = torch.cuda.memory_allocated()
    loaded = load_checkpoint(tmp_path, device="cuda", transport=transport)
    assert torch.cuda.memory_allocated() - allocated < 4096  # the arena is none of torch's allocator
    views = loaded.arena.views()
    for name, stored in read_tensors(tmp_path).items():
        assert views[name].dtype == stored.dtype
        assert torch.equal(views[name].cpu(), stored)
    assert loaded.arena.num_foreign_bytes(views) == 0
    assert loaded.manifest.device_id == device_id(this_device())
    assert loaded.manifest.model_hash == load_checkpoint(tmp_path).manifest.model_hash
    other = load_checkpoint(tmp_path, device="cuda", transport="legacy")
    assert loaded.arena.checksum() == other.arena.checksum()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_second_process_computes_on_the_same_memory(tmp_path, socket_path, transport):
    make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_checkpoint(tmp_path / "model", device="cuda", transport=transport)
    checksum = loaded.arena.checksum()
    table = loaded.arena.views()[EMBEDDING].double()
    with WeightServer(loaded.arena, socket_path) as server, ReaderProcess(socket_path) as reader:
        seen = reader.ask("attach")
        assert seen["checksum"] == checksum
        assert seen["foreign_bytes"] == 0
        assert seen["torch_growth"] == 0
        product = reader.ask(f"product {EMBEDDING}")["product"]
        assert product == pytest.approx((table @ table.sum(dim=0)).sum().item())
        assert reader.ask("alive")["is_alive"] is True
        reader.kill()
        assert server.wait_for_leases(0, WAIT_S)
        assert loaded.arena.checksum() == checksum


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_attaching_takes_no_device_memory_and_a_killed_reader_leaves_none(socket_path, transport):
    free_before = torch.cuda.mem_get_info()[0]
    arena = gibibyte_arena(2, transport)
    with WeightServer(arena, socket_path) as server, ReaderProcess(socket_path) as reader:
        seen = reader.ask("attach")
        assert seen["checksum"] == arena.checksum()
        assert seen["device_growth"] < 64 << 20
        assert not wait_for_old_leases(socket_path, timeout_s=0)
        reader.kill()
        assert server.wait_for_leases(0, WAIT_S)
        assert wait_for_old_leases(socket_path, timeout_s=WAIT_S)
    arena.close()
    torch.cuda.empty_cache()
    assert wait_for_free_memory(free_before - (256 << 20))


def test_a_write_through_a_descriptor_kills_the_writer_alone(socket_path):
    """The GPU refuses it: the reader dies of an illegal access, the owner computes on."""
    arena = gibibyte_arena(1, "vmm")
    checksum = arena.checksum()
    with WeightServer(arena, socket_path) as server, ReaderProcess(socket_path) as reader:
        reader.ask("attach")
        reader.send("write matrix")
        assert reader.process.wait(WAIT_S) != 0
        assert server.wait_for_leases(0, WAIT_S)
        assert arena.checksum() == checksum
        ones = torch.ones(64, 64, device=this_device())
        assert float((ones @ ones).sum()) == 64.0**3
        with attach(socket_path) as again:  # and the server serves on
            assert again.checksum() == checksum
    arena.close()


def test_a_write_through_a_legacy_handle_shows_in_the_checksum(socket_path):
    """The legacy handle protects nothing: a reader's write shows up here, and the checksum tells."""
    arena = gibibyte_arena(1, "legacy")
    checksum = arena.checksum()
    with WeightServer(arena, socket_path), ReaderProcess(socket_path) as reader:
        reader.ask("attach")
        reader.ask("write matrix")
        assert arena.checksum() != checksum
    arena.close()


def test_a_reader_survives_its_engine_and_attaches_to_the_next(tmp_path, socket_path):
    make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    with ReaderProcess(socket_path) as reader:
        boot_ids = []
        for _ in range(2):
            with OwnerProcess(tmp_path / "model", socket_path, "cuda", "vmm") as owner:
                seen = reader.ask("attach")
                assert seen["checksum"] == owner.started["checksum"]
                boot_ids.append(seen["boot_id"])
                owner.kill()
                assert reader.ask("alive")["is_alive"] is False
                # What it maps stays what it was, for as long as it maps it.
                assert reader.ask("checksum")["checksum"] == seen["checksum"]
                reader.ask("close")
                assert wait_for_old_leases(socket_path, timeout_s=WAIT_S)
        assert boot_ids[0] != boot_ids[1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_closed_arena_gives_its_memory_back(transport):
    free_before = torch.cuda.mem_get_info()[0]
    arena = gibibyte_arena(4, transport)
    assert free_before - torch.cuda.mem_get_info()[0] >= 4 << 30
    arena.close()
    torch.cuda.empty_cache()
    assert free_before - torch.cuda.mem_get_info()[0] < 1 << 30


def test_own_process_and_unknown_gpus_are_refused_by_handle(socket_path):
    arena = gibibyte_arena(1, "legacy")
    with WeightServer(arena, socket_path), pytest.raises(ShareUnsupported, match="cuIpcOpenMemHandle"):
        attach(socket_path)
    with pytest.raises(ShareUnsupported, match="GPU-none"):
        find_device("GPU-none")
    arena.close()
