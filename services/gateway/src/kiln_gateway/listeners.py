"""The sockets a gateway answers on: a port, which several may share, and a Unix socket of its own."""

from __future__ import annotations

import socket
from pathlib import Path

from kiln_gateway.settings import GatewaySettings

_BACKLOG = 2048


def open_listeners(settings: GatewaySettings) -> list[socket.socket]:
    """Bound and listening. Raises OSError when an address is taken."""
    flags = socket.AI_PASSIVE
    found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=flags)
    listeners = []
    for family, _, _, _, address in dict.fromkeys(found):
        # Between gateways that share a port the kernel chooses, by a hash of each connection.
        listener = socket.create_server(
            address[:2], family=family, backlog=_BACKLOG, reuse_port=settings.reuse_port
        )
        # What it accepts has it too. asyncio sets it on sockets of its own making alone, and without
        # it an event waits until the client has acknowledged the one before: 40 ms as a rule.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listeners.append(listener)
    if settings.socket_path:
        listeners.append(_unix(Path(settings.socket_path)))
    return listeners


def _unix(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a process that was killed
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    path.chmod(0o700)
    listener.listen(_BACKLOG)
    return listener
