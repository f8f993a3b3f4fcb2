"""What distillation makes of its settings, its prompts and its completions."""

from __future__ import annotations

import pytest

from kiln_common.adapter_names import InvalidAdapterName
from kiln_common.errors import InvalidValue
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_trainer.recipes.errors import NoTrainableTokens, UnknownOption
from kiln_trainer.recipes.opd import plan_draws, prepare_opd
from kiln_trainer.recipes.opd_options import DistillationObjective, OpdOptions

OPTIONS = OpdOptions("base", samples_per_prompt=2, prompts_per_step=3)


def test_every_epoch_goes_once_through_all_prompts_in_an_order_of_its_own():
    steps = plan_draws(7, OPTIONS, epochs=2, seed=5)
    assert [len(step) for step in steps] == [6, 6, 2] * 2
    orders = [[draw.prompt_index for step in steps[i : i + 3] for draw in step] for i in (0, 3)]
    assert [sorted(order) for order in orders] == [sorted([*range(7)] * 2)] * 2
    assert orders[0] != orders[1]


def test_every_draw_has_its_own_seed_and_the_same_again():
    seeds = [draw.seed for step in plan_draws(7, OPTIONS, epochs=2, seed=5) for draw in step]
    assert len(set(seeds)) == 28
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert plan_draws(7, OPTIONS, epochs=2, seed=5) == plan_draws(7, OPTIONS, epochs=2, seed=5)
    others = [draw.seed for step in plan_draws(7, OPTIONS, epochs=2, seed=6) for draw in step]
    assert not {*seeds} & {*others}


def test_every_completion_token_weighs_the_same():
    rollouts = [
        trainer_pb2.OpdRollout(
            prompt_token_ids=[1, 2], completion_token_ids=[3, 4, 5], logprobs=[-1, -2, -3]
        ),
        trainer_pb2.OpdRollout(prompt_token_ids=[1], completion_token_ids=[], is_truncated=True),
        trainer_pb2.OpdRollout(prompt_token_ids=[1], completion_token_ids=[6], is_truncated=True),
    ]
    job = prepare_opd(rollouts, DistillationObjective())
    first, second = job.documents
    assert first.scored_s.tolist() == [2, 3, 4]
    assert first.policy_weight_s.tolist() == [1, 1, 1]
    assert first.sampler_logprob_s.tolist() == [-1, -2, -3]
    assert (first.normaliser, second.normaliser) == (3, 1)
    assert not second.is_sampled
    assert job.facts == {"num_rollouts": 2, "num_rollouts_truncated": 2, "completion_tokens_mean": 2}


def test_empty_completions_alone_are_refused():
    with pytest.raises(NoTrainableTokens):
        prepare_opd([trainer_pb2.OpdRollout(prompt_token_ids=[1])], DistillationObjective())


def test_zeros_on_the_wire_mean_the_defaults_and_come_back_spelled_out():
    wire = trainer_pb2.OpdSettings(teacher="base", sampling=engine_pb2.SamplingParams(max_tokens=5))
    options = OpdOptions.from_proto(wire)
    assert options == OpdOptions("base", DistillationObjective("reverse_kl", 0.5), 1, 8, 1)
    spelled_out = options.to_proto(wire)
    assert spelled_out.sampling.max_tokens == 5
    assert spelled_out.prompts_per_step == 8
    assert OpdOptions.from_proto(spelled_out) == options


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"teacher": ""}, InvalidAdapterName),
        ({"teacher": "a b"}, InvalidAdapterName),
        ({"teacher": "wise"}, InvalidValue),
        ({"divergence": "kl"}, UnknownOption),
        ({"beta": 1.0}, InvalidValue),
        ({"beta": -0.1}, InvalidValue),
        ({"refresh_every": -1}, InvalidValue),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, error):
    with pytest.raises(error):
        OpdOptions.from_proto(trainer_pb2.OpdSettings(**{"teacher": "base", **fields}))
