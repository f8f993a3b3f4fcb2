import pytest

from kiln_engine.domain import AdapterUse
from kiln_engine.scheduling.checkpoints import plan_checkpoints, prompt_boundaries
from tests.support.engine_scheduling import SchedulerRig, expected_completion, make_request


def cached(rig: SchedulerRig, request_id: str) -> int:
    return rig.first(request_id).num_cached_tokens


def test_the_same_prompt_again_hits_up_to_its_last_page(make_rig):
    rig = make_rig()
    for name in ("a", "b"):
        rig.generate(make_request(name, range(23)))
    assert cached(rig, "b") == 20


def test_a_prompt_of_whole_pages_leaves_a_token_to_compute(make_rig):
    rig = make_rig()
    for name in ("a", "b"):
        rig.generate(make_request(name, range(24)))
    assert cached(rig, "b") == 20


def test_a_longer_prompt_hits_the_shorter_one(make_rig):
    rig = make_rig()
    rig.generate(make_request("a", range(23)))
    rig.generate(make_request("b", range(60)))
    assert cached(rig, "b") == 20


def test_a_stable_prefix_is_where_the_next_turn_hits(make_rig):
    rig = make_rig()
    history = list(range(30))
    rig.generate(make_request("turn1", [*history, 90, 91, 92, 93], num_stable_prefix_tokens=30))
    rig.generate(make_request("turn2", [*history, *range(60, 80)], num_stable_prefix_tokens=50))
    assert cached(rig, "turn2") == 28


def test_the_third_request_hits_a_branch_that_the_second_one_found(make_rig):
    rig = make_rig()
    system = list(range(16))
    for index, name in enumerate(("a", "b", "c")):
        rig.generate(make_request(name, system + [40 + index] * 10, num_stable_prefix_tokens=26))
    assert cached(rig, "b") == 0
    assert rig.scheduler.counters.num_tokens_lost_for_want_of_checkpoint == 16
    assert cached(rig, "c") == 16


def test_requests_that_arrive_together_compute_a_shared_prefix_once(make_rig):
    rig = make_rig(step_token_budget=512)
    system = list(range(16))
    for index in range(4):
        rig.add(make_request(f"r{index}", system + [40 + index] * 10, num_stable_prefix_tokens=26))
    rig.run()
    assert [cached(rig, f"r{index}") for index in range(4)] == [0, 16, 16, 16]


def test_a_group_on_one_prompt_computes_it_once(make_rig):
    rig = make_rig(step_token_budget=512)
    for index in range(5):
        rig.add(make_request(f"r{index}", range(30), seed=index))
    rig.run()
    assert [cached(rig, f"r{index}") for index in range(5)] == [0, 28, 28, 28, 28]
    for index in range(5):
        request = make_request(f"r{index}", range(30), seed=index)
        assert rig.tokens(request.request_id) == expected_completion(request, (), 4)


def test_a_finished_answer_can_be_continued(make_rig):
    rig = make_rig()
    prompt = list(range(10))
    answer = rig.generate(make_request("a", prompt, max_tokens=13))
    rig.generate(make_request("b", [*prompt, *answer, 3]))
    # 22 tokens were fed (the last one drawn never is): the last boundary is 20.
    assert cached(rig, "b") == 20


def test_an_answer_after_an_unstable_prompt_keeps_no_state(make_rig):
    rig = make_rig()
    prompt = list(range(10))
    answer = rig.generate(make_request("a", prompt, max_tokens=13, num_stable_prefix_tokens=8))
    rig.generate(make_request("b", [*prompt, *answer, 3]))
    assert cached(rig, "b") == 8


def test_adapters_scales_and_salts_do_not_share(make_rig):
    rig = make_rig()
    uses = {
        "base": ((), ()),
        "one": ((AdapterUse("x"),), ((1, 1.0),)),
        "half": ((AdapterUse("x", 0.5),), ((1, 0.5),)),
    }
    for name, (adapters, slots) in uses.items():
        rig.generate(make_request(name, range(30), adapters=adapters), slots)
        assert cached(rig, name) == 0
    rig.generate(make_request("salted", range(30), cache_salt="s"))
    assert cached(rig, "salted") == 0
    rig.generate(make_request("again", range(30), adapters=(AdapterUse("x"),)), ((1, 1.0),))
    assert cached(rig, "again") == 28


def test_interval_checkpoints_are_made_only_while_there_is_room(make_rig):
    roomy = make_rig(checkpoint_interval_tokens=8, num_state_slots=16)
    roomy.generate(make_request("a", range(40)))
    roomy.generate(make_request("b", [*range(18), 99, 98]))
    assert cached(roomy, "b") == 16
    tight = make_rig(checkpoint_interval_tokens=8, num_state_slots=2, max_running=2)
    tight.generate(make_request("a", range(40)))
    tight.generate(make_request("b", [*range(18), 99, 98]))
    assert cached(tight, "b") == 0


