"""Answers that change engines in the middle, on the demo model: clients see what they would have seen anyway."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import httpx
import pytest

from kiln_common.bus.connect import connect_async
from kiln_gateway.app import create_app
from kiln_gateway.ports import Clients
from kiln_gateway.settings import GatewaySettings
from tests.support.demo_serving import DEMO_MODEL, demo_engine
from tests.support.evaluations import LocalEvaluations
from tests.support.fake_datasets import FakeDatasets
from tests.support.gateway import FakeRegistry, FakeTrainer, parse_events, served_app
from tests.support.redis_server import private_redis

CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 48, "ignore_eos": True, "return_token_ids": True, "logprobs": True, "top_logprobs": 2}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}
# Whatever an engine keeps about an answer beside its tokens has to go along.
BODIES = {
    "greedy": {"temperature": 0, "seed": 10, **LONG},
    "seeded": {"temperature": 1.0, "seed": 11, **LONG},
    "truncated": {"temperature": 1.3, "seed": 12, "top_p": 0.9, "top_k": 20, "min_p": 0.01, **LONG},
    "penalised": {
        "temperature": 0.8, "seed": 13, "presence_penalty": 1.5, "frequency_penalty": 0.5,
        "repetition_penalty": 1.3, **LONG,
    },
    "schema": {
        "temperature": 1.0, "seed": 14, "max_tokens": 120, "return_token_ids": True, "logprobs": True,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": SCHEMA},
        },
    },
    "thinking": {
        "temperature": 1.0, "seed": 15, "chat_template_kwargs": {"enable_thinking": True},
        "thinking_budget_tokens": 20, **LONG,
    },
    # Later than where answers move, of which drafts may have brought one further than the others.
    "stop string": {"temperature": 1.0, "seed": 16, "stop": ["nice day", "Regards"], **LONG},
}  # fmt: skip


class TwoEngines:
    """A gateway over two demo engines."""

    def __init__(self, url, clients, rollouts):
        self.clients, self.rollouts = clients, rollouts
        self.http = httpx.AsyncClient(base_url=url, timeout=120)

    async def ask(self, name):
        # One beginning for all: the engine that knows it gets them all.
        messages = [{"role": "user", "content": "Write a short, friendly letter to your neighbour."}]
        body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        response = await self.http.post(CHAT, json={**body, **BODIES[name]})
        assert response.status_code == 200, response.text
        answer = Answer(parse_events(response.text))
        rollout = await self.rollouts.find(answer.completion_id, 0, "")
        return answer, rollout

    async def busy_one(self, num_running, num_drawn):
        """The engine that runs so many sequences, once it has drawn so many tokens more than now."""
        before = [stats.num_generated_tokens for stats in await self._stats()]
        async with asyncio.timeout(60):
            while True:
                for client, stats, drawn in zip(self.clients, await self._stats(), before, strict=True):
                    if stats.num_generated_tokens >= drawn + num_drawn and stats.num_running == num_running:
                        return client
                await asyncio.sleep(0.002)

    async def _stats(self):
        return await asyncio.gather(*(client.get_stats() for client in self.clients))

    async def moved(self):
        lines = (await self.http.get("/metrics")).text.splitlines()
        moved = [line for line in lines if line.startswith("kiln_gateway_requests_moved_total{")]
        return {line.split('"')[1]: float(line.split()[-1]) for line in moved}


class Answer:
    """What a stream told, put together."""

    def __init__(self, events):
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
    def seen(self):
        counts = {key: self.usage[key] for key in ("prompt_tokens", "completion_tokens")}
        return self.content, self.reasoning, self.token_ids, self.finish_reason, counts


@pytest.fixture
async def two_engines(tmp_path):
    async with AsyncExitStack() as stack:
        engines = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            engines.append(await stack.enter_async_context(demo_engine(tmp_path / name)))
        redis = connect_async(stack.enter_context(private_redis(tmp_path)).url)
        stack.push_async_callback(redis.aclose)
        clients = Clients(
            engines=engines, registry=FakeRegistry(), trainer=FakeTrainer(), datasets=FakeDatasets(),
            evaluations=LocalEvaluations(tmp_path / "evaluations"), redis=redis,
        )  # fmt: skip
        app = create_app(GatewaySettings(model_path=str(DEMO_MODEL)), clients)
        both = TwoEngines(
            await stack.enter_async_context(served_app(app)), engines, app.state.gateway.rollouts
        )
        stack.push_async_callback(both.http.aclose)
        yield both


def unlike(rollout):
    """What tells two rollouts of the same answer apart, taken out; and their log-probabilities."""
    numbers = rollout.logprobs + rollout.sampled_logprobs
    apart = {"completion_id": "", "created_at_s": 0.0, "logprobs": [], "sampled_logprobs": []}
    return replace(rollout, **apart), numbers


@pytest.mark.parametrize("code", ["answer_handed_back", "engine_unavailable"])
async def test_an_answer_that_changes_engines_is_the_undisturbed_one(two_engines, code):
    alone = {name: await two_engines.ask(name) for name in BODIES}
    again = [asyncio.create_task(two_engines.ask(name)) for name in BODIES]
    engine = await two_engines.busy_one(len(again), num_drawn=10 * len(again))
    if code == "answer_handed_back":
        assert (await engine.drain(0.0)).num_aborted == len(again)
    else:
        engine.end_session("as if it had died")
    for name, (answer, rollout) in zip(BODIES, await asyncio.gather(*again), strict=True):
        undisturbed, kept = alone[name]
        assert answer.seen == undisturbed.seen, name
        assert answer.logprobs == pytest.approx(undisturbed.logprobs, abs=1e-3), name
        (rollout, numbers), (kept, expected) = unlike(rollout), unlike(kept)
        assert rollout == kept, name
        # Computed in a chunk what was computed token by token: float32 rounds elsewhere.
        assert numbers == pytest.approx(expected, abs=1e-3), name
    assert await two_engines.moved() == {code: len(again)}
