"""What must be true of a scheduler between any two calls; used by tests and the simulator."""

from __future__ import annotations

from collections import Counter

from kiln_engine.scheduling.id_pool import IdPool
from kiln_engine.scheduling.scheduler import Scheduler
from kiln_engine.scheduling.sequence import Sequence


def check_invariants(scheduler: Scheduler) -> None:
    """Count every reference again from the sequences and the tree.

    Raises:
        AssertionError: the pools, the tree and the sequences disagree.
    """
    memory = scheduler.memory
    sequences = scheduler.running + scheduler.waiting + scheduler.ending
    page_refs: Counter[int] = Counter()
    slot_refs: Counter[int] = Counter()
    for sequence in sequences:
        page_refs.update(sequence.page_ids)
        slot_refs.update(_slots_of(sequence))
        _check_sequence(sequence, scheduler)
    nodes = list(memory.tree.nodes())
    checkpoints = [node.checkpoint_slot for node in nodes if node.checkpoint_slot is not None]
    page_refs.update(node.page_id for node in nodes)
    slot_refs.update(checkpoints)
    _check_pool(memory.pages, page_refs, {node.page_id for node in nodes})
    _check_pool(memory.states, slot_refs, set(checkpoints))
    assert len(checkpoints) == len(set(checkpoints)), "a slot is the checkpoint of two pages"
    assert len(nodes) == len({node.page_id for node in nodes}), "a page is in the tree twice"
    for node in nodes:
        assert node.parent is not None
        if node.parent.parent is not None and memory.pages.is_only_cached(node.parent.page_id):
            assert memory.pages.is_only_cached(node.page_id), "a page is held without its ancestor"


def _slots_of(sequence: Sequence) -> list[int]:
    slots = [checkpoint.slot for checkpoint in sequence.pending_checkpoints]
    slots += [slot for slot in (sequence.state_slot, sequence.read_slot) if slot is not None]
    return slots


def _check_sequence(sequence: Sequence, scheduler: Scheduler) -> None:
    page_tokens = scheduler.limits.page_tokens
    if sequence in scheduler.waiting:
        assert not sequence.page_ids, "a waiting sequence holds pages"
        assert not _slots_of(sequence), "a waiting sequence holds slots"
        assert not sequence.num_steps_under_way, "a waiting sequence is in a step"
        return
    states = scheduler.memory.states
    assert sequence.state_slot is not None, "a running sequence has no live slot"
    assert states.num_references(sequence.state_slot) == 1, "a live slot is shared"
    assert sequence.is_running or sequence.num_steps_under_way, "an ended sequence was not let go"
    assert (sequence.num_computed < sequence.num_planned) == (sequence.num_steps_under_way > 0)
    assert len(sequence.page_ids) * page_tokens >= sequence.num_planned
    assert len(set(sequence.page_ids)) == len(sequence.page_ids)
    assert sequence.num_state_tokens % page_tokens == 0
    num_in_ring = sequence.num_computed - sequence.num_state_tokens
    assert 0 <= num_in_ring <= page_tokens + scheduler.limits.max_draft_tokens, "the ring overflows"
    if sequence.is_running:
        assert sequence.num_computed < len(sequence.tokens)
        assert sequence.num_planned <= len(sequence.tokens) + 1
    if not sequence.is_prefilling and not sequence.num_steps_under_way:
        assert sequence.num_computed == len(sequence.tokens) - 1 or (
            sequence.is_redecoded and sequence.num_computed >= sequence.num_prompt_tokens
        )
        assert sequence.read_slot is None
    path = []
    node = sequence.tree_node
    while node is not None and node.parent is not None:
        assert node.is_in_tree, "a sequence stands on an evicted page"
        path.append(node)
        node = node.parent
    for index, node in enumerate(reversed(path)):
        assert node.page_id == sequence.page_ids[index], "a sequence left its path in the tree"
        start = index * page_tokens
        assert node.tokens == tuple(sequence.tokens[start : start + page_tokens])


def _check_pool(pool: IdPool, refs: Counter[int], cached: set[int]) -> None:
    assert pool.num_free + pool.num_referenced == pool.num_ids, "ids were lost or doubled"
    assert pool.num_referenced == len(refs), "an id is taken that nobody holds"
    for item, count in refs.items():
        assert pool.num_references(item) == count, f"id {item} counts wrong"
        assert pool.is_only_cached(item) == (count == 1 and item in cached)
    assert pool.num_cached == len(cached)
    assert pool.num_only_cached == sum(1 for item in cached if refs[item] == 1)
