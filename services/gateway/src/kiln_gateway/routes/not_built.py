"""What the HTTP contract names and is not built yet: one table, answered with 501."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from kiln_common.errors import NotBuiltYet
from kiln_gateway.auth import require

router = APIRouter(dependencies=[Depends(require(None))])

# Method, path, and what works instead today.
NOT_BUILT: tuple[tuple[str, str, str], ...] = ()


def _answer(method: str, path: str, instead: str) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        raise NotBuiltYet(f"{method} {path} is part of the contract but not built yet", hint=instead)

    return answer


for _method, _path, _instead in NOT_BUILT:
    router.add_api_route(
        _path, _answer(_method, _path, _instead), methods=[_method], summary="Not built yet", status_code=501
    )
