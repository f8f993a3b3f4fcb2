"""Channels with the limits every Kiln client uses."""

from __future__ import annotations

import grpc

from kiln_common import tracing
from kiln_common.rpc.tls import channel_credentials
from kiln_common.rpc.tracing import context_senders

MAX_MESSAGE_BYTES = 256 * 1024 * 1024

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A restarted service should be found again within a second, not after gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to "host:port" or "unix:/path"; it connects, and reconnects, when it is used."""
    interceptors = context_senders() if tracing.is_on() else None
    credentials = channel_credentials(address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS, interceptors=interceptors)


def open_blocking_channel(address: str) -> grpc.Channel:
    """The same for threads."""
    credentials = channel_credentials(address)
    if credentials is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, credentials, options=CHANNEL_OPTIONS)
