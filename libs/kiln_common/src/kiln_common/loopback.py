"""Addresses that only this machine can reach."""

from __future__ import annotations

from ipaddress import ip_address

# Host names a browser cannot be led to from elsewhere by DNS.
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether a server on `host`, a name or an address, is out of reach of other machines."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
