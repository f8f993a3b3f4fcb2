"""GET /: a plain page that says what is here. The dashboard is not built yet."""

from __future__ import annotations

from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute

from kiln_gateway.routes.not_built import NOT_BUILT

router = APIRouter()

_CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Kiln</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 3rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; }} td {{ padding: .15rem 1rem .15rem 0; vertical-align: top; }}
code {{ font-size: .9em; }}
</style></head><body>
<h1>Kiln</h1>
<p>An inference server whose adapters learn while it serves. Point an OpenAI client at <code>/v1</code>.
The dashboard is not built yet; <a href="/health">/health</a>, <a href="/readyz">/readyz</a> and
<a href="/v1/stats">/v1/stats</a> say how things stand.</p>
<h2>Routes</h2><table>{built}</table>
<h2>Not built yet</h2><table>{not_built}</table>
</body></html>"""


@router.get("/", response_class=HTMLResponse)
async def home(request: Request) -> HTMLResponse:
    """Every route with what it does."""
    missing = {(method, path) for method, path, _ in NOT_BUILT}
    rows = [
        (method, route.path, (route.endpoint.__doc__ or "").strip())
        for route in request.app.state.api_routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
        if (method, route.path) not in missing
    ]
    page = _PAGE.format(built="".join(map(_row, rows)), not_built="".join(map(_row, NOT_BUILT)))
    return HTMLResponse(page, headers={"Content-Security-Policy": _CONTENT_POLICY})


def _row(row: tuple[str, str, str]) -> str:
    method, path, text = map(escape, row)
    return f"<tr><td>{method}</td><td><code>{path}</code></td><td>{text}</td></tr>"
