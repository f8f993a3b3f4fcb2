"""The handover over a private Unix socket: one framed JSON message, perhaps with a descriptor.

The server speaks first and only once: four bytes of length, then either
`{"manifest": ..., "cuda_ipc_handle": hex or null}` or `{"error": message}`. From then on the open
connection is the lease: each side learns of the other's end by its closing.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kiln_nn.errors import ShareRefused

HANDOVER_TIMEOUT_S = 10.0
_MAX_MESSAGE_BYTES = 64 << 20
_MAX_ADDRESS_BYTES = 107
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid as Linux's struct ucred


def prepare_directory(socket_path: Path) -> None:
    """Make the socket's directory, for this user alone.

    Raises:
        ShareRefused: it exists and belongs to someone else or is open to others.
    """
    folder = socket_path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise ShareRefused(f"{folder} belongs to uid {status.st_uid}, not to uid {os.getuid()}")
    if status.st_mode & 0o077:
        raise ShareRefused(
            f"{folder} has mode {status.st_mode & 0o777:o}, the weights need a directory of mode 700"
        )


@contextmanager
def socket_address(socket_path: Path) -> Iterator[str]:
    """An address for bind or connect, however long the path: the kernel takes only so many bytes of one."""
    if len(os.fsencode(socket_path)) <= _MAX_ADDRESS_BYTES:
        yield str(socket_path)
        return
    folder_fd = os.open(socket_path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder_fd}/{socket_path.name}"
    finally:
        os.close(folder_fd)


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end, as the kernel saw it when the connection was made."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def check_peer(uid: int) -> None:
    """Weights pass only between processes of one user.

    Raises:
        ShareRefused: the peer is another user.
    """
    if uid != os.getuid():
        raise ShareRefused(f"the peer runs as uid {uid}, this process as uid {os.getuid()}")


def send_message(connection: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Send one message; a descriptor travels with its first bytes."""
    body = json.dumps(message, separators=(",", ":")).encode()
    frame = memoryview(_LENGTH.pack(len(body)) + body)
    num_sent = 0 if fd is None else socket.send_fds(connection, [frame], [fd])
    if num_sent < len(frame):  # sending nothing fails where the peer has answered and gone
        connection.sendall(frame[num_sent:])


def receive_message(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """Receive one message and the descriptor that came with it, which the caller must close.

    Raises:
        ShareRefused: the server closed early or sent something else.
    """
    first, fds, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    fd = fds[0] if fds else None
    try:
        buffer = bytearray(first)
        while len(buffer) < _LENGTH.size:
            buffer += _receive_some(connection)
        (num_bytes,) = _LENGTH.unpack_from(buffer)
        if num_bytes > _MAX_MESSAGE_BYTES:
            raise ShareRefused(f"the server announced a message of {num_bytes} bytes")
        while len(buffer) < _LENGTH.size + num_bytes:
            buffer += _receive_some(connection)
        message = json.loads(buffer[_LENGTH.size :])
        if not isinstance(message, dict):
            raise ShareRefused("the server's message is not an object")
    except ValueError as error:
        _close(fd)
        raise ShareRefused(f"the server's message is malformed: {error}") from error
    except BaseException:
        _close(fd)
        raise
    return message, fd


def _receive_some(connection: socket.socket) -> bytes:
    part = connection.recv(1 << 20)
    if not part:
        raise ShareRefused("the server closed the connection before handing over the weights")
    return part


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
