"""A prompt's alternatives as two runs of numbers: what a trainer learns from asks for many of them."""

from array import array

import pytest

from kiln_common.clients.engine import EngineClient
from kiln_engine.bootstrap import start_engine
from kiln_engine.device_side import load_device_side
from kiln_engine.settings import EngineSettings
from tests.support.engine_server import collect, generate_request
from tests.support.tiny_models import make_checkpoint

PROMPT = [(7 * i) % 290 for i in range(40)]


@pytest.fixture
async def engine(tmp_path):
    make_checkpoint(tmp_path / "model")
    settings = EngineSettings(
        model_path=str(tmp_path / "model"),
        listen=f"unix:{tmp_path}/engine.sock",
        device="cpu",
        socket_dir=tmp_path / "run",
        max_model_len=128,
        kv_cache_tokens=512,
        max_running=2,
        step_token_budget=32,
        num_adapter_slots=1,
        drain_timeout_s=0.2,
    )
    running = await start_engine(settings, load_device_side(settings))
    client = EngineClient(settings.listen)
    yield client
    await client.close()
    await running.stop()


async def test_packed_and_plain_alternatives_are_the_same(engine):
    plain = await collect(engine, generate_request("plain", PROMPT, num_prompt_logprobs=5, max_tokens=0))
    fields = {"num_prompt_logprobs": 5, "packs_prompt_logprobs": True, "first_prompt_logprob": 30}
    packed = await collect(engine, generate_request("packed", PROMPT, max_tokens=0, **fields))
    tops = [top for output in plain for top in output.top_prompt_logprobs][29:]
    assert len(tops) == 10
    ids = array("i", b"".join(output.packed_top_token_ids for output in packed))
    logprobs = array("f", b"".join(output.packed_top_logprobs for output in packed))
    assert list(ids) == [token_id for top in tops for token_id in top.token_ids]
    # The head is applied to other rows together, which moves a last bit.
    assert list(logprobs) == pytest.approx([logprob for top in tops for logprob in top.logprobs], abs=1e-5)
    assert not any(output.top_prompt_logprobs for output in packed)
    scored = [logprob for output in packed for logprob in output.prompt_logprobs]
    told = [logprob for output in plain for logprob in output.prompt_logprobs][29:]
    assert scored == pytest.approx(told, abs=1e-5)


async def test_as_many_as_256_of_each_are_told(engine):
    fields = {"num_prompt_logprobs": 256, "packs_prompt_logprobs": True}
    outputs = await collect(engine, generate_request("r", PROMPT, max_tokens=0, **fields))
    logprobs = array("f", b"".join(output.packed_top_logprobs for output in outputs))
    assert len(logprobs) == 39 * 256
    first = list(logprobs[:256])
    assert first == sorted(first, reverse=True)
