"""Checks a distillation job before it is accepted."""

from __future__ import annotations

import math

from kiln_common.adapter_names import BASE_NAME
from kiln_common.errors import InvalidValue
from kiln_common.pb import engine_pb2, trainer_pb2
from kiln_trainer.domain.errors import NoLearningSignal
from kiln_trainer.jobs.document_limits import DocumentLimits
from kiln_trainer.jobs.errors import EmptyTrainingData, InvalidJobConfig, LengthMismatch
from kiln_trainer.recipes.opd_options import OpdOptions

_MAX_SCORES_AT_ONCE = 2**27  # of eight bytes each
_MAX_DRAWS_AT_ONCE = 16_384  # of one version; their tokens are held in memory and in one file


def check_opd(spec: trainer_pb2.OpdSpec, config: trainer_pb2.JobConfig, limits: DocumentLimits) -> None:
    """Refuse a job that cannot succeed. Raises InvalidRequest and its kind, each with its own code."""
    options = OpdOptions.from_proto(spec.settings)
    if config.start_fresh and options.teacher == BASE_NAME:
        raise NoLearningSignal(
            "a fresh student is the base model, and so is its teacher",
            hint="Name an adapter as the teacher, or another base_adapter to start from.",
            param="teacher",
        )
    if bool(spec.prompts) == bool(spec.rollouts):
        raise EmptyTrainingData(
            f"there are {len(spec.prompts)} prompts and {len(spec.rollouts)} rollouts",
            hint="Give prompts to sample, or rollouts that were sampled.",
            param="prompts",
        )
    if spec.prompts:
        _check_prompts(spec, options, config, limits)
    for number, rollout in enumerate(spec.rollouts):
        _check_rollout(number, rollout, limits)
    if options.teacher_model is not None:
        _check_scores(spec, options, options.teacher_model.top_k, config.epochs or 1)
    if spec.rollouts and not any(rollout.completion_token_ids for rollout in spec.rollouts):
        raise EmptyTrainingData("every completion is empty", param="groups")


def _check_prompts(
    spec: trainer_pb2.OpdSpec, options: OpdOptions, config: trainer_pb2.JobConfig, limits: DocumentLimits
) -> None:
    _check_sampling(spec.settings.sampling)
    if config.gradient_accumulation:
        raise InvalidJobConfig(
            f"gradient_accumulation is {config.gradient_accumulation} in a job that samples",
            hint="Leave it out: rollout.prompts_per_step is the size of a step.",
            param="gradient_accumulation",
        )
    num_draws = options.samples_per_prompt * options.prompts_per_step * options.refresh_every
    if num_draws > _MAX_DRAWS_AT_ONCE:
        raise InvalidJobConfig(
            f"{num_draws} completions would be drawn at once, at most {_MAX_DRAWS_AT_ONCE}",
            hint="Lower rollout.n, prompts_per_step or refresh_every.",
            param="rollout",
        )
    for index, prompt in enumerate(spec.prompts):
        if not prompt.token_ids:
            raise EmptyTrainingData(f"prompt {index} has no tokens", param="prompts")
        limits.check(index, prompt.token_ids, num_more_tokens=spec.settings.sampling.max_tokens)


def _check_scores(spec: trainer_pb2.OpdSpec, options: OpdOptions, top_k: int, num_epochs: int) -> None:
    """What a teacher on another engine says of one round lies in memory and in one file."""
    num_tokens = sum(len(rollout.completion_token_ids) for rollout in spec.rollouts)
    if spec.prompts:
        in_a_step = min(options.prompts_per_step, len(spec.prompts))
        num_prompts = min(in_a_step * options.refresh_every, len(spec.prompts) * num_epochs)
        num_tokens = num_prompts * options.samples_per_prompt * spec.settings.sampling.max_tokens
    if num_tokens * top_k > _MAX_SCORES_AT_ONCE:
        raise InvalidJobConfig(
            f"the teacher would name {top_k} tokens for each of {num_tokens}, "
            f"{num_tokens * top_k} in all, at most {_MAX_SCORES_AT_ONCE} at once",
            hint="Lower teacher.top_k, rollout.refresh_every or prompts_per_step, or give fewer completions.",
            param="teacher",
        )


def _check_sampling(sampling: engine_pb2.SamplingParams) -> None:
    """What the engine would refuse anyway, told before the job is queued."""
    ranges = {
        "max_tokens": sampling.max_tokens >= 1,
        "temperature": 0 <= sampling.temperature < math.inf,
        "top_p": 0 < sampling.top_p <= 1,
        "top_k": sampling.top_k >= 0,
        "min_p": 0 <= sampling.min_p <= 1,
        "repetition_penalty": sampling.repetition_penalty > 0,
    }
    for name, is_good in ranges.items():
        if not is_good:
            value = getattr(sampling, name)
            raise InvalidValue(f"rollout.{name} is {value}, which the engine refuses", param="rollout")


def _check_rollout(number: int, rollout: trainer_pb2.OpdRollout, limits: DocumentLimits) -> None:
    if not rollout.prompt_token_ids:
        raise EmptyTrainingData(f"rollout {number} has no prompt tokens", param="groups")
    num_scored, num_known = len(rollout.completion_token_ids), len(rollout.logprobs)
    if num_known not in (0, num_scored):
        raise LengthMismatch(
            f"rollout {number} has {num_scored} completion tokens and {num_known} log-probabilities",
            param="groups",
        )
    if not all(logprob <= 1e-3 and math.isfinite(logprob) for logprob in rollout.logprobs):
        raise InvalidValue(f"rollout {number} has a number that is no log-probability", param="groups")
    limits.check(number, rollout.prompt_token_ids, rollout.completion_token_ids)
