"""The demo model behind a real engine and a real gateway, in this process."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from kiln_common.clients.engine import EngineClient
from kiln_engine.bootstrap import start_engine
from kiln_engine.device_side import load_device_side
from kiln_engine.settings import EngineSettings
from kiln_gateway.app import create_app
from kiln_gateway.ports import Clients
from kiln_gateway.settings import GatewaySettings
from tests.support.evaluations import LocalEvaluations
from tests.support.fake_datasets import FakeDatasets
from tests.support.gateway import REPOSITORY, FakeRegistry, FakeTrainer

DEMO_MODEL = REPOSITORY / "demo" / "model"
# KILN_TEST_DEVICE=cuda runs the same tests on a GPU.
DEVICE = os.environ.get("KILN_TEST_DEVICE", "cpu")


@asynccontextmanager
async def demo_engine(folder: Path, **settings: Any) -> AsyncIterator[EngineClient]:
    """A client of an engine that serves the demo model on a socket in `folder`."""
    fields: dict[str, Any] = {
        "model_path": str(DEMO_MODEL),
        "listen": f"unix:{folder}/engine.sock",
        "device": DEVICE,
        "socket_dir": folder / "run",
        "max_model_len": 2048,
        "kv_cache_tokens": 32_768,
        "max_running": 24,
        "drain_timeout_s": 0.5,
    }
    engine_settings = EngineSettings(**{**fields, **settings})
    engine = await start_engine(engine_settings, load_device_side(engine_settings))
    client = EngineClient(engine_settings.listen)
    try:
        yield client
    finally:
        await client.close()
        await engine.stop()


@asynccontextmanager
async def demo_gateway(
    folder: Path, *, redis: Any = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of a gateway in front of such an engine; `settings` are the engine's."""
    async with demo_engine(folder, **settings) as engine:
        clients = Clients(
            engines=[engine],
            registry=FakeRegistry(),
            trainer=FakeTrainer(),
            datasets=FakeDatasets(),
            evaluations=LocalEvaluations(folder / "evaluations"),
            redis=redis,
        )
        app = create_app(GatewaySettings(model_path=str(DEMO_MODEL)), clients)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as http:
            yield http
