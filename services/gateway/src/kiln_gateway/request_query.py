"""Query parameters beyond what FastAPI checks."""

from __future__ import annotations

from fastapi import Request
from fastapi.routing import APIRoute

from kiln_gateway.errors import InvalidField
from kiln_gateway.request_body import unknown_name_hint


async def refuse_unknown_query(request: Request) -> None:
    """A dependency of routes that take query parameters: one that is misspelt must not be ignored.

    Raises:
        InvalidField: with the first name that the route does not take as param.
    """
    route: APIRoute = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    for name in request.query_params:
        if name not in known:
            shown = name[:60]
            message = f"there is no query parameter `{shown}`"
            raise InvalidField("unknown_field", message, param=shown, hint=unknown_name_hint(name, known))
