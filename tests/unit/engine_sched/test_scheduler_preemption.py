from kiln_engine.domain import FinishReason
from tests.support.engine_scheduling import SchedulerRig, expected_completion, make_request


def crowded(make_rig) -> tuple[SchedulerRig, list]:
    """Three requests that start together and outgrow ten pages of four tokens."""
    rig = make_rig(num_pages=10, max_model_len=40)
    requests = [
        make_request(f"r{index}", [index] * 6, max_tokens=20, seed=index, arrival_s=float(index))
        for index in range(3)
    ]
    for request in requests:
        rig.add(request)
    return rig, requests


def test_preempted_requests_get_the_same_tokens(make_rig):
    rig, requests = crowded(make_rig)
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    for request in requests:
        assert rig.tokens(request.request_id) == expected_completion(request, (), 20)
        assert rig.last(request.request_id).finish_reason is FinishReason.LENGTH


def test_the_youngest_gives_way_first_and_the_oldest_ends_first(make_rig):
    rig, _ = crowded(make_rig)
    while rig.scheduler.counters.num_preemptions == 0:
        rig.step()
    assert [sequence.request.request_id for sequence in rig.scheduler.waiting] == ["r2"]
    rig.run()
    ends = {name: len(rig.plans) for name in rig.events}
    assert list(ends) == ["r0", "r1", "r2"]


def test_the_lowest_priority_gives_way_before_the_youngest(make_rig):
    rig = make_rig(num_pages=8, max_model_len=32)
    rig.add(make_request("unimportant", [1] * 6, max_tokens=20, priority=5, arrival_s=0.0))
    rig.add(make_request("important", [2] * 6, max_tokens=20, priority=0, arrival_s=1.0))
    while rig.scheduler.counters.num_preemptions == 0:
        rig.step()
    assert rig.scheduler.waiting[0].request.request_id == "unimportant"


def test_a_preempted_request_starts_again_from_what_is_still_cached(make_rig):
    rig = make_rig(num_pages=12, max_model_len=48)
    for index in range(2):
        rig.add(make_request(f"r{index}", [index] * 5, max_tokens=40, seed=index, arrival_s=float(index)))
    while rig.scheduler.counters.num_preemptions == 0:
        rig.step()
    rig.scheduler.abort("r0")
    rig.settle()
    plan = rig.step()
    [chunk] = plan.prefill_chunks
    assert chunk.start > 0
    rig.run()
    assert rig.tokens("r1") == expected_completion(make_request(prompt=[1] * 5, seed=1), (), 40)


def test_first_token_facts_survive_preemption(make_rig):
    rig, _ = crowded(make_rig)
    rig.run()
    for events in rig.events.values():
        assert [event.is_first for event in events] == [True] + [False] * 19
    assert rig.scheduler.counters.num_prompt_tokens == 18
