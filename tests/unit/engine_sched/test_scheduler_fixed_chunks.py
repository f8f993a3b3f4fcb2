"""What a sequence computes does not depend on others: chunks, hits and recomputed answers."""

from tests.support.engine_scheduling import expected_completion, make_request

CHUNK = 16  # four pages


def chunks_of(rig, prompt) -> list[tuple[int, int]]:
    """(start, length) of every chunk whose tokens stand in the prompt at its start."""
    return [
        (chunk.start, len(chunk.token_ids))
        for plan in rig.plans
        for chunk in plan.prefill_chunks
        if chunk.token_ids == tuple(prompt[chunk.start : chunk.start + len(chunk.token_ids)])
    ]


def test_a_prompt_is_cut_at_the_same_places_alone_and_in_company(make_rig):
    prompt = list(range(100, 141))
    for company in range(4):
        rig = make_rig(fixed_chunk_tokens=CHUNK, step_token_budget=CHUNK + 8 + 3)
        for index in range(company):
            rig.add(make_request(f"other{index}", [index] * (7 + 9 * index), max_tokens=9))
        rig.add(make_request("it", prompt))
        rig.run()
        assert chunks_of(rig, prompt) == [(0, 16), (16, 16), (32, 9)]


def test_a_chunk_that_does_not_fit_waits_and_smaller_ones_go_ahead(make_rig):
    rig = make_rig(fixed_chunk_tokens=CHUNK, step_token_budget=CHUNK + 8)
    rig.add(make_request("long", [1] * 40, arrival_s=0.0))
    rig.add(make_request("second", [2] * 20, arrival_s=1.0))
    rig.add(make_request("short", [3] * 5, arrival_s=2.0))
    rig.run()
    starts = [[(c.sequence_id, c.start, len(c.token_ids)) for c in plan.prefill_chunks] for plan in rig.plans]
    # Eight tokens are left beside the first one's chunks: room for nobody's but its own last.
    assert starts[:4] == [[(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8), (2, 0, 16)], [(2, 16, 4), (3, 0, 5)]]


def test_a_waiting_chunk_goes_ahead_of_whoever_comes_later(make_rig):
    rig = make_rig(fixed_chunk_tokens=CHUNK, step_token_budget=CHUNK + 8, num_pages=256, num_state_slots=64)
    rig.add(make_request("first", [1] * 64, arrival_s=0.0))
    rig.step()
    rig.add(make_request("it", [2] * 32, arrival_s=1.0))
    for index in range(20):  # always somebody small who would fit beside the first one's chunks
        rig.add(make_request(f"small{index}", [3 + index] * 3, arrival_s=2.0 + index))
        rig.step()
    steps = [{chunk.sequence_id: chunk.start for chunk in plan.prefill_chunks} for plan in rig.plans[:6]]
    assert [step.get(1) for step in steps] == [0, 16, 32, 48, None, None]
    assert [step.get(2) for step in steps] == [None, None, None, None, 0, 16]
    assert all(not set(step) - {1} for step in steps[:4]), "somebody who came later went first"


def test_hits_end_at_whole_chunks_and_only_those_are_cached(make_rig):
    rig = make_rig(fixed_chunk_tokens=CHUNK)
    prompt = list(range(100, 144))  # two chunks and three pages
    rig.add(make_request("first", prompt, max_tokens=8))
    rig.run()
    assert sorted(node.num_tokens for node in rig.scheduler.memory.tree.nodes()) == list(range(4, 33, 4))
    rig.add(make_request("again", prompt))
    rig.add(make_request("parts inside the second chunk", [*prompt[:28], *range(7)]))
    rig.run()
    assert rig.events["again"][0].num_cached_tokens == 32
    assert rig.events["parts inside the second chunk"][0].num_cached_tokens == 0
    # It has left a checkpoint at the chunk's end before the place where they part.
    rig.add(make_request("parts there too", [*prompt[:28], *range(20, 27)]))
    rig.run()
    assert rig.events["parts there too"][0].num_cached_tokens == 16


def test_what_an_answer_leaves_is_not_cached(make_rig):
    rig = make_rig(fixed_chunk_tokens=CHUNK)
    prompt = list(range(100, 120))
    rig.add(make_request("turn", prompt, max_tokens=40))
    rig.run()
    assert max(node.num_tokens for node in rig.scheduler.memory.tree.nodes()) == 16
    following = prompt + rig.tokens("turn") + [1]
    rig.add(make_request("next turn", following))
    rig.run()
    assert rig.events["next turn"][0].num_cached_tokens == 16


def test_an_answer_that_gave_way_is_decoded_again(make_rig):
    for run_ahead in (0, 1):
        rig = make_rig(
            fixed_chunk_tokens=8,
            num_pages=10,
            max_model_len=40,
            run_ahead=run_ahead,
        )
        requests = [
            make_request(f"r{i}", [i] * 6, max_tokens=20, seed=i, arrival_s=float(i), presence_penalty=i / 2)
            for i in range(3)
        ]
        for request in requests:
            rig.add(request)
        rig.run()
        assert rig.scheduler.counters.num_preemptions > 0
        for request in requests:
            assert rig.tokens(request.request_id) == expected_completion(request, (), 20)
            assert sum(event.is_first for event in rig.events[request.request_id]) == 1
        # Chunks hold prompts only: whoever came back has decoded what it had answered.
        assert {(c.start, len(c.token_ids)) for plan in rig.plans for c in plan.prefill_chunks} == {(0, 6)}
        assert rig.scheduler.counters.num_generated_tokens == 60
