"""The engine's side of an adapter's handover: takes sealed bytes from processes of the same user.

A client sends one message, `{"name", "config_json", "nbytes"}`, and with it the descriptor of a memfd
that holds adapter_model.safetensors and is sealed against writing; it gets one back, `{"sha256"}` of
what was taken or `{"error", "code"}`. Nothing can change between the engine's hash and its copy.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kiln_nn.errors import ShareRefused
from kiln_nn.sharing.server import listen, unlink_own
from kiln_nn.sharing.wire import HANDOVER_TIMEOUT_S, check_peer, peer_uid, receive_message, send_message
from kiln_nn.weights.host_memory import check_sealed, map_readonly

log = logging.getLogger(__name__)

_MOST_BYTES = 8 << 30


@dataclass(frozen=True)
class HandedAdapter:
    """An adapter as it was handed over; the bytes stay as they are."""

    name: str
    config_json: str
    content: memoryview


class AdapterRefused(Exception):
    """What `take` raises to answer with a code."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class AdapterInbox:
    """Listens on a Unix socket in a directory of mode 700; serves one client at a time on its own thread.

    Raises:
        ShareRefused: the directory is not private, or another engine serves on that path.
    """

    def __init__(self, socket_path: str | Path) -> None:
        self.socket_path = Path(socket_path)
        self._listener, self._inode = listen(self.socket_path)
        self._waker, self._woken = socket.socketpair()
        self._thread: threading.Thread | None = None

    def serve(self, take: Callable[[HandedAdapter], str]) -> None:
        """Give each adapter to `take`, on this inbox's thread; it returns the sha256 of the bytes.

        It may raise AdapterRefused.
        """
        self._thread = threading.Thread(target=self._run, args=(take,), name="adapter-inbox", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take nothing more. Idempotent."""
        self._waker.close()
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        self._woken.close()
        unlink_own(self.socket_path, self._inode)

    def _run(self, take: Callable[[HandedAdapter], str]) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while all(key.fileobj is self._listener for key, _ in selector.select()):
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    continue  # the peer gave up between connecting and now
                with connection:
                    connection.settimeout(HANDOVER_TIMEOUT_S)
                    try:
                        send_message(connection, _answer(connection, take))
                    except OSError:
                        continue  # gone or stuck; it will publish without us


def _answer(connection: socket.socket, take: Callable[[HandedAdapter], str]) -> dict[str, str]:
    try:
        check_peer(peer_uid(connection))
        return {"sha256": take(_receive(connection))}
    except ShareRefused as error:
        return {"error": str(error), "code": error.code}
    except AdapterRefused as error:
        return {"error": str(error), "code": error.code}
    except Exception as error:  # one message must not end the inbox
        log.exception("an adapter could not be taken")
        return {"error": f"the adapter could not be taken: {error}", "code": "internal"}


def _receive(connection: socket.socket) -> HandedAdapter:
    message, fd = receive_message(connection)
    if fd is None:
        raise ShareRefused("the adapter came without its descriptor")
    try:
        name, config_json, nbytes = (message.get(key) for key in ("name", "config_json", "nbytes"))
        if not isinstance(name, str) or not isinstance(config_json, str) or type(nbytes) is not int:
            raise ShareRefused("the message that came with the adapter is malformed")
        if not 0 < nbytes <= _MOST_BYTES:
            raise ShareRefused(f"the adapter has {nbytes} bytes")
        check_sealed(fd, nbytes)
        return HandedAdapter(name, config_json, map_readonly(fd, nbytes).numpy().data)
    finally:
        os.close(fd)  # the mapping needs it no more
