"""Checks a request at the edge, so that nothing behind it needs to."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType

from kiln_common.errors import InvalidTokenIds, InvalidValue, PromptTooLong
from kiln_common.pb import common_pb2, engine_pb2
from kiln_engine.domain.adapter import AdapterVersion
from kiln_engine.domain.errors import EmptyPrompt
from kiln_engine.domain.output_rules import ThinkingRules
from kiln_engine.domain.request import AdapterUse, GenerationRequest, SamplingParams

MAX_TOP_LOGPROBS = 20
# Of prompts whose alternatives are packed: they cost the loop's thread one copy, whatever their number.
MAX_PACKED_LOGPROBS = 256
_MAX_TIMEOUT_S = 7 * 24 * 3600.0


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What a request is checked against."""

    vocab_size: int
    # Most tokens of prompt and completion together.
    max_num_tokens: int


def parse_request(
    message: engine_pb2.GenerateRequest, limits: RequestLimits, now: float
) -> GenerationRequest:
    """The request behind a message that arrived at `now`; draws a seed when there is none.

    Raises:
        EmptyPrompt, PromptTooLong, InvalidTokenIds, InvalidValue: with the field at fault in `param`.
    """
    if not message.request_id:
        raise InvalidValue("request_id is empty", param="request_id")
    prompt = tuple(message.prompt_token_ids)
    _check_prompt(prompt, limits)
    for param in ("num_stable_prefix_tokens", "num_shared_prefix_tokens"):
        count = getattr(message, param)
        _check(0 <= count <= len(prompt), param, count, f"between 0 and {len(prompt)}")
    policies = engine_pb2.AdapterPolicy.values()
    _check(message.adapter_policy in policies, "adapter_policy", message.adapter_policy, f"one of {policies}")
    check_rules(message, limits)
    is_read_out = message.wants_embedding or message.HasField("num_prompt_logprobs")
    if message.wants_embedding:
        _check(
            message.sampling.max_tokens == 0, "max_tokens", message.sampling.max_tokens, "0 for an embedding"
        )
    resumed = _parse_resumed(message, limits)
    num_top = message.num_prompt_logprobs
    most = MAX_PACKED_LOGPROBS if message.packs_prompt_logprobs else MAX_TOP_LOGPROBS
    _check(0 <= num_top <= most, "num_prompt_logprobs", num_top, f"0 to {most}")
    first = message.first_prompt_logprob
    _check(
        0 <= first < len(prompt), "first_prompt_logprob", first, f"below {len(prompt)}, the prompt's length"
    )
    timeout_s = message.timeout_s
    _check(0 <= timeout_s <= _MAX_TIMEOUT_S, "timeout_s", timeout_s, f"between 0 and {_MAX_TIMEOUT_S:.0f}")
    return GenerationRequest(
        request_id=message.request_id,
        prompt_token_ids=prompt,
        sampling=_parse_sampling(message.sampling, limits, least_tokens=0 if is_read_out else 1),
        resumed_token_ids=resumed,
        adapters=tuple(parse_adapter_use(adapter) for adapter in message.adapters),
        num_stable_prefix_tokens=message.num_stable_prefix_tokens,
        num_shared_prefix_tokens=message.num_shared_prefix_tokens,
        cache_salt=message.cache_salt,
        priority=message.priority,
        num_prompt_logprobs=min(num_top, limits.vocab_size)
        if message.HasField("num_prompt_logprobs")
        else None,
        first_prompt_logprob=max(first, 1),
        packs_prompt_logprobs=message.packs_prompt_logprobs,
        wants_embedding=message.wants_embedding,
        arrival_s=now,
        deadline_s=now + timeout_s if timeout_s else None,
    )


def parse_adapter_use(adapter: common_pb2.AdapterRef) -> AdapterUse:
    """An adapter as a request applies it. Raises InvalidValue."""
    scale = adapter.scale or 1.0
    _check(math.isfinite(scale), "adapters.scale", scale, "a finite number")
    return AdapterUse(parse_adapter_version(adapter).sha256, scale, adapter.name)


def parse_adapter_version(adapter: common_pb2.AdapterRef) -> AdapterVersion:
    """The version that a reference names. Raises InvalidValue."""
    is_hash = len(adapter.sha256) == 64 and all(digit in "0123456789abcdef" for digit in adapter.sha256)
    _check(is_hash, "adapters.sha256", adapter.sha256, "64 lower-case hex digits")
    _check(bool(adapter.name), "adapters.name", adapter.name, "the name of a published adapter")
    _check(adapter.version >= 1, "adapters.version", adapter.version, "at least 1")
    return AdapterVersion(adapter.name, adapter.version, adapter.sha256)


