"""Follows a completion token by token and says what its rules allow next."""

from __future__ import annotations

import copy
from collections import deque

from kiln_common.errors import KilnError
from kiln_engine.domain.output_rules import Allowance, Matcher, OutputRules
from kiln_engine.domain.request import GenerationRequest


def start_constraint(request: GenerationRequest, stop_ids: frozenset[int]) -> OutputConstraint | None:
    """What a request's rules make of the first token to be drawn; None without rules.

    Raises:
        GrammarFailed: the tokens that another engine drew do not follow the grammar.
    """
    if request.rules is None:
        return None
    constraint = OutputConstraint(request.rules, stop_ids, request.sampling.min_tokens)
    for token_id in request.resumed_token_ids:
        constraint.advance(token_id)
    return constraint


class OutputConstraint:
    """The state of one request's OutputRules.

    First the thinking, if the prompt left it open: free until its end token, which is forced when
    the budget is spent. It cannot be ended by `stop_ids` while a grammar is to follow. Then the
    grammar, which decides alone where the completion may stop; or, with a trigger, free text in which
    the grammar holds from each trigger to where it can go no further.

    Stop ids are banned before output number `min_tokens`, except where the grammar has come to its end.
    """

    def __init__(self, rules: OutputRules, stop_ids: frozenset[int], min_tokens: int) -> None:
        self._rules = rules
        self._stop_ids = stop_ids
        self._min_tokens = min_tokens
        self._num_outputs = 0
        self._forced: deque[int] = deque()
        self._is_thinking = rules.thinking is not None
        self._matcher: Matcher | None = None
        self._has_whole_grammar = rules.grammar is not None and rules.trigger_token_id is None
        self._force_end_of_thinking()
        self._start_grammar()

    def applies_at(self, output_index: int) -> bool:
        """Whether this output's draw may depend on the outputs before it, or be no free draw.

        Asked before those outputs are known: a budget that is not spent yet leaves the draw free.
        """
        if self._rules.grammar is not None:
            return True
        thinking = self._rules.thinking
        assert thinking is not None
        is_past_thinking = not self._is_thinking and not self._forced
        if is_past_thinking or thinking.budget_tokens is None:
            return False
        return output_index >= thinking.budget_tokens

    @property
    def allowance(self) -> Allowance:
        """What may be drawn after the tokens so far."""
        if self._forced:
            return Allowance(only=self._forced[0])
        must_go_on = self._num_outputs < self._min_tokens or (self._is_thinking and self._has_whole_grammar)
        return Allowance(
            matcher=self._matcher, banned_token_ids=self._stop_ids if must_go_on else frozenset()
        )

    def advance(self, token_id: int) -> None:
        """Take the token that was drawn.

        Raises:
            GrammarFailed: the grammar went beyond its limits.
        """
        self._num_outputs += 1
        is_forced = bool(self._forced)
        if is_forced:
            self._forced.popleft()
        if self._is_thinking:
            self._think(token_id, is_forced)
        elif self._matcher is not None:
            self._matcher.advance(token_id)
            if self._rules.trigger_token_id is not None and self._matcher.is_at_end:
                self._matcher = None
        elif token_id == self._rules.trigger_token_id and self._rules.grammar is not None:
            self._matcher = self._rules.grammar.start()
        self._start_grammar()

    def after(self, token_id: int) -> OutputConstraint | None:
        """A copy that has taken a token, to look ahead with; None where the grammar forbids it."""
        ahead = copy.copy(self)
        ahead._forced = self._forced.copy()
        ahead._matcher = None if self._matcher is None else self._matcher.fork()
        try:
            ahead.advance(token_id)
        except KilnError:
            return None
        return ahead

    def _think(self, token_id: int, is_forced: bool) -> None:
        thinking = self._rules.thinking
        assert thinking is not None
        if token_id == thinking.end_token_id:
            self._is_thinking = False
            if not is_forced and self._has_whole_grammar:
                self._forced.extend(thinking.after_end_token_ids)
        elif not is_forced:
            self._force_end_of_thinking()

    def _force_end_of_thinking(self) -> None:
        """Force the end if the budget is spent."""
        thinking = self._rules.thinking
        if thinking is None or thinking.budget_tokens is None or self._num_outputs < thinking.budget_tokens:
            return
        self._forced.extend(thinking.before_end_token_ids)
        self._forced.append(thinking.end_token_id)
        self._forced.extend(thinking.after_end_token_ids)

    def _start_grammar(self) -> None:
        """Begin the grammar of the whole answer where nothing stands before it any more."""
        is_due = self._has_whole_grammar and not self._is_thinking and not self._forced
        if is_due and self._matcher is None:
            assert self._rules.grammar is not None
            self._matcher = self._rules.grammar.start()
