"""Jobs that sample their own student: what the engine is asked, and what the registry keeps of it."""

import hashlib
import threading
from dataclasses import dataclass, field

import pytest

from kiln_common.errors import AdapterNotFound, EngineUnavailable, Overloaded, RegistryUnavailable
from kiln_common.pb import engine_pb2, registry_pb2
from kiln_trainer.domain.training import StepHooks, TrainedAdapter, TrainingTask
from tests.integration.jobs.test_worker import ended, working
from tests.support.jobs import ChainBackend, MemoryContent, MemoryPublisher, opd_request
from tests.support.registry import MODEL_HASH, adapter_bytes

PROMPTS = [([1, 2, 3], 11), ([4], 12)]


@dataclass
class SamplingBackend(ChainBackend):
    """Samples its student once as it starts and once after an update, then takes its steps."""

    rollouts: list = field(default_factory=list)

    def run(self, task: TrainingTask, hooks: StepHooks) -> TrainedAdapter:
        assert task.sampler is not None
        self.rollouts = task.sampler.sample(None, PROMPTS)
        self.rollouts += task.sampler.sample(MemoryContent(adapter_bytes(seed=4)), PROMPTS)
        return super().run(task, hooks)


@pytest.fixture
def publisher():
    return MemoryPublisher()


def add_version(publisher, name, model_hash=MODEL_HASH):
    version = registry_pb2.AdapterVersion(
        name=name, version=1, sha256=hashlib.sha256(name.encode()).hexdigest(), base_model_hash=model_hash
    )
    publisher.known[name] = [version]
    return version


def run(store, publisher, tmp_path, request, backend=None, **settings):
    backend = backend or SamplingBackend(num_steps=1)
    job_id = store.submit(request)
    with working(store, backend, publisher, tmp_path, **settings):
        return ended(store, job_id), backend


def test_a_fresh_student_is_first_the_base_model_and_then_its_own_version(store, publisher, tmp_path):
    job, backend = run(store, publisher, tmp_path, opd_request("helper", teacher="base"))
    assert (job.status, job.kind) == ("succeeded", "opd")
    first, second = publisher.generated[:2], publisher.generated[2:]
    assert [list(request.adapters) for request in first] == [[], []]
    assert {request.adapters[0].name for request in second} == {job.id}
    assert [request.sampling.seed for request in first] == [11, 12]
    assert [list(request.prompt_token_ids) for request in first] == [[1, 2, 3], [4]]
    assert {request.sampling.max_tokens for request in publisher.generated} == {4}
    # Whoever chats goes first, and nobody's cached prefixes are shared.
    assert {(request.priority, request.cache_salt) for request in publisher.generated} == {(1, job.id)}
    rollout = backend.rollouts[0]
    assert list(rollout.prompt_token_ids) == [1, 2, 3]
    assert (list(rollout.completion_token_ids), list(rollout.logprobs)) == ([7, 8], [-0.5, -1.5])
    assert not rollout.is_truncated


def test_the_unfinished_student_is_neither_attached_nor_kept(store, publisher, tmp_path):
    job, _ = run(store, publisher, tmp_path, opd_request("helper", attach=True))
    unfinished, finished = publisher.headers
    assert (unfinished.name, unfinished.attach, unfinished.job_id) == (job.id, False, job.id)
    assert unfinished.claim_epoch == 1
    assert publisher.withdrawn == [job.id]
    assert publisher.audiences == ["sampler", "all"]
    assert (finished.name, finished.attach) == ("helper", True)
    assert (job.result.adapter, job.result.version) == ("helper", 1)


def test_a_student_that_goes_on_is_first_the_version_it_starts_from(store, publisher, tmp_path):
    start = add_version(publisher, "helper")
    _, backend = run(store, publisher, tmp_path, opd_request("helper", teacher="base"))
    (adapter,) = publisher.generated[0].adapters
    assert (adapter.name, adapter.version, adapter.sha256) == ("helper", 1, start.sha256)
    assert backend.tasks[0].teacher is None
    assert publisher.headers[0].parent_version == 1


def test_a_teachers_files_are_there_when_the_job_begins(store, publisher, tmp_path):
    add_version(publisher, "wise")
    _, backend = run(store, publisher, tmp_path, opd_request("helper", teacher="wise@1"))
    teacher = backend.tasks[0].teacher
    assert teacher.reference == "wise@1"
    assert teacher.safetensors_path.parent.name == "teacher"
    assert backend.tasks[0].starting_point is None


@pytest.mark.parametrize(
    ("model_hash", "code"), [(None, AdapterNotFound.code), ("0" * 64, "adapter_mismatch")]
)
def test_a_teacher_that_cannot_teach_fails_the_job(store, publisher, tmp_path, model_hash, code):
    if model_hash:
        add_version(publisher, "wise", model_hash)
    job, _ = run(store, publisher, tmp_path, opd_request("helper", teacher="wise@1"))
    assert (job.status, job.error.code) == ("failed", code)


@pytest.mark.parametrize("error", [EngineUnavailable("away"), Overloaded("all adapter slots are in use")])
def test_an_engine_without_room_is_asked_again(store, publisher, tmp_path, error):
    failures = iter([error])

    def fail_once():
        for failure in failures:
            raise failure

    publisher.before_generate = fail_once
    job, _ = run(store, publisher, tmp_path, opd_request())
    assert job.status == "succeeded"
    assert len(publisher.generated) == 2 + 4


def test_an_unfinished_student_is_withdrawn_even_if_it_could_not_be_sampled(store, publisher, tmp_path):
    calls = iter([None, EngineUnavailable("away"), None, None])

    def fail_second():
        error = next(calls)
        if error is not None:
            raise error

    publisher.before_generate = fail_second
    job, _ = run(store, publisher, tmp_path, opd_request())
    assert job.status == "succeeded"
    assert publisher.withdrawn == [job.id] * 2
    assert job.id not in publisher.known


def test_a_registry_that_is_away_when_a_student_is_withdrawn_does_not_stop_the_job(
    store, publisher, tmp_path, monkeypatch
):
    def away(name):
        raise RegistryUnavailable("away")

    monkeypatch.setattr(publisher, "withdraw", away)
    job, _ = run(store, publisher, tmp_path, opd_request())
    assert job.status == "succeeded"


@pytest.mark.parametrize(
    ("reason", "is_truncated"),
    [(engine_pb2.FINISH_REASON_LENGTH, True), (engine_pb2.FINISH_REASON_STOP, False)],
)
def test_completions_that_ran_into_their_limit_are_marked(store, publisher, tmp_path, reason, is_truncated):
    publisher.finish_reason = reason
    _, backend = run(store, publisher, tmp_path, opd_request())
    assert {rollout.is_truncated for rollout in backend.rollouts} == {is_truncated}


def test_what_the_engine_refuses_fails_the_job_with_the_engines_words(store, publisher, tmp_path):
    def refuse():
        raise AdapterNotFound("no such bytes")

    publisher.before_generate = refuse
    job, _ = run(store, publisher, tmp_path, opd_request())
    assert (job.status, job.error.code, job.error.message) == (
        "failed", "adapter_not_found", "no such bytes",
    )  # fmt: skip


def test_a_cancel_ends_the_sampling(store, publisher, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def wait_to_go_on():
        reached.set()
        assert go_on.wait(60)

    publisher.before_generate = wait_to_go_on
    job_id = store.submit(opd_request())
    with working(store, SamplingBackend(), publisher, tmp_path):
        assert reached.wait(60)
        store.cancel(job_id)
        go_on.set()
        job = ended(store, job_id)
    assert job.status == "cancelled"
    assert publisher.headers == []
