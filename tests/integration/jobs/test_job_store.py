"""The queue on a real Redis: acceptance, order, claims, fencing, ends."""

import json
import time

import pytest

from kiln_common.bus import keys
from kiln_common.errors import IdempotencyConflict, JobNotFound, QueueNotDurable
from kiln_trainer.domain.errors import ClaimLost
from kiln_trainer.jobs.durability import check_durable
from kiln_trainer.jobs.errors import PayloadCorrupt
from kiln_trainer.jobs.records import JobFailure
from kiln_trainer.jobs.store import JobStore
from tests.support.jobs import grpo_request, sft_request, wait_until

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
    assert store.read_payload(claimed) == request


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


def test_the_same_key_gives_the_same_job_and_another_body_a_conflict(store, redis_client):
    request = grpo_request()
    request.idempotency_key = "key"
    first = store.submit(request)
    assert store.submit(request) == first
    assert redis_client.xlen(keys.JOB_QUEUE) == 1
    request.config.epochs = 2
    with pytest.raises(IdempotencyConflict):
        store.submit(request)
    assert len(store.list_jobs(0)) == 1


def test_submitting_again_under_the_same_id_queues_once(store, redis_client):
    for _ in range(2):
        store.submit(grpo_request(), "job_1")
    assert redis_client.xlen(keys.JOB_QUEUE) == 1
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
    # Idle time has passed whenever the other looks; only the heartbeat in between resets it.
    idle_ms = store._redis.xpending_range(keys.JOB_QUEUE, keys.JOB_GROUP, "-", "+", 1)[0]
    assert idle_ms["consumer"] == b"trainer_a"
    store._redis.xclaim(keys.JOB_QUEUE, keys.JOB_GROUP, "trainer_a", 0, [mine.entry_id], idle=60_000)
    store.heartbeat(mine)
    assert claim(other_store, 30.0) is None
    store._redis.xclaim(keys.JOB_QUEUE, keys.JOB_GROUP, "trainer_a", 0, [mine.entry_id], idle=60_000)
    assert claim(other_store, 30.0).claim_epoch == 2


def test_jobs_of_one_adapter_wait_for_each_other(store, other_store):
    first, second, third = (store.submit(grpo_request("helper", epochs=n)) for n in (1, 2, 3))
    elsewhere = store.submit(grpo_request("other"))
    running = claim(store)
    assert running.job_id == first
    assert claim(other_store) is None  # handed the second: it must wait
    assert claim(other_store) is None  # and the third
    assert claim(other_store).job_id == elsewhere
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
    assert redis_client.xlen(keys.JOB_QUEUE) == 0
    assert redis_client.xpending(keys.JOB_QUEUE, keys.JOB_GROUP)["pending"] == 0


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
    for key in (keys.job(open_), keys.job_payload(open_), keys.job_events(open_), keys.JOB_QUEUE):
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


def test_trainers_that_never_came_back_leave_the_group(store, redis_client):
    store.submit(grpo_request())
    held = claim(store)
    for name in ("trainer_gone", "trainer_b"):
        redis_client.xgroup_createconsumer(keys.JOB_QUEUE, keys.JOB_GROUP, name)
    impatient = JobStore(redis_client, "trainer_c", retention_s=0)

    def names():
        return {c["name"] for c in redis_client.xinfo_consumers(keys.JOB_QUEUE, keys.JOB_GROUP)}

    store.forget_expired()
    assert names() == {b"trainer_a", b"trainer_b", b"trainer_gone"}
    wait_until(lambda: impatient.forget_expired() or names() == {b"trainer_a"})  # it holds a job
    store.heartbeat(held)


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
