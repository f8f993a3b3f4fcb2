"""The settings of a service that also serves clients from outside, and the server for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from kiln_common.api_keys import KeyRing
from kiln_common.loopback import is_loopback
from kiln_common.rpc.keys import KeyCheck
from kiln_common.rpc.server import RpcServer


class ClientListener(BaseModel):
    """Mixed into a service's settings."""

    client_listen: str = Field(
        "", description="gRPC address for clients from outside, who need a key; empty: none is served"
    )
    api_keys_file: Path | None = Field(
        None, description="the keys of clients from outside: the same file as the gateway's"
    )

    @field_validator("api_keys_file", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or None

    @model_validator(mode="after")
    def _has_keys_for_clients(self) -> Self:
        host = self.client_listen.rpartition(":")[0].strip("[]")
        is_near = not self.client_listen or self.client_listen.startswith("unix:") or is_loopback(host)
        if not is_near and self.api_keys_file is None:
            raise ValueError(
                f"client_listen {self.client_listen} is not loopback and api_keys_file is not set"
            )
        return self


def client_server(settings: ClientListener, scopes: Mapping[str, str]) -> RpcServer | None:
    """The server for clients, not started; None where none is configured. Raises KeysFileUnusable."""
    if not settings.client_listen:
        return None
    check = KeyCheck(KeyRing(file=settings.api_keys_file), scopes)
    return RpcServer(settings.client_listen, key_check=check)
