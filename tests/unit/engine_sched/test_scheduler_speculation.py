"""Guessing ahead changes when tokens come, never which: scheduler and simulated runner together."""

import pytest

from kiln_common.errors import KilnError
from kiln_engine.domain import FinishReason
from kiln_engine.execution.verify_graphs import verify_ladder
from kiln_engine.scheduling import SchedulerLimits, check_invariants
from tests.support.engine_scheduling import (
    EOS,
    Guesser,
    SchedulerRig,
    expected_completion,
    make_request,
    right_guesses,
)

PAGE = 4


def speculating(guess="right", *, on_device=False, max_draft_tokens=3, **limits) -> SchedulerRig:
    """A rig whose sequences all guess: what will come, every third time something else, or only that."""
    periods = {"right": 0, "mixed": 3, "wrong": 1}
    guesser = Guesser(
        lambda candidate, count: guesses(candidate, count),
        max_draft_tokens=max_draft_tokens,
        on_device=on_device,
    )
    rig = SchedulerRig(page_tokens=PAGE, speculator=guesser, **limits)
    guesses = right_guesses(lambda: rig, periods[guess])
    rig.guesser = guesser
    return rig


@pytest.mark.parametrize("guess", ["right", "mixed", "wrong"])
@pytest.mark.parametrize("max_draft_tokens", [1, 2, 3])
def test_tokens_are_those_of_plain_decoding_whatever_is_guessed(guess, max_draft_tokens, run_ahead):
    rig = speculating(guess, max_draft_tokens=max_draft_tokens, run_ahead=run_ahead)
    requests = [make_request(f"r{i}", range(10, 13 + 3 * i), max_tokens=23, seed=i) for i in range(5)]
    for request in requests:
        rig.add(request)
    rig.run()
    for request in requests:
        assert rig.tokens(request.request_id) == expected_completion(request, (), 23)
        assert rig.last(request.request_id).finish_reason is FinishReason.LENGTH


def test_right_guesses_save_steps_and_wrong_ones_cost_none():
    steps = {}
    for guess in ("right", "wrong"):
        rig = speculating(guess)
        rig.generate(make_request(max_tokens=41))
        steps[guess] = len(rig.plans)
        assert rig.guesser.num_steps == 0  # the loop tells
        assert (rig.guesser.num_accepted == rig.guesser.num_drafted) == (guess == "right")
    assert steps == {"right": 11, "wrong": 41}


@pytest.mark.parametrize("num_requests", range(3, 9))
def test_a_graph_holds_every_step_with_drafts(num_requests):
    rig = speculating(step_token_budget=20)
    for number in range(num_requests):
        rig.add(make_request(f"r{number}", range(10, 13), max_tokens=12, seed=number))
    rig.run()
    limits = rig.scheduler.limits
    ladder = verify_ladder(limits.num_most_running, limits.num_most_lines, limits.max_draft_tokens)
    for plan in rig.plans:
        num_lines = min(lines for lines in ladder if lines >= plan.num_verify_lines)
        assert len(plan.verify_rows) <= ladder[num_lines][-1]
    assert any(plan.num_verify_lines > 1 for plan in rig.plans)


def test_device_drafts_follow_a_step_that_makes_them():
    rig = speculating(on_device=True, max_draft_tokens=2)
    request = make_request(max_tokens=20)
    assert rig.generate(request) == expected_completion(request, (), 20)
    first, second = (plan.verify_rows[0] for plan in rig.plans[1:3])
    assert (first.num_drafts, first.draft_token_ids, first.num_next_drafts) == (0, (), 2)
    assert (second.num_drafts, second.draft_token_ids) == (2, None)
    assert 0 < rig.guesser.num_accepted < rig.guesser.num_drafted


def test_a_sequence_folds_before_it_decodes_plainly_again():
    wants = [2]
    rig = speculating(max_draft_tokens=2)
    rig.guesser._wants = lambda candidate: min(candidate.most_drafts, wants[0])
    request = make_request(prompt=range(10, 17), max_tokens=30)
    rig.add(request)
    for _ in range(2):
        rig.step()
    [sequence] = rig.scheduler.running
    assert sequence.num_computed - sequence.num_state_tokens >= PAGE
    wants[0] = 0
    [fold] = rig.step().verify_rows
    assert (fold.num_drafts, fold.state_fold_slot) == (0, sequence.state_slot)
    assert len(rig.step().decode_rows) == 1
    rig.run()
    assert rig.tokens("r") == expected_completion(request, (), 30)


