"""Which engine answers, and what a failed sequence means."""

import contextlib

import pytest

from kiln_common.errors import EngineUnavailable, ErrorKind, KilnError
from kiln_common.pb import common_pb2, engine_pb2
from kiln_common.text.tokenizer import TextTokenizer
from kiln_gateway.engine_pool import EnginePool
from kiln_gateway.errors import kind_of_code
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


async def test_a_failed_sequence_raises_the_engines_error(engines):
    async def fails(request):
        detail = common_pb2.ErrorDetail(code="deadline_exceeded", message="too slow", hint="wait")
        yield engine_pb2.SequenceOutput(finish_reason=engine_pb2.FINISH_REASON_ERROR, error=detail)

    engines[0].generate = fails
    with pytest.raises(KilnError, match="too slow") as failed:
        await drain(EnginePool(engines[:1]), "a")
    assert (failed.value.code, failed.value.kind) == ("deadline_exceeded", ErrorKind.TIMEOUT)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("prompt_too_long", ErrorKind.INVALID_REQUEST),
        ("adapter_slots_full", ErrorKind.RATE_LIMITED),
        ("engine_failed", ErrorKind.UNAVAILABLE),
        ("never heard of", ErrorKind.INTERNAL),
    ],
)
def test_codes_have_their_kind(code, kind):
    assert kind_of_code(code) is kind
