"""The engine's side of weight sharing: hands the arena to processes of the same user, counts leases."""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from kiln_nn.errors import ShareRefused
from kiln_nn.sharing.wire import (
    HANDOVER_TIMEOUT_S,
    check_peer,
    peer_uid,
    prepare_directory,
    send_message,
    socket_address,
)
from kiln_nn.weights.arena import WeightArena
from kiln_nn.weights.cuda_memory import CudaMemory


class WeightServer:
    """Serves one arena on a Unix socket in a directory of mode 700, from its own thread.

    Close the server before the arena.
    A connection is a lease: it lasts until the reader closes it or dies, or this server closes.
    `on_leases_changed(num_leases)` is called from the server's thread and must be quick.

    Raises:
        ShareRefused: the directory is not private, or another engine serves on that path.
    """

    def __init__(
        self,
        arena: WeightArena,
        socket_path: str | Path,
        on_leases_changed: Callable[[int], None] | None = None,
    ) -> None:
        self.socket_path = Path(socket_path)
        self._memory = arena.memory
        self._message = {
            "manifest": arena.manifest.to_json(),
            "cuda_ipc_handle": arena.memory.ipc_handle().hex()
            if isinstance(arena.memory, CudaMemory)
            else None,
        }
        self._on_leases_changed = on_leases_changed
        self._changed = threading.Condition()
        self._leases: set[socket.socket] = set()
        self._is_closed = False
        self._listener, self._inode = listen(self.socket_path)
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="weight-server", daemon=True)
        self._thread.start()

    @property
    def num_leases(self) -> int:
        """Readers attached at this moment."""
        with self._changed:
            return len(self._leases)

    def wait_for_leases(self, num_leases: int, timeout_s: float) -> bool:
        """Wait, bounded, until exactly so many readers are attached; whether that came true."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._leases) == num_leases, timeout_s)

    def close(self) -> None:
        """Stop serving and end every lease; readers see `is_alive()` turn false. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
        self._waker.close()  # the loop wakes up, ends all leases and returns
        self._thread.join()

    def __enter__(self) -> WeightServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._is_closed:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif key.fileobj is not self._woken:
                        self._read_lease(selector, key.fileobj)  # type: ignore[arg-type]
        self._listener.close()
        self._woken.close()
        unlink_own(self.socket_path, self._inode)
        for connection in tuple(self._leases):
            connection.close()
        self._set_leases(set())

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # the peer gave up between connecting and now
        connection.settimeout(HANDOVER_TIMEOUT_S)
        try:
            self._refuse_strangers(connection)
        except (OSError, ShareRefused):
            connection.close()
            return
        # Counted before the message leaves, so that whoever is attached has been counted.
        self._set_leases(self._leases | {connection})
        fd = self._memory.fd  # a legacy handle travels in the message
        try:
            send_message(connection, self._message, fd if fd >= 0 else None)
        except OSError:  # gone or stuck in the middle
            connection.close()
            self._set_leases(self._leases - {connection})
            return
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)

    def _refuse_strangers(self, connection: socket.socket) -> None:
        try:
            check_peer(peer_uid(connection))
        except ShareRefused as refusal:
            send_message(connection, {"error": str(refusal)})
            raise

    def _read_lease(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            is_open = bool(connection.recv(4096))  # readers have nothing to say; it is discarded
        except BlockingIOError:
            is_open = True
        except OSError:
            is_open = False
        if not is_open:
            selector.unregister(connection)
            connection.close()
            self._set_leases(self._leases - {connection})

    def _set_leases(self, leases: set[socket.socket]) -> None:
        with self._changed:
            has_changed = len(leases) != len(self._leases)
            self._leases = leases
            self._changed.notify_all()
        if has_changed and self._on_leases_changed:
            self._on_leases_changed(len(leases))


def listen(socket_path: Path) -> tuple[socket.socket, int]:
    """A listening socket on that path, and the inode by which to know it again."""
    prepare_directory(socket_path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_address(socket_path) as address:
            if socket_path.is_socket():
                _remove_stale(socket_path, address)
            listener.bind(address)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener, socket_path.stat().st_ino


def _remove_stale(socket_path: Path, address: str) -> None:
    """Remove the socket of an engine that is gone.

    Raises:
        ShareRefused: somebody still answers on it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            socket_path.unlink(missing_ok=True)
        else:
            raise ShareRefused(f"another engine serves its weights on {socket_path}")


def unlink_own(socket_path: Path, inode: int) -> None:
    """Remove the socket file unless a successor has already put its own there."""
    try:
        if os.stat(socket_path).st_ino == inode:
            socket_path.unlink()
    except FileNotFoundError:
        pass
