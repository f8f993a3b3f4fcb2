"""Jobs whose teacher is another engine's model: what it is asked, and what becomes of its answers."""

from array import array
from dataclasses import dataclass, field

import pytest

from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.training import StepHooks, TrainedAdapter, TrainingTask
from kiln_trainer.jobs.errors import TeacherChanged, TeacherUnavailable
from tests.integration.jobs.test_student_sampling import run
from tests.support.jobs import ChainBackend, MemoryPublisher, opd_request

ROLLOUTS = [
    trainer_pb2.OpdRollout(prompt_token_ids=[1, 2, 3], completion_token_ids=[7, 8, 9]),
    trainer_pb2.OpdRollout(prompt_token_ids=[4]),
    trainer_pb2.OpdRollout(prompt_token_ids=[5, 6], completion_token_ids=[7]),
]


@dataclass
class JudgedBackend(ChainBackend):
    """Has completions judged before its first step."""

    scores: list = field(default_factory=list)

    def run(self, task: TrainingTask, hooks: StepHooks) -> TrainedAdapter:
        assert task.scorer is not None
        self.scores = task.scorer.score(ROLLOUTS)
        return super().run(task, hooks)


@pytest.fixture
def publisher():
    return MemoryPublisher()


def judged(store, publisher, tmp_path):
    request = opd_request("helper", teacher="")
    request.opd.settings.teacher_model.CopyFrom(
        trainer_pb2.TeacherModel(model_id="big", model_hash="ff" * 32, top_k=5)
    )
    return run(store, publisher, tmp_path, request, JudgedBackend(num_steps=1))


def test_the_teacher_reads_prompt_and_completion_and_judges_the_completion(store, publisher, tmp_path):
    job, backend = judged(store, publisher, tmp_path)
    assert job.status == "succeeded", job.error
    teachers, requests = zip(*publisher.taught, strict=True)
    assert {(teacher.model_id, teacher.model_hash) for teacher in teachers} == {("big", "ff" * 32)}
    assert [list(request.prompt_token_ids) for request in requests] == [[1, 2, 3, 7, 8, 9], [5, 6, 7]]
    assert [request.first_prompt_logprob for request in requests] == [3, 2]
    assert {request.num_prompt_logprobs for request in requests} == {5}
    assert all(request.packs_prompt_logprobs and not request.sampling.max_tokens for request in requests)
    assert {request.priority for request in requests} == {1}  # whoever chats there goes first
    # A completion without a token has nothing to judge.
    assert [scores.num_top for scores in backend.scores] == [5, 0, 5]
    assert list(array("i", backend.scores[0].token_ids)) == [1, 2, 3, 4, 5] * 3
    assert list(array("f", backend.scores[2].logprobs)) == [-1, -2, -3, -4, -5]
    assert job.opd_settings.teacher_model.model_id == "big"
    assert backend.tasks[0].teacher is None


def test_a_teacher_that_is_away_is_waited_for(store, publisher, tmp_path):
    failures = iter([TeacherUnavailable("away")])

    def fail_once():
        for failure in failures:
            raise failure

    publisher.before_teaching = fail_once
    job, _ = judged(store, publisher, tmp_path)
    assert job.status == "succeeded"
    assert len(publisher.taught) == 4


def test_a_teacher_that_is_another_by_now_fails_the_job(store, publisher, tmp_path):
    def change():
        raise TeacherChanged("other weights")

    publisher.before_teaching = change
    job, _ = judged(store, publisher, tmp_path)
    assert (job.status, job.error.code) == ("failed", "teacher_changed")


def test_an_answer_with_a_hole_fails_the_job(store, publisher, tmp_path, monkeypatch):
    whole = publisher._teach

    def torn(requests, teacher):
        answers = whole(requests, teacher)
        answers[0][0].packed_top_token_ids = b"abc"
        return answers

    monkeypatch.setattr(publisher, "_teach", torn)
    job, _ = judged(store, publisher, tmp_path)
    assert (job.status, job.error.code) == ("failed", "teacher_answer_incomplete")
