"""Versions that a job publishes before its end, and what a cancel does with them."""

import threading

import pytest

from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import registry_pb2
from kiln_trainer.domain.errors import DeviceBroken
from tests.integration.jobs.test_worker import ended, event_types, working
from tests.support.jobs import ChainBackend, MemoryPublisher, grpo_request
from tests.support.registry import MODEL_HASH


@pytest.fixture
def publisher():
    return MemoryPublisher()


def every(steps, **config):
    return grpo_request("helper", publish=str(steps), attach=True, **config)


class Held:
    """Holds a backend before `step` until it is let go."""

    def __init__(self, step):
        self.step, self.reached, self.go_on = step, threading.Event(), threading.Event()

    def __call__(self, step):
        if step == self.step:
            self.reached.set()
            assert self.go_on.wait(60)


def numbers(publisher):
    return [version.version for version in publisher.known.get("helper", [])]


def test_a_version_every_n_steps_and_one_at_the_end(store, redis_client, publisher, tmp_path):
    job_id = store.submit(every(2))
    with working(store, ChainBackend(num_steps=5), publisher, tmp_path):
        job = ended(store, job_id)
    assert [(each.step, each.version) for each in job.published] == [(2, 1), (4, 2), (5, 3)]
    assert [each.sha256 for each in job.published] == [v.sha256 for v in publisher.known["helper"]]
    assert (job.result.version, publisher.default) == (3, "helper@3")
    assert len({each.sha256 for each in job.published}) == 3
    keys = [header.publish_key for header in publisher.headers]
    assert keys == [f"{job_id}:2", f"{job_id}:4", job_id]
    types = event_types(redis_client, job_id)
    assert (types.count("published"), types.count("publishing")) == (3, 1)


def test_a_resumed_job_publishes_each_of_its_versions_once(store, other_store, publisher, tmp_path):
    failed = []

    def fail_once(step):
        if step == 4 and not failed:
            failed.append(step)
            raise DeviceBroken("gone")

    job_id = store.submit(every(1, checkpoint_every=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)
        with working(store, ChainBackend(before_step=fail_once), publisher, tmp_path) as worker:
            worker._thread.join(60)
    with working(other_store, ChainBackend(), publisher, tmp_path):
        job = ended(store, job_id)
    assert [(each.step, each.version) for each in job.published] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert numbers(publisher) == [1, 2, 3, 4]


def test_a_resumed_job_goes_on_where_a_version_was_deleted_meanwhile(store, other_store, publisher, tmp_path):
    failed = []

    def fail_once(step):
        if step == 4 and not failed:
            failed.append(step)
            raise DeviceBroken("gone")

    job_id = store.submit(grpo_request("helper", publish="1", checkpoint_every=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda args: None)
        with working(store, ChainBackend(before_step=fail_once), publisher, tmp_path) as worker:
            worker._thread.join(60)
    publisher.withdraw("helper", 3)
    with working(other_store, ChainBackend(), publisher, tmp_path):
        job = ended(store, job_id)
    assert (job.status, job.result.version) == ("succeeded", 4)
    assert numbers(publisher) == [1, 2, 4]


def test_a_cancel_keeps_what_was_published(store, publisher, tmp_path):
    held = Held(4)
    job_id = store.submit(every(2))
    with working(store, ChainBackend(num_steps=9, before_step=held), publisher, tmp_path):
        assert held.reached.wait(60)
        store.cancel(job_id)
        held.go_on.set()
        job = ended(store, job_id)
    assert (job.status, [each.version for each in job.published]) == ("cancelled", [1])
    assert (numbers(publisher), publisher.default) == ([1], "helper@1")


@pytest.mark.parametrize("before", ["", "older@3"])
def test_a_cancel_that_discards_gives_the_default_back(store, redis_client, publisher, tmp_path, before):
    older = registry_pb2.AdapterVersion(name="older", version=3, job_id="job_else")
    mine = registry_pb2.AdapterVersion(
        name="helper", version=1, job_id="job_else", base_model_hash=MODEL_HASH
    )
    publisher.known, publisher.default = {"older": [older], "helper": [mine]}, before
    held = Held(6)
    job_id = store.submit(every(2))
    with working(store, ChainBackend(num_steps=9, before_step=held), publisher, tmp_path):
        assert held.reached.wait(60)
        assert (numbers(publisher), publisher.default) == ([1, 2, 3], "helper@3")
        store.cancel(job_id, discards=True)
        held.go_on.set()
        job = ended(store, job_id)
    assert (job.status, [*job.published]) == ("cancelled", [])
    assert (numbers(publisher), publisher.default) == ([1], before)
    assert "discarded" in event_types(redis_client, job_id)


def test_a_default_that_somebody_else_chose_stays(store, publisher, tmp_path):
    publisher.known["other"] = [registry_pb2.AdapterVersion(name="other", version=1)]
    held = Held(4)
    job_id = store.submit(every(2))
    with working(store, ChainBackend(num_steps=9, before_step=held), publisher, tmp_path):
        assert held.reached.wait(60)
        publisher.attach("other@1")
        store.cancel(job_id, discards=True)
        held.go_on.set()
        ended(store, job_id)
    assert (numbers(publisher), publisher.default) == ([], "other@1")


def test_a_default_that_an_admin_made_of_it_stays(store, publisher, tmp_path):
    """The job may not attach: it may not detach either, and still ends."""
    held = Held(6)
    job_id = store.submit(grpo_request("helper", publish="2"))
    with working(store, ChainBackend(num_steps=9, before_step=held), publisher, tmp_path):
        assert held.reached.wait(60)
        publisher.attach("helper@1")
        store.cancel(job_id, discards=True)
        held.go_on.set()
        job = ended(store, job_id)
    assert (job.status, [each.version for each in job.published]) == ("cancelled", [1])
    assert (numbers(publisher), publisher.default) == ([1], "helper@1")


def test_a_version_attached_while_it_is_discarded_stays(store, publisher, tmp_path):
    held = Held(6)
    attach = publisher.attach

    def attach_then_another(reference):
        attach(reference)
        attach("helper@1")

    job_id = store.submit(every(2))
    with working(store, ChainBackend(num_steps=9, before_step=held), publisher, tmp_path):
        assert held.reached.wait(60)
        publisher.attach = attach_then_another
        store.cancel(job_id, discards=True)
        held.go_on.set()
        job = ended(store, job_id)
    assert (job.status, [each.version for each in job.published]) == ("cancelled", [1])
    assert (numbers(publisher), publisher.default) == ([1], "helper@1")


def test_a_version_whose_record_was_lost_is_discarded_too(store, publisher, tmp_path):
    """The trainer died after the registry's commit, and was asked to cancel before the next one came."""
    job_id = store.submit(every(2))
    store.release(store.claim_next(60.0, 0.0))
    publisher.known["helper"] = [registry_pb2.AdapterVersion(name="helper", version=1, job_id=job_id)]
    store.cancel(job_id, discards=True)
    with working(store, ChainBackend(), publisher, tmp_path):
        assert ended(store, job_id).status == "cancelled"
    assert numbers(publisher) == []


def test_a_discard_that_the_registry_does_not_answer_fails_the_job_and_says_so(store, publisher, tmp_path):
    def away(name):
        raise RegistryUnavailable("away")

    publisher.versions = away
    job_id = store.submit(every(2))
    store.release(store.claim_next(60.0, 0.0))
    store.cancel(job_id, discards=True)
    with working(store, ChainBackend(), publisher, tmp_path, patience_s=0.2):
        job = ended(store, job_id)
    assert (job.status, job.error.code) == ("failed", "registry_unavailable")
