"""What a route asks of its caller: a key with a scope, within the key's limits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request

from kiln_common.api_keys import Caller, Scope, require_scope

__all__ = ["Caller", "require", "require_scope"]


def require(scope: Scope | None) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency that lets callers with `scope` pass; None lets any known key pass.

    A POST counts against the key's limits.
    """

    async def check(request: Request) -> Caller:
        gateway = request.app.state.gateway
        caller: Caller = gateway.keys.authenticate(_authorization(request))
        if scope is not None:
            require_scope(caller, scope)
        if request.method == "POST":
            await gateway.limits.admit(caller)
        return caller

    return check


def _authorization(request: Request) -> str | None:
    """The Authorization header, or what clients of Anthropic's API send in its place."""
    key = request.headers.get("x-api-key")
    return request.headers.get("authorization") or (f"Bearer {key}" if key else None)
