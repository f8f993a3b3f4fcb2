"""Which engine answers, and what a failed sequence means."""

import contextlib

import pytest

from kiln_common.errors import DeadlineExceeded, DuplicateRequestId, EngineUnavailable, KilnError
from kiln_common.pb import engine_pb2
from kiln_common.text.tokenizer import TextTokenizer
from kiln_engine.domain import FinishReason, SequenceEvent
from kiln_engine.domain.errors import (
    AdapterSlotsFull,
    EmptyPrompt,
    EngineFailed,
    NonFiniteLogits,
    SessionOverflow,
)
from kiln_engine.execution.adapter_store import AdapterRankTooHigh
from kiln_engine.servicer.messages import step_outputs
from kiln_gateway.engine_pool import EnginePool
from tests.support.gateway import FakeEngine, build_tokenizer


@pytest.fixture
def engines():
    tokenizer = TextTokenizer(build_tokenizer())
    return [FakeEngine(tokenizer), FakeEngine(tokenizer)]


def request(name):
    return engine_pb2.GenerateRequest(
        request_id=name, prompt_token_ids=[1], sampling=engine_pb2.SamplingParams(max_tokens=9)
    )


async def drain(pool, name):
    return [output async for output in pool.generate(request(name))]


async def test_requests_go_where_fewest_are_running(engines):
    pool = EnginePool(engines)
    async with contextlib.aclosing(pool.generate(request("a"))) as first:
        await anext(first)
        await drain(pool, "b")
        await drain(pool, "c")
    assert [[r.request_id for r in engine.requests] for engine in engines] == [["a"], ["b", "c"]]
    await drain(pool, "d")
    assert engines[0].requests[-1].request_id == "d"
    assert engines[0].aborted == ["a"]


async def test_an_engine_that_went_away_is_passed_over_until_it_answers_again(engines):
    pool = EnginePool(engines)
    await drain(pool, "a")
    engines[0].is_up = False
    with pytest.raises(EngineUnavailable):
        await drain(pool, "b")
    await drain(pool, "c")
    assert engines[1].requests[-1].request_id == "c"
    engines[0].is_up = True
    await pool.probe()
    await drain(pool, "d")
    assert engines[0].requests[-1].request_id == "d"


async def test_without_any_engine_there_is_a_clear_error(engines):
    for engine in engines:
        engine.is_up = False
    with pytest.raises(EngineUnavailable, match="none of the 2 engines"):
        await EnginePool(engines).base_model()


@pytest.mark.parametrize(
    ("error", "http_status"),
    [
        (DeadlineExceeded("too slow"), 504),
        (DuplicateRequestId("a"), 409),
        (EmptyPrompt("no tokens"), 400),
        (AdapterRankTooHigh(128, 64), 400),
        (AdapterSlotsFull("all in use"), 429),
        (SessionOverflow("not read"), 429),
        (EngineFailed("broken"), 503),
        (NonFiniteLogits(9), 500),
    ],
)
async def test_a_failed_sequence_raises_the_engines_error(engines, error, http_status):
    async def fails(request):
        [output] = step_outputs([SequenceEvent("a", finish_reason=FinishReason.ERROR, error=error)]).outputs
        yield output

    engines[0].generate = fails
    with pytest.raises(KilnError) as failed:
        await drain(EnginePool(engines[:1]), "a")
    caught = failed.value
    assert caught.kind.http_status == http_status
    assert (caught.code, caught.message, caught.hint) == (error.code, error.message, error.hint)
    assert (caught.kind, caught.param, caught.retry_after_s) == (error.kind, error.param, error.retry_after_s)
