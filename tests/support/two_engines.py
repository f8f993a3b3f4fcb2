"""A gateway over two demo engines, requests whose answers have something to lose, and what each engine drew."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from kiln_common.bus.connect import connect_async
from kiln_common.clients.engine import EngineClient
from kiln_common.pb import engine_pb2
from kiln_gateway.app import create_app
from kiln_gateway.ports import Clients
from kiln_gateway.rollouts import Rollout, RolloutStore
from kiln_gateway.settings import GatewaySettings
from tests.support.demo_serving import DEMO_MODEL, demo_engine
from tests.support.evaluations import LocalEvaluations
from tests.support.fake_datasets import FakeDatasets
from tests.support.gateway import FakeRegistry, FakeTrainer, parse_events, served_app
from tests.support.redis_server import private_redis

CHAT = "/v1/chat/completions"
# Long enough to be on its way when answers move, and certain to end.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 40, "maxLength": 60},
        "tags": {
            "type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 2, "maxItems": 4,
        },
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}  # fmt: skip
STOPS = ["nice day", "Regards"]
# Whatever an engine keeps about an answer beside its tokens has to go along.
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "seed": 10, "ignore_eos": True},
    "seeded": {"temperature": 1.0, "seed": 11, "ignore_eos": True},
    "truncated": {
        "temperature": 1.3, "seed": 12, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "ignore_eos": True,
    },
    "penalised": {
        "temperature": 0.8, "seed": 13, "presence_penalty": 1.5, "frequency_penalty": 0.5,
        "repetition_penalty": 1.3, "ignore_eos": True,
    },
    "schema": {
        "temperature": 1.0, "seed": 14, "max_tokens": 400,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA},
        },
    },
    "thinking": {
        "temperature": 1.0, "seed": 15, "chat_template_kwargs": {"enable_thinking": True},
        "thinking_budget_tokens": 20, "ignore_eos": True,
    },
    # Later than where answers move, of which drafts may have brought one further than the others.
    "stop string": {"temperature": 1.0, "seed": 16, "stop": STOPS, "ignore_eos": True},
}  # fmt: skip


class Answer:
    """What a stream told, put together."""

    def __init__(self, events: list[Any]) -> None:
        assert events[-1] == "[DONE]", events[-1]
        assert not any("error" in event for event in events[:-1])
        self.completion_id = events[0]["id"]
        self.usage = next(event["usage"] for event in events[:-1] if event.get("usage"))
        choices = [event["choices"][0] for event in events[:-1] if event["choices"]]
        deltas = [choice["delta"] for choice in choices]
        self.content = "".join(delta.get("content") or "" for delta in deltas)
        self.reasoning = "".join(delta.get("reasoning_content") or "" for delta in deltas)
        self.token_ids = [token for choice in choices for token in choice.get("token_ids") or ()]
        entries = [choice["logprobs"]["content"] for choice in choices if choice.get("logprobs")]
        self.logprobs = [entry["logprob"] for content in entries for entry in content or ()]
        self.finish_reason = choices[-1]["finish_reason"]

    @property
    def seen(self) -> tuple[Any, ...]:
        counts = {key: self.usage[key] for key in ("prompt_tokens", "completion_tokens")}
        return self.content, self.reasoning, self.token_ids, self.finish_reason, counts


@dataclass
class Part:
    """What one engine was given of an answer, and what it sent."""

    engine: EngineClient
    resumed_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)


class TwoEngines:
    """Clients' side, and the engines' with what they sent."""

    def __init__(self, url: str, engines: list[EngineClient], rollouts: RolloutStore) -> None:
        self.engines, self.rollouts = engines, rollouts
        self.http = httpx.AsyncClient(base_url=url, timeout=120)
        # By request, in order.
        self.parts: dict[str, list[Part]] = {}
        self._has_sent = asyncio.Event()
        for engine in engines:
            self._record(engine)

    async def ask(self, name: str, num_tokens: int = 48) -> tuple[Answer, Rollout]:
        # One beginning for all: the engine that knows it gets them all.
        messages = [{"role": "user", "content": "Write a short, friendly letter to your neighbour."}]
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        told = {"max_tokens": num_tokens, "return_token_ids": True, "logprobs": True, "top_logprobs": 2}
        response = await self.http.post(CHAT, json={**body, **told, **BODIES[name]})
        assert response.status_code == 200, response.text
        answer = Answer(parse_events(response.text))
        rollout = await self.rollouts.find(answer.completion_id, 0, "")
        assert rollout is not None
        return answer, rollout

    async def some_way_in(self, num_answers: int, num_tokens: int) -> EngineClient:
        """The engine that draws them, once the gateway has so many tokens of each answer."""
        async with asyncio.timeout(120):
            while True:
                parts = [parts[-1] for parts in self.parts.values()]
                if len(parts) == num_answers and all(len(part.token_ids) >= num_tokens for part in parts):
                    return parts[0].engine
                self._has_sent.clear()
                await self._has_sent.wait()

    @property
    def num_moved(self) -> int:
        """Answers that more than one engine had a part in."""
        return sum(len(parts) > 1 for parts in self.parts.values())

    async def moved(self) -> dict[str, float]:
        lines = (await self.http.get("/metrics")).text.splitlines()
        moved = [line for line in lines if line.startswith("kiln_gateway_requests_moved_total{")]
        return {line.split('"')[1]: float(line.split()[-1]) for line in moved}

    def _record(self, engine: EngineClient) -> None:
        generate = engine.generate

        async def recorded(request: engine_pb2.GenerateRequest) -> AsyncIterator[engine_pb2.SequenceOutput]:
            part = Part(engine, list(request.resumed_token_ids))
            self.parts.setdefault(request.request_id, []).append(part)
            async with aclosing(generate(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    part.token_ids += output.token_ids
                    self._has_sent.set()
                    yield output

        engine.generate = recorded  # type: ignore[method-assign]


@asynccontextmanager
async def two_engines(folder: Path, **settings: Any) -> AsyncIterator[TwoEngines]:
    """`settings` are those of both engines."""
    async with AsyncExitStack() as stack:
        engines = []
        for name in ("one", "two"):
            (folder / name).mkdir()
            engines.append(await stack.enter_async_context(demo_engine(folder / name, **settings)))
        redis = connect_async(stack.enter_context(private_redis(folder)).url)
        stack.push_async_callback(redis.aclose)
        clients = Clients(
            engines=engines, registry=FakeRegistry(), trainer=FakeTrainer(), datasets=FakeDatasets(),
            evaluations=LocalEvaluations(folder / "evaluations"), redis=redis,
        )  # fmt: skip
        app = create_app(GatewaySettings(model_path=str(DEMO_MODEL)), clients)
        url = await stack.enter_async_context(served_app(app))
        both = TwoEngines(url, engines, app.state.gateway.rollouts)
        stack.push_async_callback(both.http.aclose)
        yield both
