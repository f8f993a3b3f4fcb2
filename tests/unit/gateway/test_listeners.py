"""The sockets a gateway answers on."""

from __future__ import annotations

import contextlib
import socket

from kiln_gateway.listeners import open_listeners
from kiln_gateway.settings import GatewaySettings


def test_what_a_gateway_sends_leaves_at_once():
    """Else a stream's next event waits in the kernel for the acknowledgement of the one before."""
    settings = GatewaySettings(host="127.0.0.1", port=0, model_path="none")
    with contextlib.ExitStack() as open_sockets:
        (listener,) = map(open_sockets.enter_context, open_listeners(settings))
        open_sockets.enter_context(socket.create_connection(listener.getsockname()))
        accepted = open_sockets.enter_context(listener.accept()[0])
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
