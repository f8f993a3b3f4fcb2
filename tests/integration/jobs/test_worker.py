"""The worker thread on a real Redis, with a backend that does no arithmetic."""

import contextlib
import json
import threading

import pytest

from kiln_common.bus import keys
from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import registry_pb2
from kiln_trainer.domain.errors import ClaimLost, DeviceBroken, WeightsLost
from kiln_trainer.jobs.worker import Worker
from tests.support.jobs import ChainBackend, MemoryPublisher, grpo_request, wait_until


@contextlib.contextmanager
def working(store, backend, publisher, folder, *, claim_timeout_s=0.4, patience_s=5.0):
    worker = Worker(store, backend, publisher, folder, claim_timeout_s=claim_timeout_s, patience_s=patience_s)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(60.0)
        assert not worker.is_alive


def ended(store, job_id):
    wait_until(lambda: store.status(job_id) not in ("queued", "running"))
    return store.get(job_id)


def event_types(client, job_id):
    return [fields[b"type"].decode() for _, fields in client.xrange(keys.job_events(job_id))]


@pytest.fixture
def publisher():
    return MemoryPublisher()


def test_a_job_runs_to_its_published_end(store, redis_client, publisher, tmp_path):
    publisher.not_live = ("boot_2",)
    job_id = store.submit(grpo_request("helper", attach=True))
    with working(store, ChainBackend(num_steps=4), publisher, tmp_path):
        job = ended(store, job_id)
        wait_until(lambda: not (tmp_path / job_id).exists())
    assert (job.status, job.result.adapter, job.result.version) == ("succeeded", "helper", 1)
    assert [*job.result.not_live] == ["boot_2"]
    assert job.result.swap_s >= 0
    assert (job.progress.step, job.progress.num_steps, job.progress.num_tokens) == (4, 4, 40)
    assert [point.step for point in job.history] == [1, 2, 3, 4]
    assert job.finished_at_s >= job.started_at_s >= job.created_at_s > 0
    assert event_types(redis_client, job_id) == [
        "queued", "claimed", "started", "step", "step", "checkpoint", "step", "step", "checkpoint",
        "publishing", "published", "succeeded",
    ]  # fmt: skip
    (header,) = publisher.headers
    assert (header.attach, header.publish_key, header.claim_epoch) == (True, job_id, 1)
    assert json.loads(header.metrics_json)["loss"] == 0.25


def test_a_version_says_what_the_versions_that_wrote_its_completions_earned(store, publisher, tmp_path):
    request = grpo_request("helper")
    group = request.grpo.groups[0]
    for version, reward in (("helper@2", 0.0), ("helper@2", 0.5), ("base", 1.0), ("a@1,b@1", 1.0)):
        rollout = group.rollouts.add()
        rollout.CopyFrom(group.rollouts[0])
        rollout.adapter_version, rollout.reward = version, reward
    job_id = store.submit(request)
    with working(store, ChainBackend(num_steps=1), publisher, tmp_path):
        assert ended(store, job_id).status == "succeeded"
    kept = json.loads(publisher.headers[0].metrics_json)
    assert kept["rewards_by_version"] == {
        "helper@2": {"mean": 0.25, "num_completions": 2},
        "base": {"mean": 1.0, "num_completions": 1},
    }
    assert "loss" in kept


def test_the_next_job_of_an_adapter_starts_from_the_version_before(store, publisher, tmp_path):
    backend = ChainBackend(num_steps=1)
    ids = [store.submit(grpo_request("helper", epochs=n)) for n in (1, 2)]
    fresh = store.submit(grpo_request("helper", start_fresh=True))
    named = store.submit(grpo_request("other", base_adapter="helper@1"))
    with working(store, backend, publisher, tmp_path):
        jobs = [ended(store, job_id) for job_id in (*ids, fresh, named)]
    assert [job.resolved_base_adapter for job in jobs] == ["", "helper@1", "", "helper@1"]
    points = [task.starting_point for task in backend.tasks]
    assert [point and point.reference for point in points] == [None, "helper@1", None, "helper@1"]
    assert [h.parent_version for h in publisher.headers] == [0, 1, 0, 1]