def test_all_that_decode_share_the_step_of_one_that_guesses():
    rig = speculating()
    rig.guesser._wants = lambda candidate: 2 if candidate.num_prompt_tokens == 9 else 0
    rig.add(make_request("guesses", [1] * 9, max_tokens=9))
    rig.add(make_request("plain", [2] * 5, max_tokens=9))
    rig.step()
    plan = rig.step()
    assert sorted(row.num_drafts for row in plan.verify_rows) == [0, 2]
    assert plan.num_tokens == 4
    rig.run()
    for name, prompt in (("guesses", [1] * 9), ("plain", [2] * 5)):
        assert rig.tokens(name) == expected_completion(make_request(name, prompt), (), 9)


def test_nothing_is_planned_while_guesses_are_under_way():
    rig = speculating(run_ahead=1)
    rig.add(make_request(max_tokens=9))
    rig.step()
    assert rig.launch().is_empty  # the prompt's token is not known
    rig.settle()
    assert rig.launch().verify_rows
    rig.add(make_request("other", [5] * 6))
    assert rig.launch().is_empty
    rig.settle()
    assert rig.launch().prefill_chunks
    rig.run()


def test_sequences_that_do_not_guess_run_ahead():
    rig = speculating(run_ahead=1)
    rig.guesser._wants = lambda candidate: 0
    rig.add(make_request(max_tokens=9))
    rig.launch()
    [row] = rig.launch().decode_rows
    assert row.token_id is None
    rig.run()


def test_lines_keep_to_what_a_step_holds():
    rig = speculating(max_running=8, step_token_budget=14)
    for i in range(8):
        rig.add(make_request(f"r{i}", [i] * 2, max_tokens=12))
    rig.run()
    assert max(plan.num_tokens for plan in rig.plans) <= 14
    by_rows = {
        len(plan.verify_rows): max(r.num_lines for r in plan.verify_rows)
        for plan in rig.plans
        if plan.verify_rows
    }
    assert all(rows * lines <= 10 for rows, lines in by_rows.items())


def test_tokens_after_a_stop_among_the_accepted_are_dropped():
    for seed in range(10_000):
        request = make_request(max_tokens=60, ignore_eos=False, seed=seed)
        answer = expected_completion(request, (), 40)
        # In the middle of the second step's four tokens.
        if EOS in answer and answer.index(EOS) == 7 - 1:
            break
    rig = speculating()
    assert rig.generate(request) == answer[:7]
    assert rig.last("r").finish_reason is FinishReason.STOP
    assert rig.scheduler.stats().num_generated_tokens == 7
    whole = (*request.prompt_token_ids, *answer[:7])
    for node in rig.scheduler.memory.tree.nodes():
        tokens: tuple[int, ...] = ()
        while node.parent is not None:
            tokens, node = node.tokens + tokens, node.parent
        assert whole[: len(tokens)] == tokens
    follow_up = make_request("next", [*whole, 1, 2], max_tokens=6)
    assert rig.generate(follow_up) == expected_completion(follow_up, (), 6)
    assert rig.first("next").num_cached_tokens >= len(whole) // PAGE * PAGE - 2 * PAGE


@pytest.mark.parametrize("on_device", [False, True])
def test_too_few_pages_shorten_drafts_and_preempt_as_always(on_device):
    rig = speculating("mixed", num_pages=14, on_device=on_device)
    requests = [make_request(f"r{i}", range(10, 19 + i), max_tokens=20, seed=i) for i in range(3)]
    for request in requests:
        rig.add(request)
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    for request in requests:
        assert rig.tokens(request.request_id) == expected_completion(request, (), 20)


def test_an_abort_and_a_failure_under_way_give_everything_back():
    for is_failure in (False, True):
        rig = speculating()
        rig.add(make_request(max_tokens=30))
        for _ in range(3):
            rig.step()
        rig.launch()
        if is_failure:
            rig.fail(KilnError("broken"))
        else:
            rig.scheduler.abort("r")
            check_invariants(rig.scheduler)
            rig.settle()
        memory = rig.scheduler.memory
        assert memory.num_available_pages == memory.pages.num_ids
        assert not rig.guesser.known


def test_drafts_longer_than_a_page_and_fixed_chunks_are_refused():
    sizes = {"num_pages": 8, "num_state_slots": 4, "max_model_len": 64, "max_running": 2}
    with pytest.raises(ValueError, match="a page of 4 tokens"):
        SchedulerLimits(**sizes, step_token_budget=32, page_tokens=4, max_draft_tokens=4)
    with pytest.raises(ValueError, match="fixed chunks forbid"):
        SchedulerLimits(**sizes, step_token_budget=32, max_draft_tokens=3, fixed_chunk_tokens=16)
