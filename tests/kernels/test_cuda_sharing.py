"""The weight arena on a GPU: one allocation, mapped by a second process, never copied.

Needs a CUDA device; everything else about loading and sharing is tested on the CPU.
"""

import pytest
import torch

from kiln_nn.errors import ShareUnsupported
from kiln_nn.sharing import WeightServer, attach
from kiln_nn.weights import load_checkpoint
from kiln_nn.weights.arena import allocate, finish
from kiln_nn.weights.cuda_memory import device_id, find_device
from kiln_nn.weights.manifest import TensorEntry
from tests.support.tiny_models import SHAPES, make_checkpoint, read_tensors, tiny_config
from tests.support.weight_reader import ReaderProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAIT_S = 60.0
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "private" / "weights.sock"


def gibibyte_arena(num_gib):
    """An arena with one random bfloat16 matrix, made without a checkpoint on disk."""
    device = torch.device("cuda", torch.cuda.current_device())
    num_rows = num_gib << 15
    memory = allocate(num_gib << 30, device)
    matrix = memory.writable_u8().view(torch.bfloat16).view(num_rows, 1 << 14)
    matrix.normal_(generator=torch.Generator(device).manual_seed(0))
    entry = TensorEntry("matrix", "own", 0, (num_rows, 1 << 14), (1 << 14, 1), "bfloat16")
    return finish(memory, [entry], "hash", tiny_config(), device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_checkpoint_keeps_its_types_in_one_allocation(tmp_path, shape, dtype):
    make_checkpoint(tmp_path, dtype=dtype, **SHAPES[shape])
    allocated = torch.cuda.memory_allocated()
    loaded = load_checkpoint(tmp_path, device="cuda")
    assert torch.cuda.memory_allocated() - allocated < 4096  # the arena is none of torch's allocator
    views = loaded.arena.views()
    for name, stored in read_tensors(tmp_path).items():
        assert views[name].dtype == stored.dtype
        assert torch.equal(views[name].cpu(), stored)
    assert loaded.arena.num_foreign_bytes(views) == 0
    assert loaded.manifest.device_id == device_id(torch.device("cuda", torch.cuda.current_device()))
    assert loaded.manifest.model_hash == load_checkpoint(tmp_path).manifest.model_hash
    assert loaded.arena.checksum() == load_checkpoint(tmp_path, device="cuda").arena.checksum()


def test_second_process_computes_on_the_same_memory(tmp_path, socket_path):
    make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    loaded = load_checkpoint(tmp_path / "model", device="cuda")
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


def test_attaching_takes_no_device_memory(socket_path):
    arena = gibibyte_arena(num_gib=2)
    with WeightServer(arena, socket_path), ReaderProcess(socket_path) as reader:
        seen = reader.ask("attach")
        assert seen["checksum"] == arena.checksum()
        assert seen["device_growth"] < 64 << 20
    arena.close()


def test_legacy_sharing_is_really_the_same_memory(socket_path):
    """The legacy handle protects nothing: a reader's write shows up here, and the checksum tells."""
    arena = gibibyte_arena(num_gib=1)
    checksum = arena.checksum()
    with WeightServer(arena, socket_path), ReaderProcess(socket_path) as reader:
        reader.ask("attach")
        reader.ask("write matrix")
        assert arena.checksum() != checksum
    arena.close()


def test_reader_sees_the_engine_close(socket_path):
    arena = gibibyte_arena(num_gib=1)
    server = WeightServer(arena, socket_path)
    with ReaderProcess(socket_path) as reader:
        reader.ask("attach")
        server.close()
        assert reader.ask("alive")["is_alive"] is False
        reader.ask("close")
    arena.close()


def test_closed_arena_gives_its_memory_back():
    free_before = torch.cuda.mem_get_info()[0]
    arena = gibibyte_arena(num_gib=4)
    assert free_before - torch.cuda.mem_get_info()[0] >= 4 << 30
    arena.close()
    torch.cuda.empty_cache()
    assert free_before - torch.cuda.mem_get_info()[0] < 1 << 30


def test_own_process_and_unknown_gpus_are_refused(socket_path):
    arena = gibibyte_arena(num_gib=1)
    with WeightServer(arena, socket_path), pytest.raises(ShareUnsupported, match="cuIpcOpenMemHandle"):
        attach(socket_path)
    with pytest.raises(ShareUnsupported, match="GPU-none"):
        find_device("GPU-none")
    arena.close()
