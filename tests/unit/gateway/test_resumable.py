"""What the next engine is asked when one could not end an answer."""

from kiln_common.pb import common_pb2, engine_pb2
from kiln_gateway.resumable import ResumableAnswer


def version(number):
    return common_pb2.AdapterRef(name="style", version=number, sha256=f"{number}" * 64)


def request(**fields):
    sampling = engine_pb2.SamplingParams(max_tokens=9, seed=7)
    return engine_pb2.GenerateRequest(
        request_id="a", prompt_token_ids=[1, 2, 3], sampling=sampling, **fields
    )  # fmt: skip


def output(**fields):
    return engine_pb2.SequenceOutput(request_id="a", **fields)


def test_a_request_that_has_no_token_yet_is_asked_as_it_was():
    asked = request(num_prompt_logprobs=2, cache_salt="s")
    assert ResumableAnswer(asked, 0.0).rest(1.0) == asked


def test_the_tokens_so_far_and_the_seed_go_along_and_the_request_stays_as_it_is():
    asked = request(cache_salt="s", priority=3)
    asked.sampling.ClearField("seed")
    before = asked.SerializeToString()
    answer = ResumableAnswer(asked, 0.0)
    answer.take(output(token_ids=[20], seed=99, num_cached_tokens=1))
    answer.take(output(token_ids=[21, 22]))
    rest = answer.rest(1.0)
    assert (list(rest.resumed_token_ids), rest.sampling.seed) == ([20, 21, 22], 99)
    assert (rest.cache_salt, rest.priority, rest.sampling.max_tokens) == ("s", 3, 9)
    # And a second time, behind what the next one drew; its own seed is the same one.
    answer.take(output(token_ids=[23], seed=99))
    assert list(answer.rest(2.0).resumed_token_ids) == [20, 21, 22, 23]
    assert asked.SerializeToString() == before


def test_what_is_left_of_the_time_goes_along():
    answer = ResumableAnswer(request(timeout_s=10.0), 100.0)
    assert answer.rest(104.0).timeout_s == 6.0
    # Over, which is not the same as no deadline at all.
    assert 0 < answer.rest(111.0).timeout_s < 0.01
    assert ResumableAnswer(request(), 100.0).rest(104.0).timeout_s == 0


def test_it_goes_on_with_the_versions_that_drew_last():
    uses = [version(1), version(5)]
    uses[0].scale = 0.5
    answer = ResumableAnswer(request(adapters=uses), 0.0)
    answer.take(output(token_ids=[20], seed=7))
    assert list(answer.rest(0.0).adapters) == uses
    answer.take(output(token_ids=[21], moved_to=[version(2), version(5)]))
    moved = answer.rest(0.0).adapters
    assert [(use.version, use.sha256[0], use.scale) for use in moved] == [(2, "2", 0.5), (5, "5", 0.0)]


def test_log_probabilities_of_the_prompt_are_told_once():
    answer = ResumableAnswer(request(num_prompt_logprobs=1), 0.0)
    top = [engine_pb2.TopLogprobs(token_ids=[1], logprobs=[-1.0])]
    answer.take(output(prompt_logprobs=[-1.0], top_prompt_logprobs=top))
    # In the middle of them: all are computed again, in other portions.
    assert answer.rest(0.0).num_prompt_logprobs == 1
    again = output(prompt_logprobs=[-1.0, -2.0], top_prompt_logprobs=top * 2)
    answer.take(again)
    assert (list(again.prompt_logprobs), len(again.top_prompt_logprobs)) == ([-2.0], 1)
    # Behind them they are not asked for.
    answer.take(output(token_ids=[20], seed=7))
    assert not answer.rest(0.0).HasField("num_prompt_logprobs")
