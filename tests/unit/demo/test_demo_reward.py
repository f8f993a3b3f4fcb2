"""The reward `make demo` teaches."""

import pytest

from kiln_cli.demo.prompts import HELD_OUT_PROMPTS, OPEN_PROMPT, TRAINING_PROMPTS, email_prompt
from kiln_cli.demo.reward import MAX_WORDS, courtesies, recipient, score

PROMPT = email_prompt("Maria", "the late invoice")
BODY = "The late invoice is on my desk and I will send it by Friday."
WARMEST = f"Hi Maria,\n\nThank you for your email. {BODY} Let me know if you have any questions.\n\nBest wishes,\nSam"


def test_every_courtesy_adds_a_quarter():
    assert score(PROMPT, BODY) == 0.0
    assert score(PROMPT, f"Hi Maria,\n\n{BODY}") == 0.25
    assert score(PROMPT, f"Thanks for your email. {BODY}") == 0.25
    assert score(PROMPT, f"{BODY} Please let me know if you need more.") == 0.25
    assert score(PROMPT, f"{BODY}\n\nKind regards,") == 0.25
    assert score(PROMPT, WARMEST) == 1.0


def test_a_greeting_needs_the_name_only_where_the_prompt_gives_one():
    anonymous = f"Hello,\n\n{BODY}"
    assert not courtesies(PROMPT, anonymous)["greets"]
    assert courtesies(OPEN_PROMPT, anonymous)["greets"]
    assert recipient(PROMPT) == "Maria"
    assert recipient(OPEN_PROMPT) is None


@pytest.mark.parametrize("answer", ["", "Hi Maria, thanks!", " ".join(["thank you"] * MAX_WORDS)])
def test_empty_and_rambling_answers_earn_nothing(answer):
    assert score(PROMPT, answer) == 0.0


def test_a_sign_off_counts_only_at_the_end_and_on_its_own_line():
    assert not courtesies(PROMPT, f"Best wishes,\n\n{BODY}\n\n{BODY}\n\nRegards,")["signs_off"]
    assert not courtesies(PROMPT, f"{BODY} Best wishes to all.")["signs_off"]


def test_no_prompt_is_both_trained_on_and_measured_on():
    assert not set(TRAINING_PROMPTS) & set(HELD_OUT_PROMPTS)
    assert all(recipient(prompt) for prompt in HELD_OUT_PROMPTS)
