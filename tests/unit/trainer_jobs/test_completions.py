"""One draw of many: what passes is tried again, for a while, and the others know nothing of it."""

import pytest

from kiln_common.errors import AdapterNotFound, DeadlineExceeded, EngineUnavailable, KilnError, Overloaded
from kiln_common.pb import engine_pb2
from kiln_common.rpc import to_error_detail
from kiln_trainer.completions import draw

DONE = engine_pb2.SequenceOutput(token_ids=[7], finish_reason=engine_pb2.FINISH_REASON_STOP)
GIVEN_UP = engine_pb2.SequenceOutput(finish_reason=engine_pb2.FINISH_REASON_ABORT)


def refusal(error):
    return engine_pb2.SequenceOutput(
        finish_reason=engine_pb2.FINISH_REASON_ERROR, error=to_error_detail(error)
    )


class Engine:
    """Answers with one of `answers` after another, raised if it is an error; the last one stays."""

    def __init__(self, *answers):
        self.answers = [*answers]
        self.requests = []
        self.waits_s = []
        self.now_s = 0.0

    async def generate(self, request):
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        yield answer

    async def sleep(self, seconds):
        self.waits_s.append(seconds)
        self.now_s += seconds

    async def draw(self, patience_s=60.0):
        request = engine_pb2.GenerateRequest(request_id="r", prompt_token_ids=[1, 2])
        request.sampling.seed = 5
        return await draw(self, request, patience_s, clock=lambda: self.now_s, sleep=self.sleep)


@pytest.mark.parametrize(
    "failure",
    [
        EngineUnavailable("away"),
        DeadlineExceeded("600 s"),
        GIVEN_UP,
        refusal(Overloaded("full")),
        refusal(DeadlineExceeded("600 s")),
    ],
)
async def test_what_passes_is_tried_again_under_a_new_id_with_the_same_seed(failure):
    engine = Engine(failure, failure, DONE)
    assert await engine.draw() == [DONE]
    assert len({request.request_id for request in engine.requests}) == 3
    assert {request.sampling.seed for request in engine.requests} == {5}
    assert {tuple(request.prompt_token_ids) for request in engine.requests} == {(1, 2)}
    assert len(engine.waits_s) == 2
    assert engine.waits_s[0] < engine.waits_s[1]


async def test_an_engine_that_says_when_it_has_room_is_not_asked_before():
    engine = Engine(refusal(Overloaded("full", retry_after_s=3.0)), DONE)
    await engine.draw()
    assert engine.waits_s == [3.0]


async def test_trying_again_has_an_end():
    engine = Engine(refusal(Overloaded("full")))
    with pytest.raises(KilnError, match="full") as caught:
        await engine.draw(patience_s=60.0)
    assert caught.value.code == Overloaded.code
    assert 50 < engine.now_s <= 60
    assert len(engine.requests) < 30


async def test_what_the_engine_refuses_for_good_is_not_tried_again():
    engine = Engine(refusal(AdapterNotFound("no such bytes")))
    with pytest.raises(KilnError, match="no such bytes"):
        await engine.draw()
    assert (len(engine.requests), engine.waits_s) == (1, [])
