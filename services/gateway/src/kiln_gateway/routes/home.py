"""GET /: the dashboard. Page and assets come from the package; nothing is fetched from anywhere else."""

from __future__ import annotations

import hashlib
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import Response

router = APIRouter()

_MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
# Only the gateway's own files, and connections to nobody but the gateway.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_FILES = {
    name: (resources.files("kiln_gateway.dashboard") / "static" / name).read_bytes() for name in _MEDIA_TYPES
}


@router.get("/")
async def home(request: Request) -> Response:
    """The dashboard."""
    return _file(request, "index.html")


@router.get("/dashboard/app.js", include_in_schema=False)
async def script(request: Request) -> Response:
    """The dashboard's script."""
    return _file(request, "app.js")


@router.get("/dashboard/app.css", include_in_schema=False)
async def style(request: Request) -> Response:
    """The dashboard's style."""
    return _file(request, "app.css")


@router.get("/dashboard/icon.svg", include_in_schema=False)
async def icon(request: Request) -> Response:
    """The dashboard's icon."""
    return _file(request, "icon.svg")


def _file(request: Request, name: str) -> Response:
    content = _FILES[name]
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_MEDIA_TYPES[name], headers=headers)
