"""Every flaw of a job has its own code, and is found before anything is queued."""

import math

import pytest

from kiln_common.errors import KilnError
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_trainer.jobs.validation import check_request
from tests.support.jobs import grpo_request, sft_request
from tests.support.registry import base_model

BASE = engine_pb2.EngineInfo(base_model=base_model("demo"), max_adapter_rank=64)


def rollout(request: trainer_pb2.SubmitRequest, index: int = 0) -> trainer_pb2.GrpoRollout:
    return request.grpo.groups[0].rollouts[index]


def code_of(request: trainer_pb2.SubmitRequest, base: engine_pb2.EngineInfo | None = BASE) -> str:
    with pytest.raises(KilnError) as caught:
        check_request(request, base)
    assert 400 <= caught.value.kind.http_status < 502
    return caught.value.code


@pytest.mark.parametrize("request_", [grpo_request(), sft_request()])
@pytest.mark.parametrize("base", [BASE, None])
def test_a_sound_job_passes(request_, base):
    check_request(request_, base)


def test_a_rank_that_fits_no_adapter_slot_is_refused():
    request = grpo_request(lora=trainer_pb2.LoraConfig(rank=65))
    assert code_of(request) == "invalid_job_config"
    check_request(request, None)


def test_a_layer_that_the_model_does_not_have_cannot_learn():
    base = base_model("demo")
    request = sft_request(train_mtp=True)
    with pytest.raises(KilnError) as caught:
        check_request(request, engine_pb2.EngineInfo(base_model=base))
    assert (caught.value.code, caught.value.param) == ("model_without_mtp", "train_mtp")
    base.draft_modules.add(path="mtp.fc", in_features=16, out_features=8)
    check_request(request, engine_pb2.EngineInfo(base_model=base))
    check_request(request, None)  # the job itself tells


def test_zeros_mean_the_defaults():
    config = trainer_pb2.JobConfig(adapter="a")
    config.optimizer.learning_rate = 1e-4
    request = trainer_pb2.SubmitRequest(config=config, sft=sft_request().sft)
    check_request(request, BASE)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"lora": trainer_pb2.LoraConfig(rank=257)}, "invalid_job_config"),
        ({"lora": trainer_pb2.LoraConfig(rank=-1)}, "invalid_job_config"),
        ({"lora": trainer_pb2.LoraConfig(alpha=math.nan)}, "invalid_job_config"),
        ({"lora": trainer_pb2.LoraConfig(targets=["lm_head"])}, "invalid_job_config"),
        ({"lora": trainer_pb2.LoraConfig(dropout=1.0)}, "invalid_value"),
        (
            {"optimizer": trainer_pb2.OptimizerConfig(learning_rate=1e-4, type="sgd")},
            "unknown_training_option",
        ),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=0)}, "invalid_job_config"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=-1)}, "invalid_job_config"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=math.nan)}, "invalid_job_config"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=math.inf)}, "invalid_job_config"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=1.01)}, "invalid_job_config"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=1, warmup_ratio=2)}, "invalid_job_config"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=1, weight_decay=-1)}, "invalid_value"),
        ({"optimizer": trainer_pb2.OptimizerConfig(learning_rate=1, adam_beta1=1)}, "invalid_job_config"),
        (
            {"optimizer": trainer_pb2.OptimizerConfig(learning_rate=1, schedule="x")},
            "unknown_training_option",
        ),
        ({"epochs": -1}, "invalid_job_config"),
        ({"epochs": 10**6}, "invalid_job_config"),
        ({"batch_tokens": -1}, "invalid_job_config"),
        ({"batch_tokens": 4}, "document_too_long"),
        ({"publish": "sometimes"}, "invalid_job_config"),
        ({"metadata_json": "[]"}, "invalid_job_config"),
        ({"base_adapter": "a@x"}, "invalid_adapter_name"),
        ({"base_adapter": "a", "start_fresh": True}, "invalid_job_config"),
    ],
)
def test_settings_out_of_range_are_refused(fields, code):
    assert code_of(grpo_request(**fields)) == code


@pytest.mark.parametrize(
    ("name", "code"),
    [("", "invalid_adapter_name"), ("a b", "invalid_adapter_name"), ("base", "reserved_adapter_name"),
     ("Demo", "reserved_adapter_name")],
)  # fmt: skip
def test_names_are_checked(name, code):
    assert code_of(grpo_request(name)) == code


