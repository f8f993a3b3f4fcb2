"""Settles which model teaches a job, before the job is accepted."""

from __future__ import annotations

from typing import Protocol

from kiln_common.errors import EngineUnavailable, InvalidValue
from kiln_common.pb import common_pb2, engine_pb2, trainer_pb2
from kiln_trainer.jobs.errors import TeacherContextTooShort, TeacherVocabularyDiffers
from kiln_trainer.recipes.opd_options import OpdOptions, TeacherModel


class Teachers(Protocol):
    async def find(self, wanted: TeacherModel) -> common_pb2.BaseModel: ...


async def settle_teacher(
    request: trainer_pb2.SubmitRequest, engine: engine_pb2.EngineInfo | None, teachers: Teachers
) -> None:
    """Fill in which weights the teacher's name means now, if another engine's model is to teach.

    `engine`: the student's, None while none has answered.

    Raises:
        TeacherNotFound, TeacherUnavailable, TeacherChanged: as the directory says.
        TeacherVocabularyDiffers, TeacherContextTooShort: it cannot teach this student.
        InvalidValue: it is the student's own base model.
        EngineUnavailable: nobody has said what the student's token ids mean.
    """
    wanted = OpdOptions.from_proto(request.opd.settings).teacher_model if request.HasField("opd") else None
    if wanted is None:
        return
    found = await teachers.find(wanted)
    if engine is None:
        raise EngineUnavailable("no engine has answered yet whose vocabulary is the student's")
    student = engine.base_model
    if found.model_hash == student.model_hash:
        raise InvalidValue(
            f"{wanted.model_id!r} is the student's own base model",
            hint='Send "teacher": "base": it teaches with its whole vocabulary then.',
            param="teacher",
        )
    _check_vocabulary(student, found)
    longest = _longest_document(request.opd)
    if longest >= found.max_model_len:
        raise TeacherContextTooShort(
            f"a completion with its prompt may have {longest} tokens, "
            f"{wanted.model_id!r} reads {found.max_model_len - 1}"
        )
    request.opd.settings.teacher_model.model_hash = found.model_hash
    # What was compared is what is trained.
    request.base_model_hash = request.base_model_hash or student.model_hash


def _check_vocabulary(student: common_pb2.BaseModel, teacher: common_pb2.BaseModel) -> None:
    if student.vocab_size != teacher.vocab_size:
        raise TeacherVocabularyDiffers(
            f"{teacher.model_id!r} has {teacher.vocab_size} tokens, the student {student.vocab_size}"
        )
    for model in (student, teacher):
        if not model.vocabulary_hash:
            raise TeacherVocabularyDiffers(
                f"the checkpoint of {model.model_id!r} has no readable tokenizer.json"
            )
    if student.vocabulary_hash != teacher.vocabulary_hash:
        raise TeacherVocabularyDiffers(
            f"{teacher.model_id!r} has the vocabulary {teacher.vocabulary_hash[:12]}, "
            f"the student {student.vocabulary_hash[:12]}"
        )


def _longest_document(spec: trainer_pb2.OpdSpec) -> int:
    max_tokens = spec.settings.sampling.max_tokens
    sampled = [len(prompt.token_ids) + max_tokens for prompt in spec.prompts]
    given = [len(each.prompt_token_ids) + len(each.completion_token_ids) for each in spec.rollouts]
    return max((*sampled, *given), default=0)