def check_rules(message: engine_pb2.GenerateRequest, limits: RequestLimits) -> None:
    """What can be wrong with grammar and thinking before the grammar is compiled.

    Raises:
        InvalidTokenIds, InvalidValue: with the field at fault in `param`.
    """
    if message.HasField("grammar"):
        grammar = message.grammar
        _check(grammar.WhichOneof("language") is not None, "grammar", "", "a grammar in one of the languages")
        if grammar.HasField("trigger_token_id"):
            _check_ids([grammar.trigger_token_id], "grammar.trigger_token_id", limits.vocab_size)
        if message.sampling.ignore_eos:
            hint = "Leave ignore_eos out: the grammar says where the text may end."
            raise InvalidValue("ignore_eos is set together with a grammar", param="ignore_eos", hint=hint)
    if message.HasField("thinking"):
        thinking = message.thinking
        forced = [*thinking.before_end_token_ids, thinking.end_token_id, *thinking.after_end_token_ids]
        _check_ids(forced, "thinking", limits.vocab_size)
        _check(thinking.budget_tokens >= 0, "thinking.budget_tokens", thinking.budget_tokens, "at least 0")


def parse_thinking(message: engine_pb2.Thinking) -> ThinkingRules:
    """The rules behind a message that `check_rules` passed."""
    return ThinkingRules(
        end_token_id=message.end_token_id,
        budget_tokens=message.budget_tokens if message.HasField("budget_tokens") else None,
        before_end_token_ids=tuple(message.before_end_token_ids),
        after_end_token_ids=tuple(message.after_end_token_ids),
    )


def _check_prompt(prompt: tuple[int, ...], limits: RequestLimits) -> None:
    if not prompt:
        raise EmptyPrompt("the prompt has no tokens")
    if len(prompt) >= limits.max_num_tokens:
        raise PromptTooLong(len(prompt), limits.max_num_tokens - 1)
    _check_ids(prompt, "prompt_token_ids", limits.vocab_size)


def _parse_resumed(message: engine_pb2.GenerateRequest, limits: RequestLimits) -> tuple[int, ...]:
    """The beginning of an answer that another engine handed back; it must leave a token to draw."""
    resumed = tuple(message.resumed_token_ids)
    if not resumed:
        return ()
    _check_ids(resumed, "resumed_token_ids", limits.vocab_size)
    num_left = limits.max_num_tokens - len(message.prompt_token_ids)
    most = min(message.sampling.max_tokens, num_left) - 1
    _check(len(resumed) <= most, "resumed_token_ids", f"{len(resumed)} tokens long", f"at most {most}")
    is_read_out = message.HasField("num_prompt_logprobs")
    _check(
        not is_read_out, "num_prompt_logprobs", message.num_prompt_logprobs, "left out of a resumed answer"
    )
    return resumed


def _parse_sampling(
    message: engine_pb2.SamplingParams, limits: RequestLimits, *, least_tokens: int
) -> SamplingParams:
    _check(message.max_tokens >= least_tokens, "max_tokens", message.max_tokens, f"at least {least_tokens}")
    _check(message.min_tokens >= 0, "min_tokens", message.min_tokens, "at least 0")
    _check(
        message.min_tokens <= message.max_tokens,
        "min_tokens",
        message.min_tokens,
        f"at most max_tokens, which is {message.max_tokens}",
    )
    _check_range("temperature", message.temperature, 0.0, 100.0)
    _check(0 < message.top_p <= 1, "top_p", message.top_p, "above 0 and at most 1")
    _check(message.top_k >= 0, "top_k", message.top_k, "at least 0")
    _check_range("min_p", message.min_p, 0.0, 1.0)
    _check_range("presence_penalty", message.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", message.frequency_penalty, -2.0, 2.0)
    penalty = message.repetition_penalty
    _check(0 < penalty <= 100, "repetition_penalty", penalty, "above 0 and at most 100")
    _check_ids(message.logit_bias, "logit_bias", limits.vocab_size)
    for bias in message.logit_bias.values():
        _check(math.isfinite(bias), "logit_bias", bias, "a finite number")
    _check_ids(message.stop_token_ids, "stop_token_ids", limits.vocab_size)
    num_top = message.num_top_logprobs
    _check(0 <= num_top <= MAX_TOP_LOGPROBS, "num_top_logprobs", num_top, f"0 to {MAX_TOP_LOGPROBS}")
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=penalty,
        logit_bias=MappingProxyType(dict(message.logit_bias)),
        seed=message.seed if message.HasField("seed") else secrets.randbits(64),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        num_top_logprobs=min(num_top, limits.vocab_size),
    )


def _check_ids(ids: Iterable[int], param: str, vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidTokenIds(
                f"{param} contains {token_id}; the model's ids are 0 to {vocab_size - 1}", param=param
            )


def _check_range(param: str, value: float, low: float, high: float) -> None:
    _check(low <= value <= high, param, value, f"between {low:g} and {high:g}")


def _check(is_allowed: bool, param: str, value: object, allowed: str) -> None:
    if not is_allowed:
        raise InvalidValue(f"{param} is {value!r}; it must be {allowed}", param=param)
