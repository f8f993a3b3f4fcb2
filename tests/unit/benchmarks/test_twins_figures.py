"""From scored tokens to verdicts of the correctness twins."""

import math

import pytest

from scripts.gpu.twins import Token, broken_promises, compare, shortfalls, summarise

GOOD_FACTS = {"leaked_pages": 0, "leaked_state_slots": 0, "num_running_after": 0, "num_not_finite": 0}


def token(error=0.001, *, margin=1.0, agrees=True):
    return Token(error, 0.002, margin, agrees, True)


def groups(batch_error=0.001, **others):
    return {"batch": [[token(batch_error)] * 100], **others}


def test_an_engine_closer_than_the_references_bfloat16_misses_nothing():
    figures = summarise(groups(intact=[[token()]], wiped=[[token(0.5)]], swapped=[[token(0.4)]]))
    assert figures["agreement"] == 1
    assert not shortfalls(figures, GOOD_FACTS)


def test_tokens_within_the_noise_do_not_count_for_agreement():
    tokens = [token()] * 50 + [token(margin=0.001, agrees=False)] * 50
    figures = summarise({"batch": [tokens]})
    assert figures["agreement"] == 1
    assert figures["agreement_unfiltered"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("tokens_by_group", "facts", "words"),
    [
        ({"batch": [[token()] * 98 + [token(agrees=False)] * 2]}, {}, "agreement 0.98"),
        (groups(0.003), {}, "above transformers' own"),
        (groups(math.nan), {}, "above transformers' own"),
        (groups(intact=[[token()]], wiped=[[token(0.002)]]), {}, "wiped checkpoint went unnoticed"),
        (groups(long=[[token(0.001)] * 50 + [token(0.01)] * 50]), {}, "drifts"),
        (groups(), {"leaked_pages": 3}, "leaked_pages is 3"),
        (groups(), {"num_not_finite": 1}, "num_not_finite is 1"),
        (groups(), {"is_batch_invariant": True, "alone_identical_share": 0.9}, "yet 0.900 of the answers"),
        (groups(), {"is_batch_invariant": True}, "yet nan of the answers"),
    ],
)
def test_what_misses_its_aim_is_said(tokens_by_group, facts, words):
    found = shortfalls(summarise(tokens_by_group), GOOD_FACTS | facts)
    assert any(words in line for line in found), found


def test_only_a_batch_invariant_engine_must_answer_alone_as_in_a_batch():
    facts = GOOD_FACTS | {"alone_identical_share": 0.0, "is_batch_invariant": False}
    assert not shortfalls(summarise(groups()), facts)
    assert not broken_promises(facts | {"alone_identical_share": 1.0, "is_batch_invariant": True})


def test_reports_meet_their_own_scores():
    trace = {"group": "batch", "prompt": [1], "tokens": [5, 6], "logprobs": [-1.0, -2.0], "is_greedy": True}
    scores = {"logprobs": [-1.5, -2.0], "top_ids": [5, 7], "margins": [1.0, 1.0]}
    other = {**scores, "logprobs": [-1.0, -2.0]}
    scored = {
        "reports": [{"settings": name, "traces": [trace], "facts": {}} for name in ("one", "two")],
        "scores": {"float32": [scores, other], "bfloat16": [other, other]},
    }
    (_, one, _), (_, two, _) = compare(scored)
    assert one["mean_abs_error"] == pytest.approx(0.25)
    assert two["mean_abs_error"] == 0
    assert one["agreement_unfiltered"] == pytest.approx(0.5)
