"""Who is calling, and what the key allows."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request

from kiln_gateway.errors import InvalidApiKey, ScopeMissing
from kiln_gateway.settings import ApiKey, Scope

ALL_SCOPES: frozenset[str] = frozenset({"infer", "train", "admin"})


@dataclass(frozen=True, slots=True)
class Caller:
    """`owner` stands for the key in what the gateway stores; empty where no keys are configured."""

    owner: str
    scopes: frozenset[str]


class Authenticator:
    """Checks bearer keys; keys are compared by hash, all of them, in constant time."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._keys = [(_digest(key.key), frozenset[str](key.scopes)) for key in keys]

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header.

        Raises:
            InvalidApiKey: keys are configured and this is none of them.
        """
        if not self._keys:
            return Caller(owner="", scopes=ALL_SCOPES)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise InvalidApiKey("the request carries no bearer key")
        presented = _digest(token.strip())
        caller = None
        for digest, scopes in self._keys:
            if hmac.compare_digest(digest, presented):
                caller = Caller(owner=digest[:32], scopes=scopes)
        if caller is None:
            raise InvalidApiKey("the bearer key is not known")
        return caller


def require(scope: Scope | None) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency that lets callers with `scope` pass; None lets any known key pass."""

    async def check(request: Request) -> Caller:
        caller = request.app.state.gateway.authenticator.authenticate(_authorization(request))
        if scope is not None:
            require_scope(caller, scope)
        return caller

    return check


def _authorization(request: Request) -> str | None:
    """The Authorization header, or what clients of Anthropic's API send in its place."""
    key = request.headers.get("x-api-key")
    return request.headers.get("authorization") or (f"Bearer {key}" if key else None)


def require_scope(caller: Caller, scope: Scope) -> None:
    """Raises ScopeMissing."""
    if scope not in caller.scopes:
        raise ScopeMissing(f"the key does not carry the scope {scope!r}")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
