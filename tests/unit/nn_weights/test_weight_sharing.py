"""Two processes, one copy of the weights: what the reader sees, may not do, and learns of the other's end."""

import faulthandler
import fcntl
import mmap
import os
import signal
import socket
import threading

import pytest
import torch

from kiln_nn.errors import ShareRefused
from kiln_nn.sharing import WeightServer, attach, wait_for_old_leases, wire
from kiln_nn.weights import load_checkpoint
from tests.support.tiny_models import make_checkpoint
from tests.support.weight_owner import OwnerProcess
from tests.support.weight_reader import ReaderProcess

WAIT_S = 60.0
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def model(tmp_path):
    make_checkpoint(tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", boot_id="boot-1")
    yield loaded
    loaded.arena.close()


@pytest.fixture
def socket_path(tmp_path):
    return tmp_path / "private" / "weights.sock"


def test_second_process_reads_the_same_bytes_and_allocates_none(tmp_path, socket_path):
    # 40 MB, so that a copy would stand out from whatever else a process allocates.
    make_checkpoint(
        tmp_path / "big",
        vocab_size=10_000,
        hidden_size=1024,
        num_mtp_layers=0,
        layer_types=("full_attention",),
    )
    big = load_checkpoint(tmp_path / "big")
    with WeightServer(big.arena, socket_path) as server, ReaderProcess(socket_path) as reader:
        seen = reader.ask("attach")
        assert seen["checksum"] == big.arena.checksum()
        assert seen["boot_id"] == big.manifest.boot_id
        assert seen["foreign_bytes"] == 0
        assert seen["view_bytes"] > 40e6
        assert seen["host_growth"] < 8e6
        table = big.arena.views()[EMBEDDING].double()
        assert reader.ask(f"product {EMBEDDING}")["product"] == pytest.approx(
            (table @ table.sum(dim=0)).sum().item()
        )
        assert server.num_leases == 1


def test_writing_kills_the_writer_and_nobody_else(model, socket_path):
    checksum = model.arena.checksum()
    with WeightServer(model.arena, socket_path) as server, ReaderProcess(socket_path) as reader:
        reader.ask("attach")
        reader.send(f"write {EMBEDDING}")
        assert reader.process.wait(timeout=WAIT_S) == -signal.SIGSEGV
        assert server.wait_for_leases(0, WAIT_S)
        assert model.arena.checksum() == checksum
        with attach(socket_path) as again:  # and the server serves on
            assert again.checksum() == checksum


def test_the_owner_itself_cannot_write(model):
    """An arena's tensors are the pages that fault, also in the engine that loaded them."""
    checksum = model.arena.checksum()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        model.arena.views()[EMBEDDING][0, 0] = 1.0
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV
    assert model.arena.checksum() == checksum


def test_sealed_memory_takes_no_writer_at_all(model):
    fd, nbytes = model.arena.memory.fd, model.manifest.nbytes
    with pytest.raises(PermissionError):
        mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"\0", 0)
    for size in (nbytes - 1, nbytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_killed_reader_ends_its_lease(model, socket_path):
    counts, has_ended = [], threading.Event()

    def on_leases_changed(num_leases):
        counts.append(num_leases)
        if num_leases == 0:
            has_ended.set()

    with (
        WeightServer(model.arena, socket_path, on_leases_changed) as server,
        ReaderProcess(socket_path) as reader,
    ):
        reader.ask("attach")
        assert server.num_leases == 1
        assert not wait_for_old_leases(socket_path, timeout_s=0)
        reader.kill()
        assert has_ended.wait(WAIT_S)
        assert counts == [1, 0]
        assert wait_for_old_leases(socket_path, timeout_s=WAIT_S)


def test_reader_learns_that_the_engine_is_gone_and_keeps_its_mapping(model, socket_path):
    checksum = model.arena.checksum()
    server = WeightServer(model.arena, socket_path)
    with ReaderProcess(socket_path) as reader, attach(socket_path) as near:
        reader.ask("attach")
        assert reader.ask("alive")["is_alive"] is True
        assert near.is_alive()
        server.close()
        model.arena.close()
        assert reader.ask("alive")["is_alive"] is False
        assert not near.is_alive()
        assert near.checksum() == checksum  # the old arena lives while somebody maps it
    assert not socket_path.exists()


def test_reader_of_a_killed_engine_attaches_to_the_next(tmp_path, socket_path):
    make_checkpoint(tmp_path / "model")
    boot_ids = set()
    with ReaderProcess(socket_path) as reader:
        for _ in range(2):
            with OwnerProcess(tmp_path / "model", socket_path, "cpu", "vmm") as owner:
                seen = reader.ask("attach")
                assert seen["checksum"] == owner.started["checksum"]
                boot_ids.add(seen["boot_id"])
                owner.kill()
                assert reader.ask("alive")["is_alive"] is False
                assert reader.ask("checksum")["checksum"] == seen["checksum"]
                assert not wait_for_old_leases(socket_path, timeout_s=0)
                reader.ask("close")
                assert wait_for_old_leases(socket_path, timeout_s=WAIT_S)
    assert len(boot_ids) == 2


def test_views_keep_the_mapping_after_close(model, socket_path):
    with WeightServer(model.arena, socket_path) as server:
        shared = attach(socket_path)
        table = shared.views()[EMBEDDING]
        shared.close()
        shared.close()
        assert not shared.is_alive()
        assert server.wait_for_leases(0, WAIT_S)
        assert torch.equal(table, model.arena.views()[EMBEDDING])


def test_several_readers_are_several_leases(model, socket_path):
    with WeightServer(model.arena, socket_path) as server:
        first, second = attach(socket_path), attach(socket_path, expected_boot_id="boot-1")
        assert server.wait_for_leases(2, WAIT_S)
        first.close()
        assert server.wait_for_leases(1, WAIT_S)
        assert second.is_alive()
        second.close()
        assert server.wait_for_leases(0, WAIT_S)


def test_another_boot_is_refused_and_leaves_no_lease(model, socket_path):
    with WeightServer(model.arena, socket_path) as server:
        with pytest.raises(ShareRefused, match=r"boot-1.*boot-2"):
            attach(socket_path, expected_boot_id="boot-2")
        assert server.wait_for_leases(0, WAIT_S)
        assert wait_for_old_leases(socket_path, timeout_s=0)


def test_peer_of_another_user_is_refused():
    wire.check_peer(os.getuid())
    with pytest.raises(ShareRefused, match=f"uid {os.getuid() + 1}"):
        wire.check_peer(os.getuid() + 1)


def test_peer_uid_is_the_kernels_word():
    left, right = socket.socketpair()
    with left, right:
        assert wire.peer_uid(left) == os.getuid()


def test_refusal_reaches_the_reader(model, socket_path, monkeypatch):
    # Only the server's view of the peer is changed: the reader's own check of the server still passes.
    monkeypatch.setattr("kiln_nn.sharing.server.peer_uid", lambda connection: os.getuid() + 7)
    with WeightServer(model.arena, socket_path) as server:
        with pytest.raises(ShareRefused, match=f"the peer runs as uid {os.getuid() + 7}"):
            attach(socket_path)
        assert server.num_leases == 0


@pytest.mark.parametrize("reads_nothing_for_long", [False, True])
def test_peer_that_breaks_off_the_handover_holds_nothing(
    model, socket_path, monkeypatch, reads_nothing_for_long
):
    counts, has_ended = [], threading.Event()

    def on_leases_changed(num_leases):
        counts.append(num_leases)
        if num_leases == 0:
            has_ended.set()

    monkeypatch.setattr("kiln_nn.sharing.server.HANDOVER_TIMEOUT_S", 0.05)
    with WeightServer(model.arena, socket_path, on_leases_changed) as server:
        server._message["padding"] = "x" * 10_000_000  # more than a socket buffers
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(socket_path))
            if not reads_nothing_for_long:
                peer.close()
            assert has_ended.wait(WAIT_S)
        assert counts == [1, 0]
        del server._message["padding"]
        with attach(socket_path) as shared:
            assert shared.is_alive()


