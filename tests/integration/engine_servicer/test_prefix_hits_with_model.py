"""Prefix hits on a real tiny model over gRPC: where they begin, and that they change no answer."""

import asyncio

import pytest

from kiln_engine.device_side import load_device_side
from kiln_engine.settings import EngineSettings
from tests.support.engine_server import collect, generate_request, running_engine
from tests.support.tiny_models import make_checkpoint

GREEDY = {"temperature": 0.0, "max_tokens": 8}
SYSTEM = [(7 * i) % 50 + 1 for i in range(40)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-model"
    make_checkpoint(folder)
    return folder


@pytest.fixture
async def client(checkpoint, tmp_path):
    sizes = {"max_model_len": 256, "kv_cache_tokens": 1024, "max_running": 4, "step_token_budget": 64}
    settings = EngineSettings(model_path=str(checkpoint), device="cpu", socket_dir=tmp_path / "run", **sizes)
    async with running_engine(load_device_side(settings), tmp_path) as (_, client):
        yield client


async def answer(client, request_id, prompt, **fields):
    """How many tokens of a greedy request were cached, and what it said."""
    outputs = await collect(client, generate_request(request_id, prompt, **GREEDY, **fields))
    assert outputs[-1].error.code == "", outputs[-1].error
    return outputs[0].num_cached_tokens, [token for output in outputs for token in output.token_ids]


async def test_the_second_conversation_starts_after_the_shared_instructions(client):
    hints = {"num_shared_prefix_tokens": len(SYSTEM), "num_stable_prefix_tokens": len(SYSTEM) + 10}
    first = [*SYSTEM, *range(1, 16)]
    second = [*SYSTEM, *range(20, 38)]
    assert (await answer(client, "first", first, **hints))[0] == 0
    num_cached, from_cache = await answer(client, "second", second, **hints)
    assert num_cached == 32
    num_cached, from_start = await answer(client, "alone", second, cache_salt="nobody else's")
    assert num_cached == 0
    assert from_cache == from_start


async def test_choices_of_one_prompt_share_one_prefill(client):
    prompt = [*SYSTEM, *range(1, 21)]
    requests = [answer(client, f"choice-{index}", prompt, num_stable_prefix_tokens=5) for index in range(4)]
    choices = await asyncio.gather(*requests)
    assert sorted(num_cached for num_cached, _ in choices) == [0, 48, 48, 48]
    assert len({tuple(tokens) for _, tokens in choices}) == 1
    stats = await client.get_stats()
    assert (stats.num_prompt_tokens, stats.num_cached_tokens) == (240, 144)
