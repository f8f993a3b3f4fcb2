"""Mutual TLS between services, for addresses that are not Unix sockets; off unless it is configured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc
from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from kiln_common.settings import ConfigurationError, read_settings


class TlsFileUnreadable(ConfigurationError):
    """A certificate or key that the settings name is not there, or is no PEM file."""

    code = "tls_file_unreadable"
    hint = "KILN_TLS_CERT_FILE, KILN_TLS_KEY_FILE and KILN_TLS_CA_FILE name PEM files this user can read."


class TlsSettings(BaseSettings):
    """Of every service; all three or none. With them a service takes and makes calls only over TLS, with
    certificates of both sides that the authority signed; a certificate names the hosts it is reached under."""

    model_config = SettingsConfigDict(env_prefix="KILN_TLS_", frozen=True)

    cert_file: Path | None = Field(None, description="PEM certificate of this service")
    key_file: Path | None = Field(None, description="its private key")
    ca_file: Path | None = Field(None, description="the authority that signed the services' certificates")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len({self.cert_file is None, self.key_file is None, self.ca_file is None}) > 1:
            raise ValueError("KILN_TLS_CERT_FILE, KILN_TLS_KEY_FILE and KILN_TLS_CA_FILE are set together")
        return self


@dataclass(frozen=True)
class _Certificates:
    cert: bytes
    key: bytes
    ca: bytes


_certificates: _Certificates | None = None


def configure_tls() -> None:
    """Read this process's certificates if there are any; call once, before channels and servers are made.

    Raises:
        TlsFileUnreadable
    """
    global _certificates
    settings = read_settings(TlsSettings)
    if settings.cert_file is None or settings.key_file is None or settings.ca_file is None:
        return
    try:
        _certificates = _Certificates(
            settings.cert_file.read_bytes(), settings.key_file.read_bytes(), settings.ca_file.read_bytes()
        )
    except OSError as error:
        raise TlsFileUnreadable(f"{error.filename} cannot be read: {error.strerror}") from error


def channel_credentials(address: str) -> grpc.ChannelCredentials | None:
    """What a channel to this address needs; None is nothing."""
    if _certificates is None or address.startswith("unix:"):
        return None
    found = _certificates
    return grpc.ssl_channel_credentials(found.ca, private_key=found.key, certificate_chain=found.cert)


def server_credentials(address: str, *, asks_for_certificates: bool) -> grpc.ServerCredentials | None:
    """What a server on this address shows, and whether its callers must show theirs; None is nothing."""
    if _certificates is None or address.startswith("unix:"):
        return None
    return grpc.ssl_server_credentials(
        [(_certificates.key, _certificates.cert)],
        root_certificates=_certificates.ca,
        require_client_auth=asks_for_certificates,
    )
