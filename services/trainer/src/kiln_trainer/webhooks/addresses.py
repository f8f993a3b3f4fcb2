"""Which addresses a webhook may go to: decided for the address that is connected to, not for a name."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

import structlog

from kiln_common.errors import InvalidRequest
from kiln_common.pb import trainer_pb2

log = structlog.get_logger()

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str, int], Sequence[Address]]

_MAX_URL_CHARS = 2048
_MIN_SECRET_CHARS, _MAX_SECRET_CHARS = 16, 256
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class InvalidWebhook(InvalidRequest):
    """The webhook's address or secret is of a form that is not used."""

    code = "invalid_webhook"
    hint = "Give an http or https address without a user, and a secret of 16 to 256 characters."


class WebhookAddressRefused(InvalidRequest):
    """The address is private, loopback, link-local or otherwise not of the public internet."""

    code = "webhook_address_refused"
    hint = "Name a public address, or have KILN_TRAINER_WEBHOOK_ALLOWED_NETWORKS list its network."


@dataclass(frozen=True, slots=True)
class Target:
    """Where a webhook goes: the address with a checked number in place of its name."""

    url: str
    host: str  # for the Host header, with the port where it is not the scheme's own
    server_name: str  # the name that a certificate has to have


def resolve(host: str, port: int) -> list[Address]:
    """What the system's resolver says. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))


def checked_target(url: str, allowed: Sequence[Network], resolve: Resolve = resolve) -> Target:
    """Where `url` leads now.

    A name with one address that is refused is refused, whatever its others are.

    Raises:
        InvalidWebhook: it is not such an address.
        WebhookAddressRefused: it leads somewhere that webhooks may not go.
        OSError: the name is not known now.
    """
    scheme, host, port, path = _parts(url)
    addresses = resolve(host, port)
    for address in addresses:
        if not is_allowed(address, allowed):
            # Whoever gave the name is not told what it means inside.
            log.warning("webhook_address_refused", host=host[:200], address=str(address))
            raise WebhookAddressRefused(f"webhooks may not go to {host[:200]}", param="webhook.url")
    if not addresses:
        raise OSError(f"{host} has no address")
    number = f"[{addresses[0]}]" if addresses[0].version == 6 else str(addresses[0])
    shown = f"[{host}]" if ":" in host else host
    header = shown if port == _DEFAULT_PORTS[scheme] else f"{shown}:{port}"
    return Target(urlunsplit((scheme, f"{number}:{port}", path[0], path[1], "")), header, host)


def check_webhook(webhook: trainer_pb2.Webhook, allowed: Sequence[Network]) -> None:
    """Refuse what could never be sent, before the job is accepted; a name not known now may be later.

    Raises:
        InvalidWebhook, WebhookAddressRefused.
    """
    if not _MIN_SECRET_CHARS <= len(webhook.secret) <= _MAX_SECRET_CHARS:
        raise InvalidWebhook(f"the secret has {len(webhook.secret)} characters", param="webhook.secret")
    with contextlib.suppress(OSError):
        checked_target(webhook.url, allowed)


def is_allowed(address: Address, allowed: Sequence[Network]) -> bool:
    """Whether it is of the public internet, or of a network that is allowed; so must be what it wraps."""
    if any(address in network for network in allowed if network.version == address.version):
        return True
    inner = _wrapped(address)
    if inner is not None:
        return is_allowed(inner, allowed)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _wrapped(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for (mapped, 6to4, NAT64)."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _parts(url: str) -> tuple[str, str, int, tuple[str, str]]:
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise InvalidWebhook(f"{url[:200]!r} is no address: {error}", param="webhook.url") from error
    is_plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= _MAX_URL_CHARS
    if not is_plain or parts.scheme not in _DEFAULT_PORTS or not parts.hostname or "@" in parts.netloc:
        raise InvalidWebhook(f"{url[:200]!r} is not an http or https address", param="webhook.url")
    return parts.scheme, parts.hostname, port, (parts.path or "/", parts.query)
