"""Several trainers of one queue: any that answers will do, and what is asked twice happens once."""

import asyncio

import pytest

from kiln_common.errors import JobNotFound, QueueUnavailable, TrainerUnavailable
from kiln_common.pb import trainer_pb2
from kiln_gateway import trainer_pool
from kiln_gateway.trainer_pool import TrainerPool


class Trainer:
    """Answers with its name; away, it raises. `told` is what a watch tells before it breaks."""

    def __init__(self, name):
        self.name = name
        self.is_up = True
        self.asked = []
        self.told = []
        self.num_watched = 0

    def _check(self):
        if not self.is_up:
            raise TrainerUnavailable(f"{self.name} is away")

    async def submit(self, request):
        self.asked.append(request.idempotency_key)
        self._check()
        return self.name

    retry = submit

    async def get(self, job_id):
        self.asked.append(job_id)
        self._check()
        if job_id == "unknown":
            raise JobNotFound("no such job")
        return self.name

    async def watch(self, job_id, after_event_id=""):
        self.asked.append(after_event_id)
        self.num_watched += 1
        try:
            for event_id in self.told:
                if event_id > after_event_id:
                    yield trainer_pb2.JobEvent(id=event_id)
            self._check()
        finally:
            self.num_watched -= 1

    async def status(self):
        self._check()
        return trainer_pb2.TrainerStatus(trainer_id=self.name)


class Hanging(Trainer):
    """Is there, and says nothing."""

    async def status(self):
        await asyncio.Event().wait()


@pytest.fixture
def trainers():
    return [Trainer("first"), Trainer("second")]


async def test_calls_begin_with_one_that_says_how_it_is(trainers, monkeypatch):
    monkeypatch.setattr(trainer_pool, "STATUS_TIMEOUT_S", 0.05)
    hanging = Hanging("hanging")
    pool = TrainerPool([hanging, trainers[1]])
    assert [status and status.trainer_id for status in await pool.statuses()] == [None, "second"]
    assert await pool.get("job_1") == "second"
    assert hanging.asked == []


async def test_one_that_is_away_is_passed_over_until_the_other_is(trainers):
    pool = TrainerPool(trainers)
    assert await pool.get("a") == "first"
    trainers[0].is_up = False
    assert [await pool.get("a") for _ in range(3)] == ["second"] * 3
    assert trainers[0].asked == ["a", "a"]  # not asked again and again
    trainers[0].is_up, trainers[1].is_up = True, False
    assert await pool.get("a") == "first"


async def test_when_none_answers_the_call_says_so(trainers):
    for trainer in trainers:
        trainer.is_up = False
    with pytest.raises(TrainerUnavailable):
        await TrainerPool(trainers).get("a")
    assert [len(trainer.asked) for trainer in trainers] == [1, 1]


async def test_an_answer_that_is_an_error_is_an_answer(trainers):
    with pytest.raises(JobNotFound):
        await TrainerPool(trainers).get("unknown")
    assert trainers[1].asked == []


@pytest.mark.parametrize(
    ("method", "message"),
    [("submit", trainer_pb2.SubmitRequest()), ("retry", trainer_pb2.RetryJobRequest())],
)
async def test_a_job_handed_over_twice_has_one_key(trainers, method, message):
    trainers[0].is_up = False
    pool = TrainerPool(trainers)
    assert await getattr(pool, method)(message) == "second"
    assert trainers[0].asked == trainers[1].asked != [""]
    message.idempotency_key = "the client's"
    await getattr(pool, method)(message)
    assert trainers[1].asked[-1] == "the client's"


async def test_a_watch_goes_on_after_the_last_event(trainers):
    trainers[0].told, trainers[1].told = ["1", "2"], ["1", "2", "3"]
    trainers[0].is_up = False
    events = [event.id async for event in TrainerPool(trainers).watch("a")]
    assert events == ["1", "2", "3"]
    assert trainers[1].asked == ["2"]


async def test_a_watch_that_is_closed_ends_at_the_trainer(trainers):
    trainers[0].told = ["1", "2"]
    watch = TrainerPool(trainers).watch("a")
    assert (await anext(watch)).id == "1"
    assert trainers[0].num_watched == 1
    await watch.aclose()
    assert trainers[0].num_watched == 0


async def test_each_says_how_it_is(trainers):
    trainers[0].is_up = False
    first, second = await TrainerPool(trainers).statuses()
    assert (first, second.trainer_id) == (None, "second")

    async def refused():
        raise QueueUnavailable("Redis is away")

    trainers[1].status = refused
    assert await TrainerPool(trainers).statuses() == [None, None]
    with pytest.raises(QueueUnavailable):
        await TrainerPool(trainers[1:]).status()
