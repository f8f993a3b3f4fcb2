"""Every flaw of a distillation job is found before it is queued."""

import math

import pytest

from kiln_common.errors import KilnError
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_trainer.jobs.records import submitted_fields, to_job
from kiln_trainer.jobs.validation import check_request
from tests.support.jobs import opd_request
from tests.support.registry import base_model

BASE = engine_pb2.EngineInfo(base_model=base_model("demo"), max_adapter_rank=64)


def given(**fields: object) -> trainer_pb2.SubmitRequest:
    """A job on one completion that is there."""
    request = opd_request()
    del request.opd.prompts[:]
    defaults = {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4]}
    request.opd.rollouts.add(**{**defaults, **fields})
    return request


def code_of(request: trainer_pb2.SubmitRequest) -> str:
    with pytest.raises(KilnError) as caught:
        check_request(request, BASE)
    assert caught.value.kind.http_status == 400
    return caught.value.code


@pytest.mark.parametrize("request_", [opd_request(), opd_request(teacher="wise@3"), given(logprobs=[-1, -2])])
@pytest.mark.parametrize("base", [BASE, None])
def test_a_sound_job_passes(request_, base):
    check_request(request_, base)


def test_a_fresh_student_cannot_learn_from_the_base_model():
    assert code_of(opd_request(start_fresh=True)) == "no_learning_signal"
    check_request(opd_request(teacher="wise@1", start_fresh=True), BASE)


def test_there_are_prompts_or_completions():
    both = opd_request()
    both.opd.rollouts.add(prompt_token_ids=[1], completion_token_ids=[2])
    assert code_of(both) == "empty_training_data"
    neither = opd_request()
    del neither.opd.prompts[:]
    assert code_of(neither) == "empty_training_data"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"teacher": "wise"}, "invalid_value"),
        ({"divergence": "kl"}, "unknown_training_option"),
        ({"samples_per_prompt": 20_000}, "invalid_job_config"),
        ({"sampling": {"max_tokens": 0}}, "invalid_value"),
        ({"sampling": {"temperature": math.nan}}, "invalid_value"),
        ({"sampling": {"top_p": 0}}, "invalid_value"),
        ({"sampling": {"min_p": 2}}, "invalid_value"),
        ({"sampling": {"repetition_penalty": 0}}, "invalid_value"),
        ({"sampling": {"max_tokens": 62}}, "document_too_long"),  # beside 3 prompt tokens, of 64
    ],
)
def test_settings_are_checked(settings, code):
    request = opd_request()
    for name, value in settings.items():
        if name == "sampling":
            for field, number in value.items():
                setattr(request.opd.settings.sampling, field, number)
        else:
            setattr(request.opd.settings, name, value)
    assert code_of(request) == code


def test_the_size_of_a_step_that_is_sampled_is_counted_in_prompts():
    assert code_of(opd_request(gradient_accumulation=2)) == "invalid_job_config"
    request = given()
    request.config.gradient_accumulation = 2
    check_request(request, BASE)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt_token_ids": []}, "empty_training_data"),
        ({"completion_token_ids": []}, "empty_training_data"),
        ({"completion_token_ids": [300]}, "invalid_token_ids"),
        ({"completion_token_ids": [3] * 63}, "document_too_long"),
        ({"logprobs": [-1]}, "length_mismatch"),
        ({"logprobs": [-1, 1]}, "invalid_value"),
    ],
)
def test_completions_are_checked(fields, code):
    assert code_of(given(**fields)) == code


def test_prompts_are_checked():
    request = opd_request()
    request.opd.prompts.add()
    assert code_of(request) == "empty_training_data"
    request.opd.prompts[-1].token_ids.append(300)
    assert code_of(request) == "invalid_token_ids"


def test_a_job_shows_its_settings_with_every_default():
    fields = submitted_fields(given(source="retokenised"), "hash")
    wire = {
        name.encode(): value if isinstance(value, bytes) else value.encode() for name, value in fields.items()
    }
    job = to_job("job_1", wire, None, [])
    assert job.kind == "opd"
    assert (job.opd_settings.divergence, job.opd_settings.refresh_every) == ("reverse_kl", 1)
    assert dict(job.sources) == {"retokenised": 1}
    assert not job.HasField("grpo_loss")