def test_a_base_adapter_that_is_not_there_fails_the_job(store, publisher, tmp_path):
    job_id = store.submit(grpo_request("helper", base_adapter="nobody@3"))
    with working(store, ChainBackend(), publisher, tmp_path):
        job = ended(store, job_id)
    assert (job.status, job.error.code) == ("failed", "adapter_not_found")


def test_a_job_that_never_publishes_still_succeeds(store, publisher, tmp_path):
    job_id = store.submit(grpo_request("helper", publish="never"))
    with working(store, ChainBackend(), publisher, tmp_path):
        assert ended(store, job_id).status == "succeeded"
    assert publisher.headers == []


def test_a_cancel_takes_effect_at_the_next_step(store, publisher, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def before_step(step):
        if step == 2:
            reached.set()
            assert go_on.wait(60)

    backend = ChainBackend(num_steps=9, before_step=before_step)
    job_id = store.submit(grpo_request())
    with working(store, backend, publisher, tmp_path):
        assert reached.wait(60)
        store.cancel(job_id)
        go_on.set()
        job = ended(store, job_id)
        wait_until(lambda: not (tmp_path / job_id).exists())
    assert job.status == "cancelled"
    assert backend.steps_taken == [1, 2]
    assert publisher.headers == []


def test_a_cancel_that_comes_while_the_result_is_published_is_too_late(store, publisher, tmp_path):
    """Otherwise a job would be called cancelled whose adapter answers requests."""
    job_id = store.submit(grpo_request("helper", attach=True))
    publisher.before_publish = lambda: store.cancel(job_id)
    with working(store, ChainBackend(), publisher, tmp_path):
        job = ended(store, job_id)
    assert (job.status, job.result.version) == ("succeeded", 1)


def test_a_cancel_before_publishing_is_in_time(store, publisher, tmp_path):
    job_id = store.submit(grpo_request())
    mine = store.claim_next(60.0, 0.0)
    store.cancel(job_id)
    assert store.write(mine, 1, {"is_publishing": "1"}, [])
    store.release(mine)
    with working(store, ChainBackend(), publisher, tmp_path):
        assert ended(store, job_id).status == "cancelled"
    assert publisher.headers == []


def test_a_start_whose_rank_fits_no_slot_fails_before_a_step(store, publisher, tmp_path):
    version = registry_pb2.AdapterVersion(name="wide", version=1, rank=65)
    publisher.known["wide"], publisher.max_rank = [version], 64
    backend = ChainBackend()
    job_id = store.submit(grpo_request("other", base_adapter="wide"))
    with working(store, backend, publisher, tmp_path):
        job = ended(store, job_id)
    assert (job.status, job.error.code) == ("failed", "adapter_rank_too_high")
    assert backend.steps_taken == []


def test_an_idle_worker_has_the_weights_mapped(store, publisher, tmp_path):
    backend = ChainBackend()
    with working(store, backend, publisher, tmp_path):
        wait_until(lambda: backend.num_idle_calls > 1)


def test_a_broken_device_ends_the_worker_and_another_goes_on_with_the_job(
    store, other_store, publisher, tmp_path, monkeypatch
):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the process would print it and end

    def before_step(step):
        if step == 4:
            raise DeviceBroken("illegal memory access")

    job_id = store.submit(grpo_request())
    broken, sound = ChainBackend(before_step=before_step), ChainBackend()
    with working(store, broken, publisher, tmp_path) as worker:
        wait_until(lambda: not worker.is_alive)
    assert isinstance(worker.failure, DeviceBroken)
    assert store.status(job_id) == "running"
    with working(other_store, sound, publisher, tmp_path):
        assert ended(store, job_id).status == "succeeded"
    assert sound.steps_taken == [3, 4]


def test_a_step_that_outlasts_the_stop_is_not_held_against_its_job(store, other_store, publisher, tmp_path):
    began, go_on = threading.Event(), threading.Event()

    def before_step(step):
        began.set()
        assert go_on.wait(60)

    store.submit(grpo_request())
    backend = ChainBackend(before_step=before_step)
    with working(store, backend, publisher, tmp_path, claim_timeout_s=60.0) as worker:
        assert began.wait(60)
        worker.stop(0.05)
        assert worker.is_alive
        again = other_store.claim_next(60.0, 0.0)
        assert (again.claim_epoch, again.num_crashes) == (2, 0)
        go_on.set()


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), "trainer_out_of_memory"), (ZeroDivisionError("by zero"), "job_failed")],
)
def test_an_error_fails_its_job_and_not_the_worker(store, publisher, tmp_path, error, code):
    errors = [error]

    def before_step(step):
        if errors:
            raise errors.pop()

    bad, good = store.submit(grpo_request("a")), store.submit(grpo_request("b"))
    with working(store, ChainBackend(before_step=before_step), publisher, tmp_path):
        job = ended(store, bad)
        assert (job.status, job.error.code) == ("failed", code)
        assert job.error.hint
        assert ended(store, good).status == "succeeded"


