"""What the two recipes make of requests, good and bad."""

from __future__ import annotations

import math

import pytest

from kiln_common.errors import InvalidValue
from kiln_common.pb import trainer_pb2
from kiln_trainer.domain.errors import NoLearningSignal
from kiln_trainer.recipes.errors import (
    InvalidTrainingData,
    NoTrainableTokens,
    UnknownOption,
)
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.options import GrpoOptions, OptimizerOptions, PolicyObjective, RunOptions
from kiln_trainer.recipes.sft import prepare_sft
from tests.support.training import grpo_spec, job_config, rollout

GOOD_GROUP = [rollout([1], [2, 3], 1.0), rollout([1], [4], 0.0)]


def sft_spec(*examples: tuple[list[int], list[float]]) -> trainer_pb2.SftSpec:
    spec = trainer_pb2.SftSpec()
    for token_ids, weights in examples:
        spec.examples.add(token_ids=token_ids, loss_weights=weights)
    return spec


def test_sft_scores_the_weighted_tokens_but_never_the_first():
    job = prepare_sft(sft_spec(([5, 6, 7, 8], [9.0, 0.0, 0.5, 2.0])))
    (document,) = job.documents
    assert document.scored_s.tolist() == [2, 3]
    assert document.ce_weight_s.tolist() == [0.5, 2.0]
    assert document.normaliser == 2.5
    assert job.objective is None


def test_sft_leaves_out_examples_without_a_scored_token_and_counts_them():
    job = prepare_sft(sft_spec(([1, 2], [0.0, 1.0]), ([3], [1.0]), ([4, 5], [1.0, 0.0])))
    assert len(job.documents) == 1
    assert job.facts == {"num_examples": 1.0, "num_examples_skipped": 2.0}


def test_sft_without_any_scored_token_is_refused():
    with pytest.raises(NoTrainableTokens) as caught:
        prepare_sft(sft_spec(([1, 2], [1.0, 0.0])))
    assert caught.value.code == "no_trainable_tokens"


@pytest.mark.parametrize("weights", [[1.0], [0.0, math.nan], [0.0, -1.0], [0.0, math.inf]])
def test_sft_refuses_weights_that_make_no_sense(weights):
    with pytest.raises(InvalidTrainingData, match="example 1"):
        prepare_sft(sft_spec(([1, 2], [0.0, 1.0]), ([1, 2], weights)))


def test_grpo_weighs_every_completion_alike_and_averages_over_its_tokens():
    documents = prepare_grpo(grpo_spec([GOOD_GROUP])).documents
    assert [document.policy_weight_s.tolist() for document in documents] == [[0.5, 0.5], [1.0]]
    assert [document.normaliser for document in documents] == [1.0, 1.0]
    assert documents[0].scored_s.tolist() == [1, 2]
    assert documents[0].advantage_s.tolist() == pytest.approx([0.5 / 0.5001] * 2)


def test_dr_grpo_weighs_every_token_alike_by_the_longest_completion():
    documents = prepare_grpo(grpo_spec([GOOD_GROUP], type="dr_grpo")).documents
    assert [document.policy_weight_s.tolist() for document in documents] == [[0.5, 0.5], [0.5]]


def test_grpo_skips_groups_of_equal_rewards_and_says_how_many():
    dull = [rollout([1], [2], 0.3), rollout([1], [3], 0.1 + 0.2)]
    job = prepare_grpo(grpo_spec([dull, GOOD_GROUP]))
    assert len(job.documents) == 2
    assert job.facts["num_groups"] == 2
    assert job.facts["num_groups_skipped"] == 1
    assert job.facts["reward_mean"] == pytest.approx((0.3 + 0.3 + 1 + 0) / 4)


def test_grpo_without_any_difference_in_reward_is_refused():
    with pytest.raises(NoLearningSignal) as caught:
        prepare_grpo(grpo_spec([[rollout([1], [2], 1.0)] * 2] * 3))
    assert caught.value.code == "no_learning_signal"


def test_an_empty_completion_counts_in_its_groups_mean_and_is_not_trained_on():
    job = prepare_grpo(grpo_spec([[rollout([1], [], 0.0), rollout([1], [2], 1.0)]], scale_rewards="none"))
    (document,) = job.documents
    assert document.advantage_s.tolist() == [0.5]


def test_rollouts_say_whether_their_sampler_is_known():
    known = rollout([1], [2], 1.0, behaviour_logprobs=[-0.1], source="rollout")
    retokenised = rollout([1], [2], 0.0, source="retokenised")
    job = prepare_grpo(grpo_spec([[known, retokenised]]))
    assert [document.is_sampled for document in job.documents] == [True, False]
    assert job.facts["num_rollouts_retokenised"] == 1


@pytest.mark.parametrize(
    "bad",
    [
        rollout([1], [2], math.nan),
        rollout([1], [2], math.inf),
        rollout([], [2], 1.0),
        rollout([1], [2, 3], 1.0, behaviour_logprobs=[-0.1]),
        rollout([1], [2], 1.0, behaviour_logprobs=[-math.inf]),
        rollout([1], [2], 1.0, temperature=-1.0),
    ],
)
def test_grpo_names_the_rollout_that_is_wrong(bad):
    with pytest.raises(InvalidTrainingData, match="rollout 1 of group 1"):
        prepare_grpo(grpo_spec([GOOD_GROUP, [rollout([1], [2], 0.5), bad]]))


