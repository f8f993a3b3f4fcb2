"""Which engine answers, and what a failed sequence means."""

import contextlib

import pytest

from kiln_common.bus.engine_presence import EngineWord
from kiln_common.errors import DeadlineExceeded, DuplicateRequestId, EngineUnavailable, KilnError
from kiln_common.pb import engine_pb2
from kiln_common.prefix_path import path_names, root_name
from kiln_common.text.tokenizer import TextTokenizer
from kiln_engine.domain import FinishReason, SequenceEvent
from kiln_engine.domain.errors import (
    AdapterSlotsFull,
    AnswerHandedBack,
    EmptyPrompt,
    EngineDraining,
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
    return [FakeEngine(tokenizer, address=f"fake:{number}") for number in (1, 2)]


def request(name, prompt=(1,), **fields):
    sampling = engine_pb2.SamplingParams(max_tokens=9)
    return engine_pb2.GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, **fields)


async def drain(pool, name, prompt=(1,)):
    return [output async for output in pool.generate(request(name, prompt))]


def engine_of(engines, name):
    [found] = [engine for engine in engines if name in [r.request_id for r in engine.requests]]
    return found


async def test_new_prompts_are_spread_and_a_known_beginning_goes_where_it_is(engines):
    pool = EnginePool(engines)
    for number in range(40):
        await drain(pool, f"first-{number}", [number] * 40)
    assert sorted(len(engine.requests) for engine in engines) in ([18, 22], [19, 21], [20, 20])
    for number in range(40):
        await drain(pool, f"second-{number}", [number] * 60)
        assert engine_of(engines, f"second-{number}") is engine_of(engines, f"first-{number}")


async def test_an_engine_of_another_model_answers_nobody(engines):
    ours, alien = engines
    alien.base_model.model_hash = "another"
    pool = EnginePool([ours], connect=lambda address: alien)
    await pool.probe()
    word = EngineWord(alien.address, "boot_alien", "another", 16, 0, 0)
    await pool.hear([word])
    assert [seat.client for seat in pool.seats] == [ours]
    # Not while ours is away either.
    ours.is_up = False
    await pool.probe()
    await pool.hear([word])
    with pytest.raises(EngineUnavailable):
        await drain(pool, "r")
    assert (await pool.base_model()).model_hash != "another"


async def test_an_engine_heard_of_before_ones_own_is_let_go(engines):
    ours, alien = engines
    alien.base_model.model_hash = "another"
    ours.is_up = False
    pool = EnginePool([ours], connect=lambda address: alien)
    word = EngineWord(alien.address, "boot_alien", "another", 16, 0, 0)
    await pool.hear([word])
    assert len(pool.seats) == 2
    ours.is_up = True
    await pool.probe()
    await pool.hear([word])
    assert [seat.client for seat in pool.seats] == [ours]


async def test_an_engine_that_went_away_is_passed_over_until_it_answers_again(engines):
    pool = EnginePool(engines)
    await drain(pool, "a", [1] * 40)
    lost = engine_of(engines, "a")
    lost.is_up = False
    # Nothing of it had begun: the other one answers.
    assert await drain(pool, "b", [1] * 60)
    assert engine_of(engines, "b") is not lost
    lost.is_up = True
    await pool.probe()
    for number in range(8):
        await drain(pool, f"c-{number}", [number] * 40)
    assert len(lost.requests) > 1


async def test_a_stopping_engine_leaves_its_request_to_another_and_gets_no_more(engines):
    pool = EnginePool(engines)
    await drain(pool, "a", [1] * 40)
    stopping = engine_of(engines, "a")
    stopping.fail_after, stopping.failure = 0, EngineDraining("stopping")
    assert await drain(pool, "b", [1] * 60)
    num_asked = len(stopping.requests)
    for number in range(6):
        await drain(pool, f"c-{number}", [number] * 40)
    assert len(stopping.requests) == num_asked


def failing_first(engines, failure, after):
    """Whichever engine is asked first fails after so many tokens; the other one is well."""
    asked = []

    def script(request):
        asked.append(request)
        for engine in engines:
            is_first = len(asked) == 1 and request in engine.requests
            engine.fail_after, engine.failure = (after, failure) if is_first else (None, failure)
        return list(range(20, 29))

    for engine in engines:
        engine.script = script
    return asked


