"""The queue on a real Redis: acceptance, order, claims, fencing, ends."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kiln_common.bus import keys
from kiln_common.errors import IdempotencyConflict, JobNotFound, QueueNotDurable
from kiln_trainer.domain.errors import ClaimLost
from kiln_trainer.jobs.durability import check_durable
from kiln_trainer.jobs.errors import PayloadCorrupt
from kiln_trainer.jobs.records import JobFailure
from tests.support.jobs import WAIT_S, grpo_request, sft_request, wait_until

NEVER_S = 3600.0  # claim timeout under which no job is taken over
AT_ONCE_S = 0.0


def claim(store, claim_timeout_s=NEVER_S):
    return store.claim_next(claim_timeout_s, 0.0)


def event_types(client, job_id):
    return [fields[b"type"].decode() for _, fields in client.xrange(keys.job_events(job_id))]


def test_an_accepted_job_can_be_read_back(store):
    request = grpo_request("helper", metadata_json='{"a": 1}')
    job = store.get(store.submit(request))
    assert (job.status, job.kind, job.queue_position) == ("queued", "grpo", 0)
    assert job.config == request.config
    assert job.grpo_loss.type == request.grpo.loss.type
    assert (job.grpo_loss.kl_estimator, job.grpo_loss.importance_cap) == ("k3", 2.0)  # the defaults
    assert dict(job.sources) == {"rollout": 2}
    assert job.created_at_s > 0
    claimed = claim(store)
    assert store.read_payload(claimed.job_id) == request


def test_jobs_run_in_order_of_acceptance(store):
    ids = [store.submit(grpo_request(name)) for name in ("a", "b", "c")]
    assert [store.get(job_id).queue_position for job_id in ids] == [0, 1, 2]
    assert [job.id for job in store.list_jobs(0)] == ids[::-1]
    assert [job.id for job in store.list_jobs(1)] == ids[-1:]
    assert store.num_queued() == 3
    claimed = [claim(store), claim(store)]
    assert [c.job_id for c in claimed] == ids[:2]
    assert store.get(ids[0]).status == "running"
    assert store.get(ids[2]).queue_position == 0
    assert claim(store).job_id == ids[2]
    assert claim(store) is None


def owned(owner, adapter, **config):
    request = grpo_request(adapter, **config)
    request.owner = owner
    return request


def run_order(store):
    """Adapters in the order in which one trainer runs their jobs."""
    order = []
    while (mine := claim(store)) is not None:
        order.append(mine.adapter)
        store.succeed(mine, {})
    return order


def test_keys_alternate_however_much_one_of_them_has_queued(store):
    for number in range(4):
        store.submit(owned("greedy", f"g{number}"))
    first = claim(store)
    for number in range(2):
        store.submit(owned("modest", f"m{number}"))
    expected = ["g1", "m0", "g2", "m1", "g3"]
    assert [job.config.adapter for job in store.list_open()] == ["g0", *expected]
    store.succeed(first, {})
    assert run_order(store) == expected


def test_a_key_that_waited_for_nothing_does_not_run_ahead(store):
    for number in range(3):
        store.submit(owned("early", f"e{number}"))
    store.succeed(claim(store), {})
    store.succeed(claim(store), {})
    for number in range(3):
        store.submit(owned("late", f"l{number}"))
    assert run_order(store) == ["e2", "l0", "l1", "l2"]


def test_a_cancelled_jobs_place_goes_to_the_next_of_its_key(store):
    ids = [store.submit(owned("one", f"o{number}")) for number in range(4)]
    for number in range(2):
        store.submit(owned("two", f"t{number}"))
    for job_id in ids[:2]:
        store.cancel(job_id)
    assert run_order(store) == ["o2", "t0", "o3", "t1"]


def test_a_lower_priority_number_runs_first_and_jobs_of_one_adapter_in_order(store):
    store.submit(owned("", "usual"))
    store.submit(owned("", "patient", priority=10))
    store.submit(owned("", "urgent", priority=-10, epochs=1))
    store.submit(owned("", "patient", priority=-5))  # waits for the one before it all the same
    assert run_order(store) == ["urgent", "usual", "patient", "patient"]


def test_jobs_are_listed_by_status(store):
    ended, running, queued = (store.submit(sft_request(name)) for name in "abc")
    store.succeed(claim(store), {})
    claim(store)
    assert [job.id for job in store.list_jobs(0, ["queued"])] == [queued]
    assert [job.id for job in store.list_jobs(0, ["running", "succeeded"])] == [running, ended]
    assert [job.id for job in store.list_jobs(1, ["running", "succeeded"])] == [running]
    assert [job.id for job in store.list_open()] == [running, queued]


def test_a_waiting_trainer_gets_a_job_as_soon_as_there_is_one(store, other_store):
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other_store.claim_next, NEVER_S, WAIT_S)
        job_id = store.submit(grpo_request())
        assert waiting.result(WAIT_S / 2).job_id == job_id


def test_the_same_key_gives_the_same_job_and_another_body_a_conflict(store, redis_client):
    request = grpo_request()
    request.idempotency_key = "key"
    first = store.submit(request)
    assert store.submit(request) == first
    assert redis_client.zcard(keys.JOB_QUEUED) == 1
    request.config.epochs = 2
    with pytest.raises(IdempotencyConflict):
        store.submit(request)
    assert len(store.list_jobs(0)) == 1


def test_submitting_again_under_the_same_id_queues_once(store, redis_client):
    for _ in range(2):
        store.submit(grpo_request(), "job_1")
    assert redis_client.zcard(keys.JOB_QUEUED) == 1
    assert event_types(redis_client, "job_1") == ["queued"]


def test_a_silent_trainers_job_is_taken_over_and_fenced(store, other_store, redis_client):
    job_id = store.submit(grpo_request())
    old = claim(store)
    assert claim(other_store) is None
    new = claim(other_store, AT_ONCE_S)
    assert (new.job_id, new.claim_epoch, new.num_crashes) == (job_id, old.claim_epoch + 1, 1)
    for call in (
        lambda: store.heartbeat(old),
        lambda: store.write(old, 1, {"metrics": "{}"}, [("step", {}, 1.0)]),
        lambda: store.succeed(old, {"version": 9}),
        lambda: store.fail(old, JobFailure("c", "m", "h")),
    ):
        with pytest.raises(ClaimLost):
            call()
    assert event_types(redis_client, job_id) == ["queued", "claimed", "claimed"]
    other_store.succeed(new, {"adapter": "helper", "version": 1})
    job = store.get(job_id)
    assert (job.status, job.result.version, job.claim_epoch) == ("succeeded", 1, 2)


def test_a_heartbeat_keeps_the_claim(store, other_store):
    store.submit(grpo_request())
    mine = claim(store)
    a_minute_ago = {mine.job_id: time.time() - 60}
    # Silent for too long whenever the other looks; only the heartbeat in between resets it.
    store._redis.zadd(keys.JOB_RUNNING, a_minute_ago)
    store.heartbeat(mine)
    assert claim(other_store, 30.0) is None
    store._redis.zadd(keys.JOB_RUNNING, a_minute_ago)
    assert claim(other_store, 30.0).claim_epoch == 2


def test_jobs_of_one_adapter_wait_for_each_other(store, other_store):
    first, second, third = (store.submit(grpo_request("helper", epochs=n)) for n in (1, 2, 3))
    elsewhere = store.submit(grpo_request("other"))
    running = claim(store)
    assert running.job_id == first
    assert claim(other_store).job_id == elsewhere  # the second and third must wait
    assert claim(other_store) is None
    assert store.get(second).status == "queued"
    store.cancel(second)  # one that waits can be cancelled
    assert store.get(second).status == "cancelled"
    store.fail(running, JobFailure("c", "m", "h"))
    assert claim(other_store).job_id == third
    assert claim(other_store) is None


def test_a_released_job_is_taken_at_once_and_without_blame(store, other_store):
    store.submit(grpo_request())
    store.release(claim(store))
    again = claim(other_store, 10.0)
    assert (again.claim_epoch, again.num_crashes) == (2, 0)


def test_a_write_is_applied_once(store, redis_client):
    job_id = store.submit(grpo_request())
    mine = claim(store)
    for _ in range(2):
        store.write(
            mine, 1, {"metrics": '{"loss": 2.0}'}, [("step", {"step": 1, "metrics": {"loss": 2.0}}, 5.0)]
        )
    assert event_types(redis_client, job_id) == ["queued", "claimed", "step"]
    assert store.get(job_id).metrics["loss"] == 2.0
    assert [point.step for point in store.get(job_id).history] == [1]


def test_cancelling(store, redis_client):
    queued, running = store.submit(grpo_request("a")), store.submit(grpo_request("b"))
    store.cancel(queued)
    assert store.get(queued).status == "cancelled"
    assert event_types(redis_client, queued) == ["queued", "cancelled"]
    mine = claim(store)
    assert mine.job_id == running
    assert not store.heartbeat(mine)
    store.cancel(running)
    assert store.get(running).status == "running"
    assert store.heartbeat(mine)
    store.end_cancelled(mine)
    assert store.get(running).status == "cancelled"
    with pytest.raises(JobNotFound):
        store.cancel("job_none")


def test_an_end_is_final(store, redis_client):
    job_id = store.submit(grpo_request())
    mine = claim(store)
    store.succeed(mine, {"version": 1})
    store.succeed(mine, {"version": 2})  # the answer to the first may have been lost
    with pytest.raises(ClaimLost):
        store.fail(mine, JobFailure("c", "m", "h"))
    store.cancel(job_id)
    job = store.get(job_id)
    assert (job.status, job.result.version) == ("succeeded", 1)
    assert event_types(redis_client, job_id)[-1] == "succeeded"
    assert not redis_client.exists(keys.JOB_RUNNING, keys.JOB_QUEUED)


def test_ended_jobs_expire_and_open_ones_never(store, redis_client):
    request = sft_request("a")
    request.idempotency_key = "key"
    ended, open_ = store.submit(request), store.submit(sft_request("b"))
    store.succeed(claim(store), {})
    for key in (
        keys.job(ended),
        keys.job_payload(ended),
        keys.job_events(ended),
        keys.job_idempotency("key"),
    ):
        assert 0 < redis_client.ttl(key) <= 60
    for key in (keys.job(open_), keys.job_payload(open_), keys.job_events(open_), keys.JOB_QUEUED):
        assert redis_client.ttl(key) == -1
    redis_client.delete(keys.job(ended))
    assert [job.id for job in store.list_jobs(0)] == [open_]
    store.forget_expired()
    assert redis_client.zcard(keys.JOB_INDEX) == 2  # younger than what expires
    for job_id in (ended, open_):
        redis_client.zadd(keys.JOB_INDEX, {job_id: time.time() - 61})
    store.forget_expired()
    assert redis_client.zrange(keys.JOB_INDEX, 0, -1) == [open_.encode()]
    assert store.submit(request) != ended  # its key is free again


def test_jobs_that_an_earlier_kiln_left_in_its_stream_are_taken_over(store, redis_client):
    running, queued = (store.submit(grpo_request(name)) for name in "ab")
    claim(store)
    redis_client.delete(keys.JOB_RUNNING, keys.JOB_TURNS, keys.owner_queue(0, ""))
    redis_client.xadd(keys.FORMER_JOB_QUEUE, {"job_id": running})
    for number, job_id in enumerate((running, queued)):
        redis_client.hdel(keys.job(job_id), "priority", "owner")
        redis_client.zadd(keys.JOB_QUEUED, {job_id: number}, xx=True)
    for _ in range(2):
        store.adopt_from_stream()
    assert not redis_client.exists(keys.FORMER_JOB_QUEUE)
    assert [claim(store).job_id, claim(store).job_id] == [running, queued]


def test_a_damaged_payload_is_noticed(store, redis_client):
    job_id = store.submit(grpo_request())
    redis_client.append(keys.job_payload(job_id), b"x")
    with pytest.raises(PayloadCorrupt):
        store.read_payload(claim(store))


def test_failure_is_told(store):
    job_id = store.submit(grpo_request())
    store.fail(claim(store), JobFailure("code", "message", "hint"))
    error = store.get(job_id).error
    assert (error.code, error.message, error.hint) == ("code", "message", "hint")


def test_a_result_is_kept_as_json(store, redis_client):
    job_id = store.submit(grpo_request())
    store.succeed(claim(store), {"adapter": "helper", "version": 3, "not_live": ["boot"], "swap_s": 0.5})
    assert json.loads(redis_client.hget(keys.job(job_id), "result"))["not_live"] == ["boot"]
    assert [*store.get(job_id).result.not_live] == ["boot"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [("appendonly", "no"), ("appendfsync", "everysec"), ("maxmemory-policy", "allkeys-lru")],
)
def test_a_redis_that_could_lose_jobs_is_refused(redis_client, setting, value):
    check_durable(redis_client)
    good = redis_client.config_get(setting)[setting]
    redis_client.config_set(setting, value)
    try:
        with pytest.raises(QueueNotDurable, match=value):
            check_durable(redis_client)
    finally:
        redis_client.config_set(setting, good)
        # The server refuses to stop while it writes its first append-only file.
        wait_until(lambda: redis_client.info("persistence")["aof_rewrite_in_progress"] == 0)
    check_durable(redis_client)