def test_a_group_of_one_is_refused():
    with pytest.raises(InvalidTrainingData, match="group 0 has 1 rollouts"):
        prepare_grpo(grpo_spec([[rollout([1], [2], 1.0)]]))


@pytest.mark.parametrize(
    ("loss_type", "weights", "normalisers"),
    [
        ("gspo", [[0.5, 0.5], [1.0]], [1.0, 1.0]),
        ("dapo", [[1.0, 1.0], [1.0]], [2.0, 1.0]),
        ("cispo", [[1.0, 1.0], [1.0]], [2.0, 1.0]),
    ],
)
def test_completions_or_tokens_have_the_same_say(loss_type, weights, normalisers):
    documents = prepare_grpo(grpo_spec([GOOD_GROUP], type=loss_type)).documents
    assert [document.policy_weight_s.tolist() for document in documents] == weights
    assert [document.normaliser for document in documents] == normalisers


def test_truncated_completions_are_counted_and_left_out_where_that_is_asked_for():
    groups = [[rollout([1], [2, 3, 4], 0.0, is_truncated=True), *GOOD_GROUP]]
    everything = prepare_grpo(grpo_spec(groups, scale_rewards="none"))
    assert len(everything.documents) == 3
    assert everything.facts["num_rollouts_truncated"] == 1
    assert "num_rollouts_masked" not in everything.facts
    masked = prepare_grpo(
        grpo_spec(groups, scale_rewards="none", type="dr_grpo", mask_truncated_completions=True)
    )
    assert masked.facts["num_rollouts_masked"] == 1
    # Its reward is still part of the mean, its length no longer of the divisor.
    assert [float(d.advantage_s[0]) for d in masked.documents] == pytest.approx([2 / 3, -1 / 3])
    assert masked.documents[0].policy_weight_s.tolist() == [0.5, 0.5]


def test_groups_of_truncated_completions_alone_teach_nothing():
    group = [rollout([1], [2], reward, is_truncated=True) for reward in (0.0, 1.0)]
    with pytest.raises(NoTrainableTokens):
        prepare_grpo(grpo_spec([group], mask_truncated_completions=True))


@pytest.mark.parametrize(
    ("loss_type", "clip_low", "clip_high", "scale"),
    [
        ("grpo", 0.2, 0.2, "group"),
        ("dr_grpo", 0.2, 0.2, "none"),
        ("dapo", 0.2, 0.28, "group"),
        ("gspo", 3e-4, 4e-4, "group"),
        ("cispo", 1.0, 4.0, "group"),
    ],
)
def test_each_loss_has_its_papers_defaults_and_says_them(loss_type, clip_low, clip_high, scale):
    options = GrpoOptions.from_proto(trainer_pb2.GrpoLoss(type=loss_type))
    spelled_out = options.to_proto()
    assert (spelled_out.type, spelled_out.scale_rewards) == (loss_type, scale)
    assert (spelled_out.clip_low, spelled_out.clip_high) == (clip_low, clip_high)
    assert GrpoOptions.from_proto(spelled_out) == options
    given = trainer_pb2.GrpoLoss(type=loss_type, clip_low=0.1, clip_high=0.7, scale_rewards="batch")
    given.mask_truncated_completions = True
    chosen = GrpoOptions.from_proto(given)
    assert (chosen.objective.clip_low, chosen.objective.clip_high) == (0.1, 0.7)
    assert (chosen.scale_rewards, chosen.masks_truncated) == ("batch", True)


def test_zeros_on_the_wire_mean_the_defaults():
    assert GrpoOptions.from_proto(trainer_pb2.GrpoLoss()) == GrpoOptions()
    assert GrpoOptions().objective == PolicyObjective("grpo", 0.2, 0.2, 0.0, "k3", "token", 2.0)
    assert RunOptions.from_proto(trainer_pb2.JobConfig()) == RunOptions()
    wire = trainer_pb2.OptimizerConfig(learning_rate=1e-4)
    assert OptimizerOptions.from_proto(wire) == OptimizerOptions(1e-4)


@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_a_dropout_that_is_no_share_below_one_is_refused(dropout):
    with pytest.raises(InvalidValue, match=f"lora.dropout is {dropout}"):
        RunOptions.from_proto(job_config(dropout=dropout))


def test_an_optimiser_that_does_not_exist_is_refused_with_the_known_ones():
    with pytest.raises(UnknownOption, match="known are adamw, muon"):
        OptimizerOptions.from_proto(trainer_pb2.OptimizerConfig(learning_rate=1e-4, type="sgd"))


@pytest.mark.parametrize(
    "wire",
    [
        trainer_pb2.GrpoLoss(type="ppo"),
        trainer_pb2.GrpoLoss(kl_estimator="k4"),
        trainer_pb2.GrpoLoss(importance_mode="word"),
        trainer_pb2.GrpoLoss(scale_rewards="all"),
    ],
)
def test_an_unknown_variant_is_refused_with_the_known_ones(wire):
    with pytest.raises(UnknownOption, match="known are"):
        GrpoOptions.from_proto(wire)
