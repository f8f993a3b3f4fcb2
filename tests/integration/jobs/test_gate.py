"""A gated job: what passes is published, what does not is kept aside, and the job says which and why."""

import json
import threading

import pytest

from kiln_common.bus import keys
from kiln_common.errors import RegistryUnavailable
from kiln_common.pb import evaluations_pb2, trainer_pb2
from kiln_registry.evaluations.errors import EvalRunNotFound
from kiln_trainer.jobs.errors import InvalidJobConfig
from kiln_trainer.jobs.validation import check_request
from kiln_trainer.jobs.worker import Worker
from tests.support.jobs import ChainBackend, MemoryPublisher, grpo_request, wait_until


@pytest.fixture
def publisher(monkeypatch):
    monkeypatch.setattr("kiln_trainer.jobs.gate._LOOK_EVERY_S", 0.01)
    return MemoryPublisher()


def gated_request(timeout_s=30.0, **config):
    gate = trainer_pb2.Gate(
        suite_id="suite_1",
        suite="small@1",
        min_score=0.75,
        settings_json="{}",
        owner="me",
        timeout_s=timeout_s,
    )
    return grpo_request("helper", attach=True, gate=gate, **config)


def ending_with(score):
    def evaluate(run):
        run.status, run.summary_json = "succeeded", json.dumps({"score": {"mean": score}})
        return run

    return evaluate


def published_sha256(publisher):
    (version,) = publisher.known["helper"]
    return version.sha256


class Working:
    """A worker that runs while the block does; `end_of` waits for a job."""

    def __init__(self, store, publisher, folder, backend=None):
        self.store = store
        self.backend = backend or ChainBackend(num_steps=2)
        self.worker = Worker(store, self.backend, publisher, folder, claim_timeout_s=0.4, patience_s=5.0)

    def __enter__(self):
        self.worker.start()
        return self

    def __exit__(self, *exc_info):
        self.worker.stop(60.0)
        assert not self.worker.is_alive

    def end_of(self, job_id):
        wait_until(lambda: self.store.status(job_id) not in ("queued", "running"))
        return self.store.get(job_id)


def event_types(client, job_id):
    return [fields[b"type"].decode() for _, fields in client.xrange(keys.job_events(job_id))]


def test_what_passes_its_gate_is_published(store, redis_client, publisher, tmp_path):
    publisher.evaluate = ending_with(0.75)
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path) as working:
        job = working.end_of(job_id)
    assert (job.status, job.result.adapter, job.result.version) == ("succeeded", "helper", 1)
    outcome = job.result.gate
    assert (outcome.passed, outcome.score, outcome.run_id, outcome.suite) == (
        True,
        0.75,
        "evalrun_1",
        "small@1",
    )
    assert outcome.reason == "the score 0.75 reaches the least of 0.75"
    candidate, published = publisher.headers
    assert (candidate.name, candidate.attach, candidate.publish_key) == (
        job_id,
        False,
        f"gate:{job_id}:{published_sha256(publisher)}",
    )
    assert (published.name, published.attach, published.publish_key) == ("helper", True, job_id)
    assert publisher.withdrawn == [job_id]
    (request,) = publisher.evaluation_requests
    assert (request.owner, request.suite_id, request.job_id) == ("me", "suite_1", job_id)
    assert (request.adapter, request.idempotency_key) == (f"{job_id}@1", candidate.publish_key)
    types = event_types(redis_client, job_id)
    assert types[types.index("evaluating") :] == [
        "evaluating",
        "gate",
        "publishing",
        "published",
        "succeeded",
    ]


def test_what_fails_its_gate_is_kept_aside_and_the_name_means_what_it_meant(
    store, redis_client, publisher, tmp_path
):
    publisher.evaluate = ending_with(0.5)
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path) as working:
        job = working.end_of(job_id)
    assert (job.status, job.result.adapter, job.result.version) == ("succeeded", job_id, 1)
    assert (job.result.gate.passed, job.result.gate.score) == (False, 0.5)
    assert job.result.gate.reason == "the score 0.5 is below the least of 0.75"
    assert [header.name for header in publisher.headers] == [job_id]
    assert not publisher.headers[0].attach
    assert publisher.withdrawn == []
    assert "published" not in event_types(redis_client, job_id)


def test_an_evaluation_that_fails_or_never_ends_is_not_passed(store, publisher, tmp_path):
    def failing(run):
        run.status = "failed"
        run.error.CopyFrom(evaluations_pb2.EvalError(code="sandbox_unavailable", message="no namespaces"))
        return run

    def refusing(run):
        raise EvalRunNotFound("there is no run")

    publisher.evaluate = failing
    with Working(store, publisher, tmp_path) as working:
        failed = working.end_of(store.submit(gated_request()))
        publisher.evaluate = refusing
        refused = working.end_of(store.submit(gated_request()))
        publisher.evaluate = lambda run: run
        late = working.end_of(store.submit(gated_request(timeout_s=0.1)))
    assert failed.result.gate.reason == "the evaluation failed with sandbox_unavailable: no namespaces"
    assert late.result.gate.reason == "the evaluation was running after 0.1 s, with 0 of 0 cases done"
    assert refused.result.gate.reason == "the evaluation failed with eval_run_not_found: there is no run"
    for job in (failed, refused, late):
        assert (job.status, job.result.adapter) == ("succeeded", job.id)
        assert not job.result.gate.passed
        assert not job.result.gate.HasField("score")


