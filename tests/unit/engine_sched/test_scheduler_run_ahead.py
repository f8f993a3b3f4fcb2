"""What only happens when a step is planned while the one before it is under way."""

from kiln_common.errors import KilnError
from kiln_engine.domain import FinishReason, RowResult, StepResult
from kiln_engine.scheduling import check_invariants
from tests.support.engine_scheduling import EOS, SchedulerRig, expected_completion, make_request

PAGE = 4


def ahead(**limits) -> SchedulerRig:
    return SchedulerRig(run_ahead=1, page_tokens=PAGE, **limits)


def stopping_request(num_outputs: int, request_id: str = "r", **fields):
    """A request that EOS ends with its `num_outputs`th token."""
    for seed in range(10_000):
        request = make_request(request_id, max_tokens=100, ignore_eos=False, seed=seed, **fields)
        tokens = expected_completion(request, (), num_outputs)
        if tokens.index(EOS) == num_outputs - 1 if EOS in tokens else False:
            return request
    raise AssertionError("no seed stops there")


def cached_paths(rig: SchedulerRig) -> set[tuple[int, ...]]:
    """The token sequences that the prefix tree knows."""
    paths = set()
    for node in rig.scheduler.memory.tree.nodes():
        tokens: tuple[int, ...] = ()
        while node.parent is not None:
            tokens, node = node.tokens + tokens, node.parent
        paths.add(tokens)
    return paths


def test_the_first_decode_is_planned_before_the_prompts_token_is_known():
    rig = ahead()
    rig.add(make_request(max_tokens=5))
    rig.launch()
    [row] = rig.launch().decode_rows
    assert (row.token_id, row.position, row.sampling.output_index) == (None, 20, 1)
    rig.settle()
    rig.run()
    assert rig.tokens("r") == expected_completion(make_request(max_tokens=5), (), 5)


def test_prompt_chunks_follow_each_other_without_waiting():
    rig = ahead(step_token_budget=16)
    rig.add(make_request(prompt=range(45), max_tokens=2))
    chunks = [rig.launch().prefill_chunks[0] for _ in range(2)]
    assert [(chunk.start, len(chunk.token_ids)) for chunk in chunks] == [(0, 16), (16, 16)]
    rig.settle()
    rig.run()
    assert len(rig.tokens("r")) == 2


def test_the_second_chunk_after_a_hit_goes_on_from_the_first():
    rig = ahead(step_token_budget=16)
    prefix = list(range(100, 120))
    rig.generate(make_request("first", prefix, max_tokens=1, num_stable_prefix_tokens=20))
    request = make_request("second", [*prefix, *range(30)], max_tokens=3)
    rig.add(request)
    first, second = (rig.launch().prefill_chunks[0] for _ in range(2))
    assert first.start > 0
    assert first.state_read_slot != first.state_slot
    assert second.state_read_slot == second.state_slot == first.state_slot
    rig.settle()
    rig.run()
    assert rig.tokens("second") == expected_completion(request, (), 3)


def test_nothing_is_planned_past_the_last_token():
    for limits, request in (
        ({}, make_request(max_tokens=2)),
        ({"max_model_len": 22}, make_request(max_tokens=100)),
    ):
        rig = ahead(**limits)
        rig.add(request)
        rig.launch()
        assert len(rig.launch().decode_rows) == 1
        rig.settle(1)
        assert rig.launch().is_empty
        rig.settle()
        assert rig.last("r").finish_reason is FinishReason.LENGTH


def test_a_row_that_needs_the_token_before_sits_out():
    rig = ahead()
    rig.add(make_request("plain", [1] * 5, max_tokens=9))
    rig.add(make_request("penalised", [2] * 5, max_tokens=9, presence_penalty=0.5))
    rig.launch()
    assert len(rig.launch().decode_rows) == 1
    rig.settle()
    [plain, penalised] = rig.launch().decode_rows
    assert len(penalised.sampling.output_token_ids) == 1
    assert plain.sampling.output_token_ids == ()
    rig.run()
    assert {len(rig.tokens(name)) for name in ("plain", "penalised")} == {9}


def test_a_late_stop_keeps_what_the_sequence_holds_until_its_last_row_is_committed():
    rig = ahead()
    rig.add(stopping_request(5))
    while not rig.events.get("r") or rig.last("r").finish_reason is None:
        rig.step()
    assert rig.last("r").finish_reason is FinishReason.STOP
    [(plan, _)] = rig.launched
    [row] = plan.decode_rows
    memory = rig.scheduler.memory
    assert memory.states.num_references(row.state_slot) == 1
    assert all(memory.pages.num_references(page) for page in row.page_ids)
    assert not rig.scheduler.has_work
    rig.settle()
    assert rig.tokens("r")[-1] == EOS
    assert len(rig.tokens("r")) == 5
    assert memory.num_available_pages == memory.pages.num_ids


