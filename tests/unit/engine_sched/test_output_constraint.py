"""What a completion's rules allow, token by token, with a matcher that counts."""

import pytest

from kiln_engine.domain import FinishReason, SamplingParams
from kiln_engine.domain.errors import GrammarFailed
from kiln_engine.domain.output_rules import Allowance, OutputRules, ThinkingRules
from kiln_engine.scheduling.output_constraint import OutputConstraint
from kiln_engine.scheduling.stopping import finish_reason
from tests.support.engine_scheduling import EOS, SchedulerRig, make_request

END, NEWLINE, BLANK, TRIGGER = 20, 21, 22, 23
STOPS = frozenset({EOS})


class CountingMatcher:
    """Takes so many tokens and no more."""

    def __init__(self, num_left: int) -> None:
        self.num_left = num_left
        self.taken: list[int] = []

    @property
    def is_at_end(self) -> bool:
        return self.num_left == 0

    def fork(self) -> "CountingMatcher":
        forked = CountingMatcher(self.num_left)
        forked.taken = list(self.taken)
        return forked

    def advance(self, token_id: int) -> None:
        if not self.num_left:
            raise GrammarFailed("it is at its end")
        self.num_left -= 1
        self.taken.append(token_id)


class CountingGrammar:
    def __init__(self, num_tokens: int = 3) -> None:
        self.num_tokens = num_tokens
        self.started: list[CountingMatcher] = []

    def start(self) -> CountingMatcher:
        self.started.append(CountingMatcher(self.num_tokens))
        return self.started[-1]


def thinking(budget: int | None = None) -> ThinkingRules:
    return ThinkingRules(END, budget, (NEWLINE,), (BLANK,))


def constraint(min_tokens: int = 0, **rules) -> OutputConstraint:
    return OutputConstraint(OutputRules(**rules), STOPS, min_tokens)


def test_a_grammar_speaks_from_the_first_token():
    grammar = CountingGrammar()
    rules = constraint(grammar=grammar)
    assert rules.allowance == Allowance(matcher=grammar.started[0])
    rules.advance(5)
    assert grammar.started[0].taken == [5]


def test_looking_ahead_changes_nothing_and_ends_where_the_grammar_does():
    grammar = CountingGrammar(num_tokens=2)
    rules = constraint(grammar=grammar)
    ahead = rules.after(5)
    assert ahead is not None
    assert ahead.allowance.matcher.taken == [5]
    end = ahead.after(6)
    assert end is not None
    assert end.after(7) is None
    assert rules.allowance == Allowance(matcher=grammar.started[0])
    assert grammar.started[0].taken == []


def test_looking_ahead_spends_a_budget_of_its_own():
    rules = constraint(thinking=thinking(budget=1))
    ahead = rules.after(1)
    assert ahead is not None
    assert ahead.allowance == Allowance(only=NEWLINE)
    assert rules.allowance == Allowance()
    ahead = ahead.after(NEWLINE)
    assert ahead is not None
    assert ahead.allowance == Allowance(only=END)


def test_thinking_that_ends_by_itself_leads_into_the_grammar_by_the_same_tokens():
    grammar = CountingGrammar()
    rules = constraint(grammar=grammar, thinking=thinking(budget=10))
    assert rules.allowance == Allowance(banned_token_ids=STOPS)
    rules.advance(1)
    rules.advance(END)
    assert rules.allowance == Allowance(only=BLANK)
    assert not grammar.started
    rules.advance(BLANK)
    assert rules.allowance.matcher is grammar.started[0]


def test_a_spent_budget_forces_the_end():
    rules = constraint(thinking=thinking(budget=2))
    forced = []
    for token in (1, 2):
        assert rules.allowance == Allowance()
        rules.advance(token)
    while rules.allowance.only is not None:
        forced.append(rules.allowance.only)
        rules.advance(forced[-1])
    assert forced == [NEWLINE, END, BLANK]
    assert rules.allowance == Allowance()


def test_a_budget_of_nothing_forces_the_end_at_once():
    assert constraint(thinking=thinking(budget=0)).allowance == Allowance(only=NEWLINE)


def test_a_budget_leaves_draws_alone_before_it_and_after_the_thinking():
    rules = constraint(thinking=thinking(budget=3))
    assert [rules.applies_at(index) for index in range(5)] == [False, False, False, True, True]
    rules.advance(END)
    assert not rules.applies_at(4)
    assert not constraint(thinking=thinking()).applies_at(100)
    assert constraint(grammar=CountingGrammar()).applies_at(0)


