"""The gateway's HTTP application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect

from kiln_gateway.edge import EdgeMiddleware
from kiln_gateway.engine_discovery import discovering
from kiln_gateway.evals.evaluator import Evaluator
from kiln_gateway.gateway import Gateway
from kiln_gateway.http_errors import install_error_handlers
from kiln_gateway.insight.feed import Feed
from kiln_gateway.insight.snapshot import read_snapshot
from kiln_gateway.openapi import install_openapi
from kiln_gateway.ports import Clients
from kiln_gateway.routes import (
    adapter_arithmetic,
    adapters,
    audit,
    batch,
    completions,
    corrections,
    datasets,
    embeddings,
    evals,
    events,
    health,
    home,
    messages,
    models,
    responses,
    text,
    training,
    training_jobs,
)
from kiln_gateway.settings import GatewaySettings
from kiln_gateway.sse import ClientLeft

_CLIENT_CLOSED_REQUEST = 499
_ROUTERS = (
    completions.router,
    embeddings.router,
    batch.router,
    responses.router,
    messages.router,
    text.router,
    models.router,
    training.router,
    training_jobs.router,
    datasets.router,
    corrections.router,
    adapters.router,
    adapter_arithmetic.router,
    audit.router,
    evals.router,
    health.router,
    events.router,
    home.router,
)


def create_app(settings: GatewaySettings, clients: Clients) -> FastAPI:
    """The application over these clients; reads tokenizer and template from settings.model_path.

    Raises:
        ModelFolderMissing, HubFailed, TokenizerUnusable, TemplateUnusable: the model folder does not have what it needs.
        ModelFileNotRead: the file system failed.
    """
    gateway = Gateway(settings, clients)
    evaluator = Evaluator(gateway, clients.evaluations, concurrency=settings.eval_concurrency)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with (
            gateway.engines.watching(),
            discovering(clients.redis, gateway.engines),
            evaluator.working(),
        ):
            yield

    app = FastAPI(title="Kiln", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.gateway = gateway
    app.state.feed = Feed(lambda owners: read_snapshot(gateway, owners))
    app.state.api_routes = [route for router in _ROUTERS for route in router.routes]
    install_error_handlers(app)

    @app.exception_handler(ClientLeft)
    @app.exception_handler(ClientDisconnect)  # within its body
    async def on_client_left(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)

    install_openapi(app)
    for router in _ROUTERS:
        app.include_router(router)
    app.add_middleware(
        EdgeMiddleware,
        allowed_hosts=settings.allowed_hosts,
        allowed_origins=settings.allowed_origins,
        metrics=gateway.metrics,
        body_pause_s=settings.body_pause_s,
        body_timeout_s=settings.request_timeout_s,
        upload_timeout_s=settings.upload_timeout_s,
    )
    return app