def test_a_lost_engine_is_waited_for_and_the_job_goes_on_under_the_same_claim(store, publisher, tmp_path):
    losses = [3, 3, 4]

    def before_step(step):
        if losses and step == losses[0]:
            losses.pop(0)
            raise WeightsLost("the engine is gone")

    backend = ChainBackend(num_steps=4, before_step=before_step)
    job_id = store.submit(grpo_request())
    with working(store, backend, publisher, tmp_path):
        job = ended(store, job_id)
    assert (job.status, job.claim_epoch) == ("succeeded", 1)
    assert backend.steps_taken == [1, 2, 3, 3, 4]  # from the checkpoint of step 2 each time
    assert [point.step for point in job.history] == [1, 2, 3, 4]


def test_an_engine_that_stays_away_fails_the_job_in_the_end(store, publisher, tmp_path):
    def before_step(step):
        raise WeightsLost("the engine is gone")

    job_id = store.submit(grpo_request())
    with working(store, ChainBackend(before_step=before_step), publisher, tmp_path, patience_s=0.5):
        job = ended(store, job_id)
    assert (job.status, job.error.code) == ("failed", "weights_lost")


def test_an_absent_registry_is_waited_for(store, publisher, tmp_path):
    outages = [RegistryUnavailable("away")] * 3

    def before_publish():
        if outages:
            raise outages.pop()

    publisher.before_publish = before_publish
    job_id = store.submit(grpo_request())
    with working(store, ChainBackend(), publisher, tmp_path):
        assert ended(store, job_id).status == "succeeded"
    assert len(publisher.headers) == 1


def test_a_long_step_keeps_its_claim(store, other_store, redis_client, publisher, tmp_path):
    began, go_on = threading.Event(), threading.Event()

    def before_step(step):
        began.set()
        assert go_on.wait(60)

    job_id = store.submit(grpo_request())
    with working(store, ChainBackend(before_step=before_step), publisher, tmp_path):
        assert began.wait(60)
        claimed_at_s = redis_client.zscore(keys.JOB_RUNNING, job_id)
        wait_until(lambda: redis_client.zscore(keys.JOB_RUNNING, job_id) > claimed_at_s + 1.0)
        seconds, microseconds = redis_client.time()
        # Another trainer that bears no more silence than there would have been without the heartbeats.
        assert other_store.claim_next(seconds + microseconds / 1e6 - claimed_at_s, 0.0) is None
        go_on.set()
        assert ended(store, job_id).claim_epoch == 1


def test_a_job_taken_over_is_let_go_of(store, other_store, publisher, tmp_path):
    began, go_on = threading.Event(), threading.Event()

    def before_step(step):
        began.set()
        assert go_on.wait(60)

    backend = ChainBackend(before_step=before_step)
    job_id = store.submit(grpo_request())
    with working(store, backend, publisher, tmp_path, claim_timeout_s=60.0) as worker:
        assert began.wait(60)
        stolen = other_store.claim_next(0.0, 0.0)
        assert stolen.claim_epoch == 2
        go_on.set()
        wait_until(lambda: not worker.running_job_id)
        assert store.status(job_id) == "running"  # the new claim's to end
        assert (tmp_path / job_id).exists()
        other_store.end_cancelled(stolen)
    assert backend.steps_taken == [1]
    assert publisher.headers == []