def test_a_job_without_a_recipe_is_refused():
    request = grpo_request()
    request.ClearField("grpo")
    assert code_of(request) == "invalid_request"


def test_a_job_for_another_base_model_is_refused():
    request = grpo_request()
    request.base_model_hash = "cd" * 32
    assert code_of(request) == "base_model_mismatch"
    check_request(request, None)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, 1e308, -1e10])
def test_rewards_must_be_finite_and_of_a_reasonable_size(reward):
    request = grpo_request()
    rollout(request).reward = reward
    assert code_of(request) == "invalid_reward"


def test_equal_rewards_teach_nothing():
    request = grpo_request()
    rollout(request, 1).reward = 0.0
    assert code_of(request) == "no_learning_signal"


def test_rewards_equal_up_to_rounding_teach_nothing():
    request = grpo_request()
    rollout(request, 0).reward, rollout(request, 1).reward = 0.3, 0.1 + 0.2
    assert code_of(request) == "no_learning_signal"


def test_the_completions_of_groups_with_a_signal_must_not_all_be_empty():
    request = grpo_request()
    constant = request.grpo.groups.add()
    constant.CopyFrom(request.grpo.groups[0])
    constant.rollouts[1].reward = 0.0
    for empty in request.grpo.groups[0].rollouts:
        del empty.completion_token_ids[:], empty.behaviour_logprobs[:]
    assert code_of(request) == "empty_training_data"


def test_one_group_with_a_signal_is_enough():
    request = grpo_request()
    constant = request.grpo.groups.add()
    constant.CopyFrom(request.grpo.groups[0])
    constant.rollouts[1].reward = 0.0
    check_request(request, BASE)


def test_a_group_of_one_is_refused():
    request = grpo_request()
    del request.grpo.groups[0].rollouts[1]
    assert code_of(request) == "group_too_small"


def test_no_groups_and_no_examples_are_refused():
    request = grpo_request()
    del request.grpo.groups[:]
    assert code_of(request) == "empty_training_data"
    request = sft_request()
    del request.sft.examples[:]
    assert code_of(request) == "empty_training_data"


def test_lengths_must_agree():
    request = grpo_request()
    rollout(request).behaviour_logprobs.append(-1.0)
    assert code_of(request) == "length_mismatch"
    request = sft_request()
    request.sft.examples[0].loss_weights.append(1.0)
    assert code_of(request) == "length_mismatch"


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, 0.5])
def test_log_probabilities_must_be_ones(logprob):
    request = grpo_request()
    rollout(request).behaviour_logprobs[0] = logprob
    assert code_of(request) == "invalid_value"


@pytest.mark.parametrize("token_id", [-1, 300])
def test_token_ids_must_be_in_the_vocabulary(token_id):
    request = grpo_request()
    rollout(request).completion_token_ids[0] = token_id
    assert code_of(request) == "invalid_token_ids"
    request = sft_request()
    request.sft.examples[0].token_ids[0] = token_id
    assert code_of(request) == "invalid_token_ids"


def test_weights_must_be_usable():
    request = sft_request()
    request.sft.examples[0].loss_weights[1] = -1.0
    assert code_of(request) == "invalid_value"
    # The first token has nothing before it that could predict it.
    request.sft.examples[0].loss_weights[:] = [1.0, 0.0, 0.0]
    assert code_of(request) == "no_trainable_tokens"


@pytest.mark.parametrize(
    ("loss", "code"),
    [
        ({"type": "ppo"}, "unknown_training_option"),
        ({"kl_coef": math.nan}, "invalid_job_config"),
        ({"clip_high": -0.1}, "invalid_job_config"),
        ({"kl_estimator": "k9"}, "unknown_training_option"),
    ],
)
def test_losses_are_checked(loss, code):
    request = grpo_request()
    request.grpo.loss.CopyFrom(trainer_pb2.GrpoLoss(**loss))
    assert code_of(request) == code


def test_truncated_completions_that_are_masked_are_no_data():
    request = grpo_request()
    for rollout_ in request.grpo.groups[0].rollouts:
        rollout_.is_truncated = True
    check_request(request, BASE)
    request.grpo.loss.mask_truncated_completions = True
    assert code_of(request) == "empty_training_data"
