import pytest

from kiln_common.errors import KilnError
from kiln_common.pb import common_pb2
from kiln_engine.servicer.validation import RequestLimits, parse_request
from tests.support.engine_server import generate_request

LIMITS = RequestLimits(vocab_size=100, max_num_tokens=32)


def test_a_request_arrives_whole():
    message = generate_request(
        "r",
        [1, 2, 3],
        logit_bias={5: -1.0},
        stop_token_ids=[9],
        seed=42,
        timeout_s=2.0,
        priority=-3,
        cache_salt="s",
        num_stable_prefix_tokens=2,
        num_shared_prefix_tokens=1,
        resumed_token_ids=[4, 5],
        adapters=[common_pb2.AdapterRef(name="a", version=1, sha256="ab" * 32)],
    )
    request = parse_request(message, LIMITS, now=10.0)
    assert request.prompt_token_ids == (1, 2, 3)
    assert (request.arrival_s, request.deadline_s, request.priority) == (10.0, 12.0, -3)
    assert (request.num_stable_prefix_tokens, request.num_shared_prefix_tokens) == (2, 1)
    assert request.known_token_ids == (1, 2, 3, 4, 5)
    assert request.sampling.seed == 42
    assert request.sampling.stop_token_ids == {9}
    assert dict(request.sampling.logit_bias) == {5: -1.0}
    # A scale that was left out counts as 1.
    assert request.adapters[0].scale == 1.0


def test_a_seed_is_drawn_when_there_is_none():
    message = generate_request()
    message.sampling.ClearField("seed")
    seeds = {parse_request(message, LIMITS, 0.0).sampling.seed for _ in range(3)}
    assert len(seeds) == 3


def test_a_prompt_can_be_asked_about_without_a_completion():
    for fields in ({"wants_embedding": True}, {"num_prompt_logprobs": 0}, {"num_prompt_logprobs": 5}):
        request = parse_request(generate_request(max_tokens=0, **fields), LIMITS, 0.0)
        assert request.sampling.max_tokens == 0
        assert request.num_prompt_logprobs == fields.get("num_prompt_logprobs")
        assert not request.uses_prefix_cache
    assert parse_request(generate_request(), LIMITS, 0.0).num_prompt_logprobs is None


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"prompt": []}, "empty_prompt", "no tokens"),
        ({"prompt": range(32)}, "prompt_too_long", "32 tokens, the limit is 31"),
        ({"prompt": [1, 100]}, "invalid_token_ids", "contains 100; the model's ids are 0 to 99"),
        ({"prompt": [-1]}, "invalid_token_ids", "contains -1"),
        ({"stop_token_ids": [500]}, "invalid_token_ids", "stop_token_ids contains 500"),
        ({"logit_bias": {100: 1.0}}, "invalid_token_ids", "logit_bias contains 100"),
        ({"logit_bias": {1: float("nan")}}, "invalid_value", "logit_bias"),
        ({"request_id": ""}, "invalid_value", "request_id"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens is 0"),
        ({"resumed_token_ids": [1, 100]}, "invalid_token_ids", "resumed_token_ids contains 100"),
        (
            {"resumed_token_ids": [1] * 4},
            "invalid_value",
            "resumed_token_ids is '4 tokens long'; it must be at most 3",
        ),
        ({"resumed_token_ids": [1] * 12, "max_tokens": 50}, "invalid_value", "at most 11"),
        ({"resumed_token_ids": [1], "num_prompt_logprobs": 0}, "invalid_value", "left out of a resumed"),
        ({"wants_embedding": True}, "invalid_value", "max_tokens is 4; it must be 0"),
        ({"num_prompt_logprobs": 21}, "invalid_value", "num_prompt_logprobs is 21; it must be 0 to 20"),
        (
            {"num_prompt_logprobs": 257, "packs_prompt_logprobs": True},
            "invalid_value",
            "num_prompt_logprobs is 257; it must be 0 to 256",
        ),
        ({"first_prompt_logprob": 20}, "invalid_value", "it must be below 20, the prompt's length"),
        ({"first_prompt_logprob": -1}, "invalid_value", "first_prompt_logprob is -1"),
        ({"num_prompt_logprobs": 1, "max_tokens": -1}, "invalid_value", "max_tokens is -1"),
        ({"min_tokens": 9}, "invalid_value", "at most max_tokens, which is 4"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"temperature": float("nan")}, "invalid_value", "temperature"),
        ({"temperature": float("inf")}, "invalid_value", "temperature"),
        ({"top_p": 0.0}, "invalid_value", "top_p"),
        ({"top_k": -1}, "invalid_value", "top_k"),
        ({"min_p": 1.5}, "invalid_value", "min_p"),
        ({"presence_penalty": 3.0}, "invalid_value", "presence_penalty"),
        ({"repetition_penalty": 0.0}, "invalid_value", "repetition_penalty"),
        ({"num_top_logprobs": 21}, "invalid_value", "0 to 20"),
        ({"num_stable_prefix_tokens": 21}, "invalid_value", "between 0 and 20"),
        ({"num_shared_prefix_tokens": 21}, "invalid_value", "num_shared_prefix_tokens is 21"),
        ({"timeout_s": -1.0}, "invalid_value", "timeout_s"),
        ({"adapters": [common_pb2.AdapterRef(name="a", version=1, sha256="x")]}, "invalid_value", "hex"),
        ({"adapters": [common_pb2.AdapterRef(version=1, sha256="ab" * 32)]}, "invalid_value", "name"),
    ],
)
def test_wrong_values_are_named(fields, code, text):
    with pytest.raises(KilnError, match=text) as caught:
        parse_request(generate_request(**fields), LIMITS, 0.0)
    assert caught.value.code == code
