"""Which model teaches a job is settled before the job is accepted, and whether it can."""

import pytest

from kiln_common.errors import KilnError
from kiln_common.pb import common_pb2, engine_pb2, trainer_pb2
from kiln_trainer.jobs.teacher_check import settle_teacher
from kiln_trainer.jobs.validation import check_request
from kiln_trainer.recipes.opd_options import OpdOptions, TeacherModel
from tests.support.jobs import opd_request

STUDENT = common_pb2.BaseModel(model_id="small", model_hash="aa", vocab_size=100, vocabulary_hash="words")


class OneTeacher:
    def __init__(self, **fields):
        known = {"model_id": "big", "model_hash": "bb", "vocab_size": 100, "vocabulary_hash": "words"}
        self.model = common_pb2.BaseModel(**{**known, "max_model_len": 64, **fields})
        self.wanted = []

    async def find(self, wanted):
        self.wanted.append(wanted)
        return self.model


def taught_by(**fields) -> trainer_pb2.SubmitRequest:
    request = opd_request(teacher="")
    request.ClearField("base_model_hash")
    request.opd.settings.teacher_model.CopyFrom(trainer_pb2.TeacherModel(**{"model_id": "big", **fields}))
    return request


async def settled(request, teachers, student=STUDENT):
    info = engine_pb2.EngineInfo(base_model=student) if student is not None else None
    await settle_teacher(request, info, teachers)


async def code_of(request, teachers, student=STUDENT):
    with pytest.raises(KilnError) as caught:
        await settled(request, teachers, student)
    assert caught.value.param in ("teacher", "")
    return caught.value.code


async def test_a_job_keeps_the_weights_that_its_teachers_name_means_now():
    request, teachers = taught_by(), OneTeacher()
    await settled(request, teachers)
    assert teachers.wanted == [TeacherModel("big")]
    assert request.opd.settings.teacher_model.model_hash == "bb"
    assert request.base_model_hash == "aa"
    await settled(request, teachers)  # as a retry does
    assert teachers.wanted[1] == TeacherModel("big", "bb")


async def test_other_teachers_are_left_alone():
    teachers = OneTeacher()
    for request in (opd_request(), opd_request(teacher="wise@3")):
        await settled(request, teachers)
    assert teachers.wanted == []


@pytest.mark.parametrize(
    ("teacher", "code"),
    [
        ({"model_hash": "aa"}, "invalid_value"),
        ({"vocab_size": 101}, "teacher_vocabulary_differs"),
        ({"vocabulary_hash": "other words"}, "teacher_vocabulary_differs"),
        ({"vocabulary_hash": ""}, "teacher_vocabulary_differs"),
        ({"max_model_len": 7}, "teacher_context_too_short"),
    ],
)
async def test_a_teacher_that_cannot_teach_this_student_is_refused(teacher, code):
    assert await code_of(taught_by(), OneTeacher(**teacher)) == code


async def test_the_longest_completion_just_fits():
    await settled(taught_by(), OneTeacher(max_model_len=8))  # three tokens, four more, one that is free


async def test_a_student_of_unknown_vocabulary_has_no_teacher_elsewhere():
    unknown = common_pb2.BaseModel(model_id="small", model_hash="aa", vocab_size=100)
    assert await code_of(taught_by(), OneTeacher(), unknown) == "teacher_vocabulary_differs"
    assert await code_of(taught_by(), OneTeacher(), None) == "engine_unavailable"


def test_settings_are_spelled_out_and_come_back():
    wire = taught_by().opd.settings
    shown = OpdOptions.from_proto(wire).to_proto(wire)
    assert (shown.teacher_model.model_id, shown.teacher_model.top_k) == ("big", 64)
    assert OpdOptions.from_proto(shown) == OpdOptions.from_proto(wire)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"top_k": 257}, "teacher.top_k is 257, it must be 1 to 256"),
        ({"top_k": -1}, "top_k is -1"),
        ({"model_id": ""}, "has no id"),
    ],
)
def test_settings_out_of_range_are_named(fields, text):
    with pytest.raises(KilnError, match=text):
        check_request(taught_by(**fields), None)


def test_there_is_one_teacher():
    request = taught_by()
    request.opd.settings.teacher = "base"
    with pytest.raises(KilnError, match="both 'base' and the model 'big' are to teach"):
        check_request(request, None)


def test_what_a_teacher_says_at_once_is_bounded():
    request = taught_by(top_k=256)
    check_request(request, None)
    request.config.batch_tokens = 2**20
    request.opd.settings.sampling.max_tokens = 2**19 + 1
    with pytest.raises(KilnError, match=r"134217728 at once") as caught:
        check_request(request, None)
    assert caught.value.code == "invalid_job_config"
    request.opd.settings.teacher_model.top_k = 255
    check_request(request, None)


def test_a_round_of_several_epochs_has_every_prompt_as_often():
    request = taught_by(top_k=256)
    request.config.batch_tokens = 2**20
    request.opd.settings.sampling.max_tokens = 2**18
    request.opd.settings.refresh_every = 6  # of two steps each epoch
    check_request(request, None)
    request.config.epochs = 3
    with pytest.raises(KilnError, match=r"each of 1572864, 402653184 in all"):
        check_request(request, None)
