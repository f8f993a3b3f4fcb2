"""The parts of one gateway, put together once and used by every route."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, TypeVar

import structlog
from fastapi import Request
from pydantic import BaseModel

from kiln_common.api_keys import KeyRing
from kiln_common.model_folder import TEXT_FILES, find_model_folder
from kiln_common.text.chat_template import ChatTemplate
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.chat.prompt import PromptRenderer
from kiln_gateway.corrections import CorrectionStore
from kiln_gateway.engine_pool import EnginePool
from kiln_gateway.errors import LimitsNeedRedis
from kiln_gateway.idempotency import IdempotencyRecords
from kiln_gateway.limits import RateLimiter
from kiln_gateway.metrics import GatewayMetrics
from kiln_gateway.model_resolver import ModelResolver
from kiln_gateway.ports import Clients
from kiln_gateway.request_body import parse_body, parse_bytes, read_body
from kiln_gateway.responses_api.store import ResponseStore
from kiln_gateway.rollouts import RolloutStore
from kiln_gateway.settings import GatewaySettings

log = structlog.get_logger()
Model = TypeVar("Model", bound=BaseModel)
_TURN_END = "<|im_end|>"


class Gateway:
    """Holds no state of a request; everything here lives as long as the process."""

    def __init__(self, settings: GatewaySettings, clients: Clients) -> None:
        self.settings = settings
        self.clients = clients
        model_folder = find_model_folder(settings.model_path, TEXT_FILES)
        self.tokenizer = TextTokenizer.load(model_folder)
        self.prompts = PromptRenderer(
            ChatTemplate.load(model_folder),
            self.tokenizer,
            enable_thinking_default=settings.enable_thinking_default,
        )
        self.turn_end_id = self.tokenizer.id_of(_TURN_END)
        self.metrics = GatewayMetrics()
        self.engines = EnginePool(
            clients.engines,
            clients.connect,
            silence_s=settings.engine_silence_s,
            on_moved=lambda code: self.metrics.moved.labels(code).inc(),
        )
        self.resolver = ModelResolver(clients.registry)
        self.rollouts = RolloutStore(
            clients.redis, ttl_s=settings.rollout_ttl_s, max_bytes=settings.rollout_max_bytes
        )
        self.responses = ResponseStore(
            clients.redis, ttl_s=settings.response_ttl_s, max_bytes=settings.response_max_bytes
        )
        self.corrections = CorrectionStore(clients.redis)
        self.idempotency = IdempotencyRecords(clients.redis)
        self.keys = KeyRing(settings.api_keys, settings.api_keys_file)
        if self.keys.has_limits and clients.redis is None:
            raise LimitsNeedRedis("keys have limits, which are counted in Redis, and there is none")
        self.limits = RateLimiter(clients.redis)
        self.started_at = time.monotonic()
        self.is_stopping = asyncio.Event()

    async def parse(self, request: Request, schema: type[Model]) -> Model:
        """The request's JSON body. Raises BodyTooLarge, InvalidJson, InvalidField."""
        body = await parse_body(request, schema, self.settings.max_body_bytes)
        if self.settings.log_bodies:
            log.info("request_body", path=request.url.path, body=body.model_dump(exclude_unset=True))
        return body

    async def parse_optional(self, request: Request, schema: type[Model]) -> Model:
        """The request's JSON body, or the schema's defaults when there is none."""
        raw = await read_body(request, self.settings.max_body_bytes)
        return parse_bytes(raw or b"{}", schema)

    async def end_answers(self, grace_s: float) -> None:
        """End what runs with GatewayStopping: streams of job events now, completions after `grace_s`."""
        self.is_stopping.set()
        await asyncio.sleep(grace_s)
        await self.engines.close()

    async def served_model_id(self) -> str:
        """The base model's id as clients see it. Raises EngineUnavailable."""
        return self.settings.served_model_name or (await self.engines.base_model()).model_id

    async def base_ids(self) -> frozenset[str]:
        """Every name that means the base model with its default adapter."""
        engine_id = (await self.engines.base_model()).model_id
        return frozenset({engine_id, self.settings.served_model_name or engine_id})


def gateway_of(request: Request) -> Gateway:
    return request.app.state.gateway


async def answers(checks: Mapping[str, Any], timeout_s: float) -> dict[str, bool]:
    """Which of several awaitables gave something true within `timeout_s`, by name."""

    async def one(check: Any) -> bool:
        try:
            return bool(await asyncio.wait_for(check, timeout_s))
        except Exception:  # noqa: BLE001 any failure of a dependency means it does not answer
            return False

    results = await asyncio.gather(*map(one, checks.values()))
    return dict(zip(checks, results, strict=True))
