"""Drafts looked up in the sequence's own text."""

from __future__ import annotations

import random

import pytest

from kiln_engine.speculation import ngram
from kiln_engine.speculation.ngram import NgramProposer


def longest_suffix_match(tokens: list[int], max_tokens: int) -> tuple[int, ...]:
    """The same by looking everywhere: longest match first, then the latest."""
    for length in (4, 3, 2):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                drafts = list(tokens)
                for place in range(end, end + max_tokens):
                    drafts.append(drafts[place])
                return tuple(drafts[len(tokens) :])
    return ()


def test_proposes_what_followed_the_last_tokens_before():
    assert NgramProposer().propose([1, 2, 3, 4, 5, 9, 1, 2, 3], 3) == (4, 5, 9)


def test_a_longer_match_counts_more_than_a_later_one():
    tokens = [1, 2, 3, 7, 8, 2, 3, 5, 6, 1, 2, 3]
    assert NgramProposer().propose(tokens, 2) == (7, 8)


def test_of_equal_matches_the_latest_counts():
    assert NgramProposer().propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == (8,)


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2, 3, 4], [1, 2, 3, 1]])
def test_proposes_nothing_where_no_two_tokens_came_before(tokens):
    assert NgramProposer().propose(tokens, 4) == ()


def test_repetition_goes_on():
    assert NgramProposer().propose([5, 1, 2, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)


def test_finds_the_same_as_a_search_of_the_whole_text_while_it_grows():
    rng = random.Random(0)
    proposer, tokens, num_proposed = NgramProposer(), [], 0
    for _ in range(300):
        # Few tokens, but no pair more often than places are looked at.
        tokens.append(rng.randrange(9))
        expected = longest_suffix_match(tokens, 3)
        assert proposer.propose(tokens, 3) == expected
        num_proposed += bool(expected)
    assert num_proposed > 100


def test_takes_several_tokens_at_once_and_nothing_for_none():
    proposer = NgramProposer()
    assert proposer.propose([1, 2, 3, 4], 2) == ()
    assert proposer.propose([1, 2, 3, 4, 5, 6, 2, 3], 2) == (4, 5)
    assert proposer.propose([1, 2, 3, 4, 5, 6, 2, 3], 0) == ()


def test_a_long_prompt_is_looked_at_in_parts(monkeypatch):
    monkeypatch.setattr(ngram, "_MOST_TOKENS_PER_CALL", 10)
    proposer, tokens = NgramProposer(), [*range(30), 3, 4]
    answers = [proposer.propose(tokens, 2) for _ in range(4)]
    assert answers == [(), (), (5, 6), (5, 6)]
