"""Corrections on a real Redis: each is one job's at a time, and used up by the one that succeeds."""

import pytest

from kiln_common.bus import keys
from kiln_trainer.jobs.errors import CorrectionsTaken
from kiln_trainer.jobs.records import JobFailure
from tests.support.jobs import sft_request

IDS = [f"corr_{digit * 32}" for digit in "abc"]


@pytest.fixture(autouse=True)
def _kept(redis_client, store):
    for correction_id in IDS:
        redis_client.hset(keys.correction(correction_id), mapping={"owner": "", "correction": "x"})


def learning(adapter, *ids, **fields):
    request = sft_request(adapter)
    request.correction_ids.extend(ids)
    for name, value in fields.items():
        setattr(request, name, value)
    return request


def state(client):
    found = [client.hmget(keys.correction(each), "reserved_by", "used_by") for each in IDS]
    return [tuple((value or b"").decode() for value in pair) for pair in found]


def test_a_correction_is_used_up_by_the_job_that_succeeds(store, redis_client):
    job_id = store.submit(learning("a", *IDS[:2]))
    assert [*store.get(job_id).correction_ids] == IDS[:2]
    assert state(redis_client) == [(job_id, ""), (job_id, ""), ("", "")]
    claim = store.claim_next(60, 0)
    store.succeed(claim, {"adapter": "a"})
    store.succeed(claim, {"adapter": "a"})  # told twice, as after a lost answer
    assert state(redis_client) == [("", job_id), ("", job_id), ("", "")]


@pytest.mark.parametrize("kept_as", ["", "job_1"])
def test_a_job_whose_adapter_has_not_learned_them_gives_its_corrections_back(store, redis_client, kept_as):
    """It publishes nothing, or its gate was not passed."""
    store.submit(learning("a", *IDS))
    store.succeed(store.claim_next(60, 0), {"adapter": kept_as})
    assert state(redis_client) == [("", "")] * 3


@pytest.mark.parametrize("end", ["failed", "cancelled in the queue", "cancelled"])
def test_a_job_that_does_not_succeed_gives_its_corrections_back(store, redis_client, end):
    job_id = store.submit(learning("a", *IDS))
    if end == "cancelled in the queue":
        store.cancel(job_id)
    else:
        claim = store.claim_next(60, 0)
        store.fail(claim, JobFailure("c", "m", "h")) if end == "failed" else store.end_cancelled(claim)
    assert state(redis_client) == [("", "")] * 3


def test_a_job_gets_all_of_its_corrections_or_is_not_accepted(store, redis_client):
    first = store.submit(learning("a", IDS[1]))
    for ids in (IDS, ["corr_" + "0" * 32]):
        with pytest.raises(CorrectionsTaken):
            store.submit(learning("b", *ids, idempotency_key="key"))
    assert state(redis_client) == [("", ""), (first, ""), ("", "")]
    assert store.num_queued() == 1
    assert store.submit(learning("b", IDS[0], idempotency_key="key"))  # the key was not used up


def test_a_retry_learns_the_same_and_takes_what_is_free(store, redis_client):
    first = store.submit(learning("a", *IDS[:2]))
    store.fail(store.claim_next(60, 0), JobFailure("c", "m", "h"))
    other = store.submit(learning("b", IDS[0]))
    again = store.submit(learning("a", *IDS[:2], retry_of=first))
    assert [*store.get(again).correction_ids] == [IDS[1]]
    assert state(redis_client) == [(other, ""), (again, ""), ("", "")]


def test_a_correction_deleted_meanwhile_does_not_come_back(store, redis_client):
    store.submit(learning("a", *IDS))
    redis_client.delete(keys.correction(IDS[0]))
    store.succeed(store.claim_next(60, 0), {"adapter": "a"})
    assert not redis_client.exists(keys.correction(IDS[0]))
