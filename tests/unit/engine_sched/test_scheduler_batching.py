import pytest

from kiln_common.errors import DuplicateRequestId, KilnError, PromptTooLong
from kiln_engine.domain import FinishReason
from kiln_engine.domain.errors import EmptyPrompt
from kiln_engine.scheduling import SchedulerLimits, check_invariants
from tests.support.engine_scheduling import EOS, expected_completion, make_request


def test_a_long_prompt_is_computed_in_chunks_within_the_budget(make_rig):
    rig = make_rig(step_token_budget=16)
    rig.generate(make_request(prompt=range(45), max_tokens=1))
    sizes = [plan.num_tokens for plan in rig.plans]
    assert sizes == [16, 16, 13]


def test_decode_rows_and_prefill_chunks_share_a_step(make_rig):
    rig = make_rig(step_token_budget=16)
    rig.add(make_request("first", range(4), max_tokens=9))
    rig.step()
    rig.add(make_request("second", range(100, 130), max_tokens=2))
    plan = rig.step()
    assert len(plan.decode_rows) == 1
    assert [len(chunk.token_ids) for chunk in plan.prefill_chunks] == [12]


def test_completions_do_not_depend_on_their_neighbours(make_rig):
    requests = [make_request(f"r{i}", range(i, i + 7 * i + 1), max_tokens=10, seed=i) for i in range(1, 7)]
    rig = make_rig()
    for request in requests:
        rig.add(request)
    rig.run()
    for request in requests:
        assert rig.tokens(request.request_id) == expected_completion(request, (), 10)


def test_lower_priority_values_start_first_then_earlier_arrivals(make_rig):
    rig = make_rig(max_running=1)
    rig.add(make_request("late", arrival_s=2.0))
    rig.add(make_request("early", arrival_s=1.0))
    rig.add(make_request("urgent", arrival_s=3.0, priority=-1))
    rig.run()
    assert list(rig.events) == ["urgent", "early", "late"]


def test_a_stop_token_ends_the_completion_and_is_its_last_token(make_rig):
    request = make_request(max_tokens=200, ignore_eos=False, seed=3)
    rig = make_rig()
    tokens = rig.generate(request)
    assert tokens[-1] == EOS
    assert EOS not in tokens[:-1]
    assert rig.last("r").finish_reason is FinishReason.STOP


def test_own_stop_tokens_end_a_completion_that_ignores_eos(make_rig):
    request = make_request(max_tokens=200, stop_token_ids=frozenset(range(0, 50, 2)))
    rig = make_rig()
    tokens = rig.generate(request)
    assert tokens[-1] % 2 == 0
    assert all(token % 2 for token in tokens[:-1])


def test_no_stop_before_min_tokens(make_rig):
    request = make_request(max_tokens=20, min_tokens=5, stop_token_ids=frozenset(range(49)))
    rig = make_rig()
    tokens = rig.generate(request)
    assert tokens[:5] == [49] * 5
    assert len(tokens) >= 6
    assert all(token == 49 for token in tokens[:-1])


def test_the_context_ends_a_completion(make_rig):
    rig = make_rig(max_model_len=32)
    assert len(rig.generate(make_request(prompt=range(20), max_tokens=100))) == 12
    assert rig.last("r").finish_reason is FinishReason.LENGTH


def test_a_pool_smaller_than_the_context_ends_a_completion_too(make_rig):
    rig = make_rig(num_pages=6, max_model_len=512)
    assert len(rig.generate(make_request(prompt=range(20), max_tokens=100))) == 4


def test_impossible_requests_are_refused(make_rig):
    rig = make_rig(max_model_len=32)
    with pytest.raises(EmptyPrompt):
        rig.add(make_request(prompt=[]))
    with pytest.raises(PromptTooLong, match="32 tokens, the limit is 31"):
        rig.add(make_request(prompt=range(32)))
    rig.add(make_request())
    with pytest.raises(DuplicateRequestId):
        rig.add(make_request())


def test_an_abort_frees_everything_when_no_step_is_under_way(make_rig):
    rig = make_rig()
    rig.add(make_request("running", range(40), max_tokens=50))
    for _ in range(10):
        rig.step()
    event = rig.scheduler.abort("running")
    assert event.finish_reason is FinishReason.ABORT
    check_invariants(rig.scheduler)
    rig.settle()
    stats = rig.scheduler.stats()
    assert stats.num_running == 0
    assert stats.num_pages_in_use == stats.num_pages_cached
    assert rig.scheduler.abort("running") is None


def test_an_aborted_answer_is_not_cached(make_rig):
    rig = make_rig()
    rig.add(make_request("r", range(8), max_tokens=50))
    for _ in range(20):
        rig.step()
    rig.scheduler.abort("r")
    assert max(node.num_tokens for node in rig.scheduler.memory.tree.nodes()) == 8


def test_a_deadline_ends_waiting_and_running_requests(make_rig):
    rig = make_rig(max_running=1)
    rig.add(make_request("running", max_tokens=100, deadline_s=5.0))
    rig.add(make_request("waiting", max_tokens=100, deadline_s=6.0))
    rig.step(now=1.0)
    rig.step(now=7.0)
    for name in ("running", "waiting"):
        assert rig.last(name).finish_reason is FinishReason.ERROR
        assert rig.last(name).error.code == "deadline_exceeded"
    assert not rig.scheduler.has_work


def test_the_first_event_tells_queue_time_seed_and_cached_tokens(make_rig):
    rig = make_rig(max_running=1)
    rig.add(make_request("a", arrival_s=1.0, seed=11))
    rig.step(now=3.5)
    rig.settle()
    first = rig.first("a")
    assert (first.queue_s, first.seed, first.num_cached_tokens) == (2.5, 11, 0)


def test_a_failed_step_ends_its_sequences_and_frees_them(make_rig):
    rig = make_rig(max_running=2)
    for number, name in enumerate(("a", "b", "c")):
        rig.add(make_request(name, [number] * 9, max_tokens=9))
    for _ in range(3):
        rig.step()
    rig.launch()
    rig.fail(KilnError("broken"))
    for name in ("a", "b"):
        assert [event.error.code for event in rig.events[name] if event.finish_reason] == ["internal_error"]
    stats = rig.scheduler.stats()
    assert stats.num_pages_in_use == stats.num_pages_cached
    rig.run()
    assert rig.last("c").finish_reason is FinishReason.LENGTH


def test_rows_of_requests_that_ended_since_the_plan_are_ignored(make_rig):
    rig = make_rig()
    rig.add(make_request("a", range(30)))
    rig.add(make_request("b", range(100, 130)))
    rig.launch()
    rig.scheduler.abort("a")
    check_invariants(rig.scheduler)
    rig.settle()
    assert list(rig.events) == ["b"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_state_slots": 1},
        {"max_running": 0},
        {"step_token_budget": 9},
        {"max_model_len": 1},
        {"fixed_chunk_tokens": 64},
        {"fixed_chunk_tokens": 20},
    ],
)
def test_impossible_limits_are_refused(wrong):
    numbers = {
        "num_pages": 8,
        "num_state_slots": 8,
        "max_model_len": 64,
        "max_running": 8,
        "step_token_budget": 64,
    }
    with pytest.raises(ValueError):
        SchedulerLimits(**{**numbers, **wrong})