@pytest.mark.parametrize("failure", [AnswerHandedBack("stopping"), EngineUnavailable("killed")])
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_an_answer_goes_on_behind_its_last_token_when_its_engine_does_not(engines, failure, after):
    asked = failing_first(engines, failure, after)
    codes = []
    outputs = await drain(EnginePool(engines, on_moved=codes.append), "a")
    assert [output.token_ids[0] for output in outputs] == list(range(20, 29))
    assert [output.logprobs[0] for output in outputs] == [engines[0].logprob_of(i) for i in range(9)]
    assert outputs[-1].finish_reason == engine_pb2.FINISH_REASON_LENGTH
    first, second = asked
    assert list(second.resumed_token_ids) == list(range(20, 20 + after))
    # The first engine drew the seed.
    assert second.sampling.seed == (1234 if after else 0)
    assert second.sampling.max_tokens == first.sampling.max_tokens
    assert codes == [failure.code]


async def test_nobody_goes_on_with_another_model(engines):
    engines[1].base_model.model_hash = "another"
    engines[0].fail_after, engines[0].failure = 1, AnswerHandedBack("stopping")
    with pytest.raises(AnswerHandedBack):
        await drain(EnginePool(engines), "a")
    assert not engines[1].requests


async def test_an_answer_outlives_one_engine_after_the_other_as_they_are_replaced(engines):
    asked = []

    def script(request):
        asked.append(request)
        if len(asked) == 2:  # by now the first one has been started again
            next(engine for engine in engines if engine.requests[:1] == asked[:1]).boot_id = "again"
        for engine in engines:
            engine.fail_after = 2 if len(asked) < 3 else None
        return list(range(20, 29))

    for engine in engines:
        engine.script, engine.failure = script, AnswerHandedBack("stopping")
    outputs = await drain(EnginePool(engines), "a")
    assert [output.token_ids[0] for output in outputs] == list(range(20, 29))
    assert [len(request.resumed_token_ids) for request in asked] == [0, 2, 4]


async def test_without_another_engine_a_stopping_one_says_so(engines):
    pool = EnginePool(engines[:1])
    engines[0].fail_after, engines[0].failure = 0, EngineDraining("stopping")
    with pytest.raises(EngineDraining):
        await drain(pool, "a")


async def test_no_request_is_tried_on_more_than_three_engines():
    tokenizer = TextTokenizer(build_tokenizer())
    engines = [FakeEngine(tokenizer, address=f"fake:{number}") for number in range(6)]
    for engine in engines:
        engine.fail_after = 0
    with pytest.raises(EngineUnavailable):
        await drain(EnginePool(engines), "a")
    assert sum(len(engine.requests) for engine in engines) == 3


async def test_engines_of_another_model_get_nothing(engines):
    engines[1].base_model.model_hash = "another"
    pool = EnginePool(engines)
    for number in range(8):
        await drain(pool, f"{number}", [number] * 40)
    assert not engines[1].requests


def word_of(engine, **fields):
    defaults = {"page_tokens": 16, "num_running": 0, "num_waiting": 0}
    return EngineWord(engine.address, engine.boot_id, engine.base_model.model_hash, **{**defaults, **fields})


async def test_announced_engines_come_and_go(engines):
    by_address = {engine.address: engine for engine in engines}
    pool = EnginePool(engines[:1], by_address.__getitem__)
    await pool.hear([word_of(engine) for engine in engines])
    assert [seat.address for seat in pool.seats] == ["fake:1", "fake:2"]
    # Silence on Redis alone says nothing: the key may have made room for others.
    await pool.hear([])
    assert len(pool.seats) == 2
    engines[1].is_up = False
    await pool.probe()
    await pool.hear([])
    assert [seat.address for seat in pool.seats] == ["fake:1"]
    assert engines[1].is_closed.is_set()


async def test_an_engine_announced_under_another_address_is_one_engine(engines):
    engines[1].boot_id = engines[0].boot_id
    pool = EnginePool(engines[:1], lambda address: engines[1])
    await pool.hear([word_of(engines[1])])  # before the configured one has said who it is
    await pool.probe()
    for number in range(8):
        await drain(pool, f"{number}", [number] * 40)
    assert not engines[1].requests
    await pool.hear([word_of(engines[1])])
    assert [seat.address for seat in pool.seats] == ["fake:1"]


async def test_what_an_engine_holds_is_believed_whoever_sent_it_there(engines):
    tokens = list(range(100, 148))
    names = path_names(root_name([], ""), tokens, 16)
    for holder in engines:
        pool = EnginePool(engines)
        await pool.probe()
        await pool.hear([word_of(holder, prefixes=frozenset(names[1:2]))])
        await drain(pool, f"to {holder.address}", tokens)
        assert engine_of(engines, f"to {holder.address}") is holder


async def test_requests_of_an_engine_that_stays_silent_are_ended(engines):
    pool = EnginePool(engines[:1], silence_s=0.0)
    engines[0].pause_after = 1
    async with contextlib.aclosing(pool.generate(request("a"))) as running:
        await anext(running)
        engines[0].is_up = False
        await pool.probe()
        await pool.probe()
        assert engines[0].session_ends


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
