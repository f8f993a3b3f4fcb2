"""The trainer's side of weight sharing: maps the engine's arena and watches that its engine lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from kiln_nn.errors import CheckpointUnreadable, ShareRefused
from kiln_nn.sharing.leases import take_lease
from kiln_nn.sharing.wire import HANDOVER_TIMEOUT_S, check_peer, peer_uid, receive_message, socket_address
from kiln_nn.weights.arena import ArenaReader
from kiln_nn.weights.cuda_memory import open_ipc
from kiln_nn.weights.device_region import find_device
from kiln_nn.weights.host_memory import check_sealed, map_readonly
from kiln_nn.weights.manifest import Manifest
from kiln_nn.weights.vmm_memory import open_vmm


class SharedWeights(ArenaReader):
    """Another process's arena, mapped here without a copy: views, checksum, and whether it lives.

    A write to a view kills this process on the CPU, and through a descriptor on a GPU; behind a legacy
    handle, reading only is a convention.
    The mapping lasts as long as any view of it, the lease until `close`.
    """

    def __init__(
        self, manifest: Manifest, bytes_u8: torch.Tensor, connection: socket.socket, lease_fd: int
    ) -> None:
        super().__init__(manifest, bytes_u8)
        self._connection = connection
        self._lease_fd = lease_fd

    def is_alive(self) -> bool:
        """Whether the engine that owns these weights still serves them; cheap enough for every step."""
        try:
            return self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False  # reset, or closed on this side

    def close(self) -> None:
        """End the lease and let go of the mapping. Views held elsewhere keep it mapped. Idempotent."""
        self._connection.close()
        self._bytes_u8 = None
        if self._lease_fd >= 0:
            os.close(self._lease_fd)
            self._lease_fd = -1

    def __enter__(self) -> SharedWeights:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def attach(
    socket_path: str | Path, expected_boot_id: str | None = None, timeout_s: float = HANDOVER_TIMEOUT_S
) -> SharedWeights:
    """Map the arena that an engine serves on `socket_path`.

    Raises:
        ShareRefused: nobody serves there, the peer is another user, the engine's boot is not the
            expected one, or the memory is not protected as it must be.
        ShareUnsupported: the weights are on a GPU that this process cannot open.
    """
    path = Path(socket_path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    lease_fd = -1
    try:
        connection.settimeout(timeout_s)
        lease_fd = _connect(connection, path)
        manifest, bytes_u8 = _receive_arena(connection, expected_boot_id)
        connection.setblocking(False)
    except BaseException:
        connection.close()
        if lease_fd >= 0:
            os.close(lease_fd)
        raise
    return SharedWeights(manifest, bytes_u8, connection, lease_fd)


def _connect(connection: socket.socket, path: Path) -> int:
    """Connect to a server of this same user; returns the descriptor that holds the lease."""
    try:
        with socket_address(path) as address:
            connection.connect(address)
        check_peer(peer_uid(connection))
        return take_lease(path)
    except OSError as error:
        raise ShareRefused(f"no engine serves its weights on {path}: {error.strerror or error}") from error


def _receive_arena(connection: socket.socket, expected_boot_id: str | None) -> tuple[Manifest, torch.Tensor]:
    try:
        message, fd = receive_message(connection)
    except OSError as error:
        raise ShareRefused(f"the handover of the weights broke off: {error}") from error
    try:
        if "error" in message:
            raise ShareRefused(f"the engine refused to share its weights: {message['error']}")
        manifest = Manifest.from_json(message.get("manifest", ""))
        if expected_boot_id is not None and manifest.boot_id != expected_boot_id:
            raise ShareRefused(f"the engine's boot is {manifest.boot_id}, {expected_boot_id} was expected")
        if manifest.transport == "cuda_ipc":
            return manifest, _open_device_memory(manifest, message.get("cuda_ipc_handle"))
        if fd is None:
            raise CheckpointUnreadable("the weight manifest came without its descriptor")
        if manifest.transport == "cuda_vmm":
            return manifest, open_vmm(fd, manifest.nbytes, find_device(manifest.device_id))
        check_sealed(fd, manifest.nbytes)
        return manifest, map_readonly(fd, manifest.nbytes)
    finally:
        if fd is not None:
            os.close(fd)  # the mapping needs it no more


def _open_device_memory(manifest: Manifest, handle_hex: object) -> torch.Tensor:
    try:
        handle = bytes.fromhex(str(handle_hex))
    except ValueError as error:
        raise CheckpointUnreadable("the CUDA IPC handle that came with the weights is malformed") from error
    return open_ipc(handle, manifest.nbytes, find_device(manifest.device_id))
