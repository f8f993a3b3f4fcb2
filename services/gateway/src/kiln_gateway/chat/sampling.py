"""A request's sampling fields as the engine and the rollout record take them."""

from __future__ import annotations

from kiln_common.errors import InvalidValue, PromptTooLong
from kiln_common.pb import common_pb2, engine_pb2
from kiln_gateway.chat.prompt import check_token_ids
from kiln_gateway.rollouts import SamplingRecord
from kiln_gateway.schemas.sampling import CompletionFields

_SEEDS = 2**64
_MAX_ID_DIGITS = 18


def sampling_params(
    fields: CompletionFields,
    *,
    base_model: common_pb2.BaseModel,
    num_prompt_tokens: int,
    prompt_field: str,
    max_tokens: int | None,
    num_top_logprobs: int,
    turn_end_id: int | None,
) -> engine_pb2.SamplingParams:
    """Everything but the seed.

    `max_tokens` is capped at what the context leaves after the prompt, which is also its default.
    `turn_end_id` ends completions although the engine's own end tokens may not include it.

    Raises:
        PromptTooLong: the prompt leaves no room for a token.
        InvalidTokenIds: stop_token_ids or logit_bias name ids outside the vocabulary.
    """
    room = base_model.max_model_len - num_prompt_tokens
    if room < 1:
        error = PromptTooLong(num_prompt_tokens, base_model.max_model_len - 1)
        error.param = prompt_field
        raise error
    stop_token_ids = stop_ids(fields.stop_token_ids, base_model, None if fields.ignore_eos else turn_end_id)
    limit = room if max_tokens is None else min(max_tokens, room)
    return engine_pb2.SamplingParams(
        max_tokens=limit,
        min_tokens=min(fields.min_tokens or 0, limit),
        temperature=_or(fields.temperature, 1.0),
        top_p=_or(fields.top_p, 1.0),
        top_k=max(fields.top_k or 0, 0),
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        repetition_penalty=_or(fields.repetition_penalty, 1.0),
        logit_bias=_logit_bias(fields.logit_bias, base_model.vocab_size),
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(fields.ignore_eos),
        num_top_logprobs=num_top_logprobs,
    )


def stop_ids(given: list[int] | None, base_model: common_pb2.BaseModel, turn_end_id: int | None) -> list[int]:
    """The ids a request stops at besides the engine's own, which may not include the turn's end.

    Raises:
        InvalidTokenIds: one is outside the vocabulary.
    """
    stop_token_ids = list(given or ())
    check_token_ids(stop_token_ids, base_model.vocab_size, "stop_token_ids")
    if turn_end_id is not None and turn_end_id not in [*base_model.eos_token_ids, *stop_token_ids]:
        stop_token_ids.append(turn_end_id)
    return stop_token_ids


def seed_of_choice(seed: int | None, choice: int) -> int | None:
    """Each choice of a seeded request has its own stream: the seed itself, then the ones after it."""
    return None if seed is None else (seed + choice) % _SEEDS


def record_of(request: engine_pb2.GenerateRequest, seed: int) -> SamplingRecord:
    """What a rollout keeps of how it was drawn."""
    params = request.sampling
    return SamplingRecord(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        has_logit_bias=bool(params.logit_bias),
        min_tokens=params.min_tokens,
        seed=seed,
        has_rules=request.HasField("grammar") or request.thinking.HasField("budget_tokens"),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(given: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    biases = {}
    for name, bias in (given or {}).items():
        if not name.isascii() or not name.isdigit() or len(name) > _MAX_ID_DIGITS:
            raise InvalidValue(
                f"`logit_bias` has the key {name[:60]!r}",
                param="logit_bias",
                hint="Keys are token ids written as strings; POST /v1/tokenize gives them.",
            )
        biases[int(name)] = bias
    check_token_ids(list(biases), vocab_size, "logit_bias")
    return biases