def test_unsealed_memory_is_not_mapped(tmp_path, model, socket_path, monkeypatch):
    impostor = os.memfd_create("impostor", os.MFD_ALLOW_SEALING)
    os.ftruncate(impostor, model.manifest.nbytes)
    monkeypatch.setattr(model.arena.memory, "fd", impostor)
    with (
        WeightServer(model.arena, socket_path),
        pytest.raises(ShareRefused, match="not sealed"),
    ):
        attach(socket_path)
    monkeypatch.undo()
    os.close(impostor)


def test_nobody_serving_is_said_plainly(tmp_path):
    with pytest.raises(ShareRefused, match="no engine serves"):
        attach(tmp_path / "weights.sock")


def test_open_directory_is_refused(model, tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ShareRefused, match="mode 755"):
        WeightServer(model.arena, tmp_path / "open" / "weights.sock")


def test_live_server_keeps_its_path_and_a_dead_ones_is_taken_over(model, socket_path):
    with WeightServer(model.arena, socket_path):
        with pytest.raises(ShareRefused, match="another engine"):
            WeightServer(model.arena, socket_path)
        with attach(socket_path) as shared:
            assert shared.is_alive()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(socket_path))  # a killed engine leaves its socket file behind
    with WeightServer(model.arena, socket_path), attach(socket_path) as shared:
        assert shared.manifest == model.manifest


def test_long_paths_are_served(model, tmp_path):
    deep = tmp_path / ("d" * 100) / "private" / "weights.sock"
    with WeightServer(model.arena, deep), attach(deep) as shared:
        assert shared.manifest.boot_id == "boot-1"


def test_private_directory_is_made(model, socket_path):
    with WeightServer(model.arena, socket_path):
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700