def test_no_token_past_a_late_stop_is_cached_wherever_it_falls_in_a_page():
    for num_outputs in range(2, 2 + 2 * PAGE):
        rig = ahead()
        request = stopping_request(num_outputs, prompt=range(20, 31))
        rig.add(request)
        rig.run()
        answer = expected_completion(request, (), num_outputs)
        assert rig.tokens("r") == answer
        whole = (*request.prompt_token_ids, *answer)
        assert all(whole[: len(path)] == path for path in cached_paths(rig))
        # The next turn repeats the answer and goes on from the state at its last full page.
        follow_up = make_request("next", [*whole, 1, 2], max_tokens=6)
        assert rig.generate(follow_up) == expected_completion(follow_up, (), 6)
        assert rig.first("next").num_cached_tokens >= len(whole) // PAGE * PAGE - PAGE


def test_a_last_page_that_is_not_finite_is_not_cached():
    """The step after the stop computes the stop token; nobody reads its row, but its page might be kept."""
    rig = ahead()
    request = stopping_request(PAGE + 1, prompt=range(20, 31))  # its last token completes a page
    rig.add(request)
    while not rig.events.get("r") or rig.last("r").finish_reason is None:
        rig.step()
    plan, _ = rig.launched.popleft()
    [row] = plan.decode_rows
    assert row.state_commit_slot is not None
    nan = RowResult(row.sequence_id, 0, logprob=float("nan"), sampled_logprob=0.0)
    rig.scheduler.commit(plan, StepResult(plan.step_id, (nan,)))
    check_invariants(rig.scheduler)
    assert max(map(len, cached_paths(rig))) <= len(request.prompt_token_ids)


def test_a_failure_after_a_late_stop_leaves_nothing_of_the_answer():
    rig = ahead()
    request = stopping_request(2 * PAGE, prompt=range(20, 31))
    rig.add(request)
    while not rig.events.get("r") or rig.last("r").finish_reason is None:
        rig.step()
    rig.fail(KilnError("broken"))
    assert [event.finish_reason for event in rig.events["r"] if event.finish_reason] == [FinishReason.STOP]
    assert max(map(len, cached_paths(rig))) <= len(request.prompt_token_ids)


def test_an_abort_with_two_steps_under_way_holds_on_until_the_second():
    rig = ahead()
    rig.add(make_request(max_tokens=50))
    rig.step()
    rig.launch()
    rig.scheduler.abort("r")
    check_invariants(rig.scheduler)
    rig.settle(1)
    assert len(rig.scheduler.ending) == 1
    rig.settle()
    assert not rig.scheduler.ending
    memory = rig.scheduler.memory
    assert memory.num_available_pages == memory.pages.num_ids
    assert memory.states.num_free + memory.states.num_only_cached == memory.states.num_ids


def test_a_failed_step_takes_the_one_launched_on_top_of_it_along():
    rig = ahead()
    rig.add(make_request("both", [1] * 5, max_tokens=50))
    rig.step()
    rig.add(make_request("second", [2] * 5, max_tokens=50))
    rig.launch()
    rig.fail(KilnError("broken"))
    for name in ("both", "second"):
        assert [event.finish_reason for event in rig.events[name]][-1:] == [FinishReason.ERROR]
    assert not rig.scheduler.has_work
    assert not rig.scheduler.ending


def test_nobody_gives_way_while_its_row_is_under_way():
    rig = ahead(num_pages=10, max_model_len=40)
    for index in range(3):
        rig.add(make_request(f"r{index}", [index] * 6, max_tokens=20, seed=index, arrival_s=float(index)))
    num_bubbles = 0
    while rig.scheduler.has_work:
        is_waiting = bool(rig.launched)
        in_steps = {i for plan, _ in rig.launched for i in plan.sequence_ids}
        num_bubbles += rig.step().is_empty and is_waiting
        assert not in_steps & {sequence.sequence_id for sequence in rig.scheduler.waiting}
    rig.settle()
    assert rig.scheduler.counters.num_preemptions > 0
    assert num_bubbles > 0
    for index in range(3):
        request = make_request(prompt=[index] * 6, seed=index)
        assert rig.tokens(f"r{index}") == expected_completion(request, (), 20)