def test_a_stopped_worker_hands_its_job_to_the_next(store, other_store, publisher, tmp_path):
    undisturbed = ChainBackend(num_steps=6)
    alone = store.submit(grpo_request("helper"))
    with working(store, undisturbed, publisher, tmp_path):
        wanted = ended(store, alone).result.sha256

    reached = threading.Event()
    worker_box = []

    def before_step(step):
        if step == 4:
            worker_box[0]._stopping.set()
            reached.set()

    job_id = store.submit(grpo_request("helper"))
    first, second = ChainBackend(num_steps=6, before_step=before_step), ChainBackend(num_steps=6)
    with working(store, first, publisher, tmp_path, claim_timeout_s=60.0) as worker:
        worker_box.append(worker)
        assert reached.wait(60)
    with working(other_store, second, publisher, tmp_path, claim_timeout_s=60.0):
        job = ended(store, job_id)
    assert first.steps_taken == [1, 2, 3, 4]
    assert second.steps_taken == [3, 4, 5, 6]
    assert (job.status, job.claim_epoch, job.result.version) == ("succeeded", 2, 2)
    assert job.result.sha256 == wanted


def test_a_claim_lost_between_publishing_and_the_end_publishes_once(store, other_store, publisher, tmp_path):
    """What a SIGKILL there does: the version is out, the job is not ended, another trainer repeats."""

    def before_live():
        publisher.before_live = lambda: None
        raise ClaimLost("as if the process had died here")

    publisher.before_live = before_live
    job_id = store.submit(grpo_request())
    with working(store, ChainBackend(), publisher, tmp_path) as worker:
        wait_until(lambda: publisher.num_publish_calls == 1 and not worker.running_job_id)
        worker._stopping.set()
    if store.status(job_id) == "running":
        with working(other_store, ChainBackend(), publisher, tmp_path, claim_timeout_s=0.2):
            ended(store, job_id)
    job = store.get(job_id)
    assert (job.status, job.result.version) == ("succeeded", 1)
    assert publisher.num_publish_calls == 2
    assert len(publisher.headers) == 1


def test_a_resumed_job_keeps_the_base_it_began_with(store, other_store, publisher, tmp_path):
    seed = store.submit(grpo_request("helper"))
    with working(store, ChainBackend(num_steps=1), publisher, tmp_path):
        ended(store, seed)
    job_id = store.submit(grpo_request("other", base_adapter="helper"))
    mine = store.claim_next(60.0, 0.1)
    assert mine.job_id == job_id
    store.write(mine, 1, {"resolved_base": "helper@1"}, [])
    store.release(mine)
    newer = store.submit(grpo_request("helper", epochs=2))
    backend = ChainBackend(num_steps=1)
    publisher.known["helper"].append(publisher.known["helper"][0])  # "helper" means more now
    with working(other_store, backend, publisher, tmp_path):
        assert ended(store, job_id).resolved_base_adapter == "helper@1"
        ended(store, newer)
    assert backend.tasks[0].starting_point.reference == "helper@1"


def test_a_job_that_kills_its_trainer_again_and_again_is_given_up(store, publisher, tmp_path):
    job_id = store.submit(grpo_request())
    for _ in range(3):
        assert store.claim_next(0.0, 0.0).job_id == job_id  # and then silence
    assert store.claim_next(60.0, 0.0) is None
    with working(store, ChainBackend(), publisher, tmp_path, claim_timeout_s=0.1):
        job = ended(store, job_id)
    assert (job.status, job.error.code) == ("failed", "job_crashed_trainer")
    assert publisher.headers == []


def test_checkpoints_of_ended_jobs_are_swept_at_the_start(store, publisher, tmp_path):
    kept = store.submit(grpo_request("a"))
    store.claim_next(60.0, 0.0)
    for name in (kept, "job_of_old"):
        (tmp_path / name).mkdir()
    with working(store, ChainBackend(), publisher, tmp_path, claim_timeout_s=60.0):
        wait_until(lambda: not (tmp_path / "job_of_old").exists())
    assert (tmp_path / kept).exists()