def test_a_registry_that_is_away_during_the_evaluation_is_waited_for(store, publisher, tmp_path):
    answers = iter([RegistryUnavailable("away"), None])

    def evaluate(run):
        if (failure := next(answers)) is not None:
            raise failure
        return ending_with(1.0)(run)

    publisher.evaluate = evaluate
    with Working(store, publisher, tmp_path) as working:
        job = working.end_of(store.submit(gated_request()))
    assert (job.result.adapter, job.result.gate.passed) == ("helper", True)


def test_a_cancel_during_the_evaluation_leaves_nothing(store, publisher, tmp_path):
    looked = threading.Event()

    def evaluate(run):
        looked.set()
        return run

    publisher.evaluate = evaluate
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path) as working:
        assert looked.wait(60.0)
        store.cancel(job_id)
        job = working.end_of(job_id)
    assert (job.status, job.HasField("result")) == ("cancelled", False)
    assert publisher.withdrawn == [job_id]


def test_a_trainer_that_stops_during_the_evaluation_hands_the_job_on(store, other_store, publisher, tmp_path):
    looked = threading.Event()

    def evaluate(run):
        looked.set()
        return run

    publisher.evaluate = evaluate
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path):
        assert looked.wait(60.0)
    publisher.evaluate = ending_with(1.0)
    with Working(other_store, publisher, tmp_path) as working:
        job = working.end_of(job_id)
        assert working.backend.steps_taken == []  # the last checkpoint was the end
    assert (job.result.adapter, job.result.gate.passed, job.claim_epoch) == ("helper", True, 2)
    keys_used = {request.idempotency_key for request in publisher.evaluation_requests}
    assert keys_used == {f"gate:{job_id}:{published_sha256(publisher)}"}  # the same bytes: the same run
    assert [header.name for header in publisher.headers] == [job_id, "helper"]


def test_other_bytes_of_a_later_claim_are_evaluated_themselves(store, other_store, publisher, tmp_path):
    """The first claim's bytes would pass; those that would be published do not."""
    looked = threading.Event()

    def evaluate(run):
        looked.set()
        return run

    publisher.evaluate = evaluate
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path / "a"):
        assert looked.wait(60.0)
    publisher.evaluate = lambda run: ending_with(1.0 if run.id == "evalrun_1" else 0.0)(run)
    with Working(other_store, publisher, tmp_path / "b", ChainBackend(num_steps=3)) as working:
        job = working.end_of(job_id)
    assert (job.result.adapter, job.result.version, job.result.gate.passed) == (job_id, 2, False)
    first, second = publisher.evaluation_requests
    assert (first.adapter, second.adapter) == (f"{job_id}@1", f"{job_id}@2")


def test_a_candidate_that_was_let_go_is_judged_anew(store, other_store, publisher, tmp_path):
    looked = threading.Event()

    def evaluate(run):
        looked.set()
        return run

    publisher.evaluate = evaluate
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path):
        assert looked.wait(60.0)
    publisher.withdraw(job_id)
    publisher.evaluate = ending_with(1.0)
    with Working(other_store, publisher, tmp_path) as working:
        job = working.end_of(job_id)
    assert (job.result.adapter, job.result.gate.passed) == ("helper", True)
    assert publisher.evaluation_requests[-1].adapter == f"{job_id}@2"


def test_a_cancel_that_the_next_trainer_finds_leaves_no_candidate(store, other_store, publisher, tmp_path):
    looked = threading.Event()

    def evaluate(run):
        looked.set()
        return run

    publisher.evaluate = evaluate
    job_id = store.submit(gated_request())
    with Working(store, publisher, tmp_path):
        assert looked.wait(60.0)
    store.cancel(job_id)
    with Working(other_store, publisher, tmp_path) as working:
        job = working.end_of(job_id)
    assert (job.status, publisher.known) == ("cancelled", {})


def test_a_job_that_fails_after_its_candidate_leaves_none(store, publisher, tmp_path):
    def refuse_the_result():
        if publisher.num_publish_calls:
            raise InvalidJobConfig("refused")

    publisher.evaluate = ending_with(1.0)
    publisher.before_publish = refuse_the_result
    with Working(store, publisher, tmp_path) as working:
        job = working.end_of(store.submit(gated_request()))
    assert (job.status, job.error.code, publisher.known) == ("failed", "invalid_job_config", {})


@pytest.mark.parametrize(
    ("publish", "min_score", "words"),
    [("never", 0.5, 'publish is "never"'), ("end", 1.5, "min_score from 0 to 1")],
)
def test_a_gate_that_makes_no_sense_is_refused(publish, min_score, words):
    request = gated_request(publish=publish)
    request.config.gate.min_score = min_score
    with pytest.raises(InvalidJobConfig, match=words):
        check_request(request, None)
