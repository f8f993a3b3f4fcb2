"""Requests that go on with other adapters between two tokens: who drew what, and what is kept of it."""

from __future__ import annotations

from kiln_engine.domain import AdapterUse
from kiln_engine.domain.adapter import AdapterChange, AdapterVersion
from kiln_engine.domain.plan import RowSampling
from kiln_engine.simulation.runner import _digest_all, _draw_token, _trace
from tests.support.engine_scheduling import VOCAB_SIZE, SchedulerRig, expected_completion, make_request

OLD = AdapterChange((AdapterVersion("a", 1, "x"),), (AdapterUse("x"),), ((1, 1.0),))
NEW = AdapterChange((AdapterVersion("a", 2, "y"),), (AdapterUse("y"),), ((2, 1.0),))
PROMPT = range(10, 32)


def started(rig: SchedulerRig, request_id: str = "r", *, num_outputs: int, max_tokens: int = 12, **fields):
    """A request with the old version, that many tokens into its answer."""
    request = make_request(request_id, PROMPT, max_tokens=max_tokens, adapters=OLD.uses, **fields)
    rig.add(request, OLD.slots)
    while len(rig.tokens(request_id)) < num_outputs:
        rig.step()
    rig.settle()
    return request


def expected_after_move(request, num_outputs: int) -> list[int]:
    """Tokens of a request that moved after `num_outputs` of them, the last of which was still to be computed."""
    digest = _digest_all(0, [_trace(token, OLD.slots) for token in request.prompt_token_ids])
    tokens: list[int] = []
    for index in range(request.sampling.max_tokens):
        tokens.append(_draw_token(digest, RowSampling(request.sampling, index), VOCAB_SIZE))
        slots = OLD.slots if index < num_outputs - 1 else NEW.slots
        digest = _digest_all(digest, [_trace(tokens[-1], slots)])
    return tokens


def test_later_tokens_are_the_new_versions_and_the_first_of_them_says_so(make_rig):
    rig = make_rig()
    request = started(rig, num_outputs=5)
    num_outputs = len(rig.tokens("r"))
    assert rig.scheduler.move("r", NEW)
    rig.run()
    assert rig.tokens("r") == expected_after_move(request, num_outputs)
    told = [index for index, event in enumerate(rig.events["r"]) if event.moved_to]
    assert told == [num_outputs]
    assert rig.events["r"][num_outputs].moved_to == NEW.versions


def test_what_is_computed_after_the_move_enters_no_prefix(make_rig):
    rig = make_rig()
    request = started(rig, num_outputs=4, max_tokens=20)
    num_computed = next(iter(rig.scheduler.running)).num_computed
    rig.scheduler.move("r", NEW)
    rig.run()
    deepest = max(node.num_tokens for node in rig.scheduler.memory.tree.nodes())
    assert deepest <= num_computed
    # The conversation goes on, with either version: nobody gets what two versions made.
    text = [*request.prompt_token_ids, *rig.tokens("r")]
    for change in (OLD, NEW):
        again = make_request(f"again {change.slots}", text, adapters=change.uses)
        rig.generate(again, change.slots)
        assert rig.first(again.request_id).num_cached_tokens <= num_computed
        assert rig.tokens(again.request_id) == expected_completion(again, change.slots, 4)


def test_one_that_has_not_begun_is_as_if_it_had_come_with_the_new_version(make_rig):
    rig = make_rig()
    request = make_request("r", PROMPT, adapters=OLD.uses)
    rig.add(request, OLD.slots)
    rig.scheduler.move("r", NEW)
    rig.run()
    assert rig.tokens("r") == expected_completion(request, NEW.slots, 4)
    assert rig.first("r").moved_to == NEW.versions
    again = make_request("again", PROMPT, adapters=NEW.uses)
    rig.generate(again, NEW.slots)
    assert rig.first("again").num_cached_tokens == 20


def test_a_move_in_the_middle_of_a_prompt_leaves_no_checkpoint_behind(make_rig):
    rig = make_rig(step_token_budget=8, max_running=2)
    request = make_request("r", PROMPT, adapters=OLD.uses)
    rig.add(request, OLD.slots)
    rig.step()
    rig.settle()
    rig.scheduler.move("r", NEW)
    rig.run()
    assert rig.first("r").moved_to == NEW.versions
    nodes = list(rig.scheduler.memory.tree.nodes())
    assert all(node.num_tokens <= 8 and node.checkpoint_slot is None for node in nodes)


def test_one_that_gives_way_after_its_move_keeps_nothing_that_was_computed_again(make_rig):
    """Its early tokens are computed anew by the new version, under the prefix of the old one."""
    rig = make_rig(num_pages=16, max_model_len=64)
    request = started(rig, num_outputs=3, max_tokens=20, priority=1)
    rig.scheduler.move("r", NEW)
    # Another one grows until it has to give way, and its pages with it.
    rig.add(make_request("other", range(100, 116), max_tokens=40))
    rig.run()
    assert rig.scheduler.counters.num_preemptions > 0
    again = make_request("again", request.prompt_token_ids, adapters=OLD.uses)
    rig.generate(again, OLD.slots)
    assert rig.tokens("again") == expected_completion(again, OLD.slots, 4)


def test_a_move_to_where_it_is_already_says_nothing(make_rig):
    rig = make_rig()
    request = started(rig, num_outputs=2)
    assert rig.scheduler.move("r", OLD)
    rig.run()
    assert not any(event.moved_to for event in rig.events["r"])
    assert rig.tokens("r") == expected_completion(request, OLD.slots, 12)


def test_one_that_has_ended_does_not_move(make_rig):
    rig = make_rig()
    rig.generate(make_request("r", PROMPT))
    assert not rig.scheduler.move("r", NEW)