def test_two_slots_are_enough_to_start_from_a_checkpoint(make_rig):
    rig = make_rig(num_state_slots=2, max_running=2)
    for name in ("a", "b", "c"):
        rig.generate(make_request(name, range(23)))
    assert cached(rig, "b") == 20
    assert cached(rig, "c") == 20


def test_checkpoint_positions():
    plan = plan_checkpoints(
        num_prompt_tokens=3000,
        num_stable_tokens=2990,
        num_shared_tokens=0,
        num_hit_tokens=1024,
        branch_points=(1600, 512),
        page_tokens=16,
        interval_tokens=1024,
    )
    assert plan.wanted == (1600, 2976)
    assert plan.optional == (2048,)


@pytest.mark.parametrize(
    ("num_prompt", "num_stable", "num_shared", "expected"),
    [
        (32, 0, 0, {16}),  # without a hint the last boundary that leaves a token
        (33, 0, 0, {32}),
        (10, 0, 0, set()),
        (40, 32, 0, {32}),
        (40, 15, 0, {32}),  # a hint shorter than a page is none
        (32, 32, 0, {16, 32}),  # the same prompt again must leave a token
        (100, 95, 0, {80}),  # one page before the last is close enough
        (100, 70, 0, {64, 96}),  # two are not
        (100, 95, 40, {32, 80}),
        (100, 95, 15, {80}),
        (100, 0, 100, {96}),
    ],
)
def test_boundaries_that_later_requests_start_from(num_prompt, num_stable, num_shared, expected):
    found = prompt_boundaries(
        num_prompt_tokens=num_prompt,
        num_stable_tokens=num_stable,
        num_shared_tokens=num_shared,
        page_tokens=16,
    )
    assert found == expected


def test_a_shared_prefix_already_serves_the_second_conversation(make_rig):
    rig = make_rig()
    system = list(range(18))
    for index, name in enumerate(("a", "b", "c")):
        prompt = system + [40 + index] * 10
        request = make_request(name, prompt, num_stable_prefix_tokens=26, num_shared_prefix_tokens=18)
        assert rig.generate(request) == expected_completion(request, (), 4)
    assert [cached(rig, name) for name in "abc"] == [0, 16, 16]
    assert rig.scheduler.counters.num_tokens_lost_for_want_of_checkpoint == 0


def test_the_next_turn_still_hits_where_the_conversation_is_stable(make_rig):
    rig = make_rig()
    history = list(range(30))
    hints = {"num_shared_prefix_tokens": 9}
    rig.generate(make_request("turn1", [*history, 90, 91, 92, 93], num_stable_prefix_tokens=30, **hints))
    rig.generate(make_request("turn2", [*history, *range(60, 80)], num_stable_prefix_tokens=50, **hints))
    assert cached(rig, "turn2") == 28


def test_a_repeated_prompt_hits_when_its_stable_part_is_shorter_than_a_page(make_rig):
    rig = make_rig()
    for name in ("a", "b"):
        rig.generate(make_request(name, range(23), num_stable_prefix_tokens=3))
    assert cached(rig, "b") == 20


def test_choices_of_a_prompt_that_is_hardly_stable_share_one_prefill(make_rig):
    rig = make_rig(step_token_budget=16)
    for index in range(4):
        rig.add(make_request(f"r{index}", range(60), num_stable_prefix_tokens=10, seed=index))
    rig.run()
    assert [cached(rig, f"r{index}") for index in range(4)] == [0, 56, 56, 56]
    prefilled = [len(chunk.token_ids) for plan in rig.plans for chunk in plan.prefill_chunks]
    assert sum(prefilled) == 60 + 3 * 4


def test_a_tool_answer_extends_a_prompt_that_is_hardly_stable(make_rig):
    rig = make_rig()
    prompt = list(range(40))
    rig.generate(make_request("call", prompt, num_stable_prefix_tokens=10))
    rig.generate(make_request("answer", [*prompt, *range(60, 80)], num_stable_prefix_tokens=10))
    assert cached(rig, "answer") == 36


@pytest.mark.parametrize("num_stable", [0, 150, 200])
@pytest.mark.parametrize("length", [200, 201, 203])
def test_the_choices_of_one_request_compute_their_prompt_once(length, num_stable):
    rig = SchedulerRig(num_pages=400, num_state_slots=32, step_token_budget=256)
    prompt = [10 + i % 39 for i in range(length)]
    for choice in range(4):
        fields = {"max_tokens": 6, "seed": choice, "num_stable_prefix_tokens": num_stable}
        rig.add(make_request(f"choice-{choice}", prompt, **fields))
    rig.run()
    num_computed = sum(len(chunk.token_ids) for plan in rig.plans for chunk in plan.prefill_chunks)
    # What lies behind the last checkpoint, up to three pages, is each choice's own.
    assert length < num_computed <= length + 3 * 3 * 4
