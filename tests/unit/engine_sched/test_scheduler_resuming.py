"""A sequence that another engine began goes on as if it had never changed engines."""

import pytest

from kiln_common.errors import PromptTooLong
from kiln_engine.domain import FinishReason
from kiln_engine.domain.errors import GrammarFailed
from kiln_engine.domain.output_rules import Allowance, OutputRules, ThinkingRules
from kiln_engine.scheduling.output_constraint import start_constraint
from tests.support.engine_scheduling import EOS, expected_completion, make_request
from tests.unit.engine_sched.test_output_constraint import CountingGrammar

NUM_TOKENS = 20


def whole(**fields):
    return make_request("whole", max_tokens=NUM_TOKENS, seed=5, **fields)


def behind(num_tokens, **fields):
    """The same request, the first tokens of its completion drawn elsewhere."""
    drawn = expected_completion(whole(**fields), (), num_tokens)
    return make_request(
        "rest", max_tokens=NUM_TOKENS, seed=5, resumed_token_ids=tuple(drawn), **fields
    )  # fmt: skip


@pytest.mark.parametrize("fixed_chunk_tokens", [0, 16])
def test_what_follows_is_what_would_have_followed(make_rig, fixed_chunk_tokens):
    expected = expected_completion(whole(), (), NUM_TOKENS)
    for num_drawn in range(1, NUM_TOKENS):
        rig = make_rig(fixed_chunk_tokens=fixed_chunk_tokens)
        rig.add(make_request("company", [3] * 9, max_tokens=12))
        assert rig.generate(behind(num_drawn)) == expected[num_drawn:]
        assert rig.last("rest").finish_reason is FinishReason.LENGTH
        # Only what was drawn here counts as drawn here.
        assert rig.scheduler.counters.num_generated_tokens == 12 + NUM_TOKENS - num_drawn


def test_stops_are_banned_by_the_length_of_the_whole_answer(make_rig):
    fields = {"ignore_eos": False, "min_tokens": 10, "stop_token_ids": frozenset({EOS})}
    rig = make_rig()
    answer = rig.generate(whole(**fields))
    assert len(answer) > 10
    for num_drawn in (4, 9, 10):
        assert make_rig().generate(behind(num_drawn, **fields)) == answer[num_drawn:]


def test_it_gives_way_and_comes_back_like_others(make_rig):
    rig = make_rig(num_pages=10, max_model_len=40)
    for index in range(2):
        rig.add(make_request(f"r{index}", [index] * 6, max_tokens=20, seed=index))
    request = make_request("rest", [7] * 6, max_tokens=20, seed=5, arrival_s=1.0)
    expected = expected_completion(request, (), 20)
    resumed = make_request(
        "rest", [7] * 6, max_tokens=20, seed=5, arrival_s=1.0, resumed_token_ids=tuple(expected[:5])
    )
    assert rig.generate(resumed) == expected[5:]
    assert rig.scheduler.counters.num_preemptions > 0


def test_its_beginning_is_told_once_and_counts_no_more_hits_than_its_prompt_is_long(make_rig):
    rig = make_rig()
    rig.generate(whole())  # its answer is cached too
    rig.generate(behind(12))
    first, *others = rig.events["rest"]
    assert (first.is_first, first.seed) == (True, 5)
    assert not any(event.is_first for event in others)
    assert 0 < first.num_cached_tokens <= 20


def test_prompt_and_answer_together_must_leave_a_token(make_rig):
    rig = make_rig(max_model_len=24)
    with pytest.raises(PromptTooLong):
        rig.add(make_request(max_tokens=9, resumed_token_ids=(1, 2, 3, 4)))


def test_rules_go_on_where_the_answer_stands():
    thinking = ThinkingRules(20, 3, (21,), (22,))
    grammar = CountingGrammar(num_tokens=4)
    rules = OutputRules(grammar=grammar, thinking=thinking)

    def after(*tokens):
        return start_constraint(make_request(rules=rules, resumed_token_ids=tokens), frozenset({EOS}))

    assert after(1, 2).allowance.only is None
    assert after(1, 2, 3).allowance == Allowance(only=21)
    assert after(1, 2, 3, 21, 20).allowance == Allowance(only=22)
    after(1, 20, 22, 8, 9)
    assert grammar.started[-1].taken == [8, 9]
    with pytest.raises(GrammarFailed):
        after(20, 22, 8, 8, 8, 8, 8)