def test_free_text_after_thinking_needs_no_certain_beginning():
    rules = constraint(thinking=thinking(budget=10))
    rules.advance(END)
    assert rules.allowance == Allowance()


def test_a_trigger_starts_a_grammar_each_time():
    grammar = CountingGrammar(num_tokens=2)
    rules = constraint(grammar=grammar, trigger_token_id=TRIGGER)
    for turn in range(2):
        assert rules.allowance == Allowance()
        rules.advance(4)
        rules.advance(TRIGGER)
        assert rules.allowance == Allowance(matcher=grammar.started[turn])
        rules.advance(8)
        rules.advance(TRIGGER)  # inside, it is a token like others
    assert [matcher.taken for matcher in grammar.started] == [[8, TRIGGER], [8, TRIGGER]]


def test_a_trigger_in_the_thinking_is_none():
    grammar = CountingGrammar()
    rules = constraint(grammar=grammar, trigger_token_id=TRIGGER, thinking=thinking())
    assert rules.allowance == Allowance()  # and the completion may end there
    rules.advance(TRIGGER)
    assert not grammar.started
    rules.advance(END)
    rules.advance(TRIGGER)
    assert len(grammar.started) == 1


def test_stops_are_banned_before_min_tokens():
    rules = constraint(min_tokens=2, grammar=CountingGrammar())
    banned = []
    for token in (1, 2, 3):
        banned.append(rules.allowance.banned_token_ids)
        rules.advance(token)
    assert banned == [STOPS, STOPS, frozenset()]


def test_where_rules_leave_only_a_stop_it_counts_however_early():
    counts = {"token_id": EOS, "num_outputs": 1, "num_tokens": 5, "max_num_tokens": 50}
    params = SamplingParams(max_tokens=9, min_tokens=4)
    assert finish_reason(params, STOPS, **counts) is None
    assert finish_reason(params, STOPS, **counts, has_rules=True) is FinishReason.STOP


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_grammar_that_fails_ends_its_request_and_no_other(run_ahead):
    rig = SchedulerRig(run_ahead=run_ahead)
    rig.add(make_request("other", max_tokens=8))
    rig.add(make_request("failing", max_tokens=8, rules=OutputRules(grammar=CountingGrammar(3))))
    rig.run()
    assert len(rig.tokens("other")) == 8
    assert len(rig.tokens("failing")) == 3
    assert rig.last("failing").error.code == "grammar_failed"


def test_a_row_that_waits_for_a_token_under_way_makes_its_step_late():
    rig = SchedulerRig(run_ahead=1)
    rig.add(make_request("free", max_tokens=8))
    rig.step()
    assert not rig.launch().has_late_rows
    rig.settle()
    rig.add(make_request("bound", max_tokens=8, rules=OutputRules(grammar=CountingGrammar(9))))
    assert not rig.launch().has_late_rows  # its first token depends on nothing drawn
    assert rig.launch().has_late_rows
    rig.settle()
    assert not rig.launch().has_late_rows


@pytest.mark.parametrize("fixed_chunk_tokens", [0, 8])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_grammar_follows_each_token_once_although_its_request_gave_way(run_ahead, fixed_chunk_tokens):
    """With fixed chunks, what a request had answered is decoded again, and not drawn again."""
    rig = SchedulerRig(
        run_ahead=run_ahead, num_pages=12, max_model_len=40, fixed_chunk_tokens=fixed_chunk_tokens
    )
    grammars = [CountingGrammar(100) for _ in range(3)]
    for index, grammar in enumerate(grammars):
        rules = OutputRules(grammar=grammar)
        fields = {"max_tokens": 20, "seed": index, "arrival_s": float(index), "rules": rules}
        rig.add(make_request(f"r{index}", [index] * 6, **fields))
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    for index, grammar in enumerate(grammars):
        [matcher] = grammar.started
        assert matcher.taken == rig.tokens(f"r{index}")
        assert len(matcher.taken) == 20
    rows = [row for plan in rig.plans for row in plan.decode_rows]
    drawn = [row for row in rows if row.sampling.constraint is not None]
    assert (len(drawn) < len(rows)) == bool(fixed_chunk_tokens)
