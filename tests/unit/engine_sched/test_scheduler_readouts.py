"""Prompts that are asked about themselves: log-probabilities of their tokens, and embeddings."""

import dataclasses
import math

from kiln_engine.domain import FinishReason
from tests.support.engine_scheduling import expected_completion, make_request


def scored(rig, request_id):
    """The prompt tokens whose log-probabilities came, in order: the simulated runner's names its token."""
    events = rig.events[request_id]
    return [-1 - logprob for event in events if event.readout for logprob in event.readout.logprobs]


def holds_nothing(rig):
    stats = rig.scheduler.stats()
    return (stats.num_pages_in_use, stats.num_state_slots_in_use) == (0, 0)


def test_each_prompt_token_but_the_first_is_scored_once_over_several_chunks(make_rig):
    rig = make_rig(step_token_budget=16)
    prompt = [i % 40 for i in range(50)]
    request = make_request("r", prompt, num_prompt_logprobs=2, max_tokens=3, seed=5)
    assert rig.generate(request) == expected_completion(request, (), 3)
    assert scored(rig, "r") == prompt[1:]
    readouts = [event.readout for event in rig.events["r"] if event.readout]
    assert len(readouts) == 4
    assert all(len(top) == 2 for readout in readouts for top in readout.top.rows())
    assert holds_nothing(rig)


def test_tokens_before_the_first_that_is_wanted_are_context_alone(make_rig):
    rig = make_rig(step_token_budget=16)
    prompt = [i % 40 for i in range(50)]
    rig.generate(make_request("r", prompt, num_prompt_logprobs=2, first_prompt_logprob=37, max_tokens=0))
    assert scored(rig, "r") == prompt[37:]
    readouts = [event.readout for event in rig.events["r"]]
    assert [len(readout.top.rows()) for readout in readouts] == [0, 0, 12, 1]


def test_a_prompt_alone_ends_without_a_token(make_rig):
    rig = make_rig()
    assert rig.generate(make_request("r", range(1, 22), num_prompt_logprobs=0, max_tokens=0)) == []
    assert scored(rig, "r") == list(range(2, 22))
    last = rig.last("r")
    assert (last.finish_reason, last.is_first, last.readout.top.rows()) == (FinishReason.LENGTH, True, [])
    assert not any(plan.decode_rows for plan in rig.plans)
    assert holds_nothing(rig)


def test_a_prompt_of_one_token_has_nothing_to_score(make_rig):
    rig = make_rig()
    rig.generate(make_request("r", [3], num_prompt_logprobs=1, max_tokens=0))
    assert scored(rig, "r") == []
    assert rig.last("r").finish_reason is FinishReason.LENGTH


def test_embeddings_are_prefilled_together_and_let_go_at_once(make_rig):
    rig = make_rig(step_token_budget=64)
    for index in range(4):
        rig.add(make_request(f"e{index}", [index] * 15, max_tokens=0, wants_embedding=True))
    rig.run()
    assert [len(plan.prefill_chunks) for plan in rig.plans] == [4]
    assert all(chunk.sampling is None for chunk in rig.plans[0].prefill_chunks)
    for index in range(4):
        (event,) = rig.events[f"e{index}"]
        assert (event.readout.embedding, event.finish_reason) == ((1.0, 0.0), FinishReason.LENGTH)
    assert holds_nothing(rig)


def test_a_long_text_gives_its_embedding_with_the_last_chunk(make_rig):
    rig = make_rig(step_token_budget=16)
    rig.generate(make_request("e", range(1, 45), max_tokens=0, wants_embedding=True))
    embeddings = [event.readout.embedding for event in rig.events["e"]]
    assert embeddings == [(), (), (1.0, 0.0)]


def test_the_prefix_cache_is_neither_read_nor_written(make_rig):
    rig = make_rig()
    prompt = list(range(1, 41))
    rig.generate(make_request("scored first", prompt, num_prompt_logprobs=0, max_tokens=2))
    assert holds_nothing(rig)
    rig.generate(make_request("plain", prompt, max_tokens=2))
    rig.generate(make_request("scored", prompt, num_prompt_logprobs=0, max_tokens=2))
    assert rig.first("plain").num_cached_tokens == rig.first("scored").num_cached_tokens == 0
    assert scored(rig, "scored") == prompt[1:]


def test_a_plain_request_does_not_wait_for_a_scored_prompt(make_rig):
    rig = make_rig(step_token_budget=128)
    prompt = list(range(1, 41))
    rig.add(make_request("scored", prompt, num_prompt_logprobs=0, max_tokens=2))
    rig.add(make_request("plain", prompt, max_tokens=2))
    rig.step()
    assert len(rig.plans[0].prefill_chunks) == 2
    rig.run()


def test_a_preempted_prompt_is_not_told_twice(make_rig):
    """The younger gives way in the middle of its answer and computes its prompt again."""
    rig = make_rig(num_pages=9, max_model_len=36, step_token_budget=12)
    older = make_request("older", [1] * 6, max_tokens=26, seed=1)
    scoring = make_request(
        "scored", [5, 6, 7, 8, 9, 10] * 2, max_tokens=10, num_prompt_logprobs=1, arrival_s=1.0
    )
    rig.add(older)
    rig.add(scoring)
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    assert scored(rig, "scored") == list(scoring.prompt_token_ids[1:])
    assert rig.tokens("scored") == expected_completion(scoring, (), 10)


def test_a_readout_that_is_not_finite_ends_its_request(make_rig):
    rig = make_rig()
    rig.add(make_request("bad", range(1, 22), num_prompt_logprobs=0, max_tokens=4))
    rig.add(make_request("good", range(2, 12), max_tokens=4))
    plan = rig.launch()
    rig.launched.clear()
    result = rig.runner.launch(plan).wait()
    (readout,) = result.readouts
    broken = dataclasses.replace(readout, logprobs=(math.nan, *readout.logprobs[1:]))
    rig.record(rig.scheduler.commit(plan, dataclasses.replace(result, readouts=(broken,))))
    rig.run()
    assert rig.last("bad").error.code == "non_finite_logits"
    assert len(rig.tokens("good")) == 4
