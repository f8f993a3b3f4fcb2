"""Gives pages and state slots to sequences, and keeps what later ones can use."""

from __future__ import annotations

from kiln_engine.domain.plan import StateCheckpoint
from kiln_engine.scheduling.page_pool import PagePool
from kiln_engine.scheduling.prefix_tree import PrefixTree
from kiln_engine.scheduling.sequence import Sequence
from kiln_engine.scheduling.state_pool import StatePool


class SequenceMemory:
    """Both pools and the prefix tree over them.

    A sequence that starts takes a reference on the pages and the checkpoint it hits, a live slot and
    its own pages. What it computes enters the tree page by page; where the tree already has a page
    with the same tokens, the sequence goes over to that one, so that whoever holds a page of the
    tree holds all its ancestors.
    """

    def __init__(self, *, num_pages: int, num_state_slots: int, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self.pages = PagePool(num_pages)
        self.states = StatePool(num_state_slots)
        self.tree = PrefixTree(self.pages, self.states, page_tokens)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    @property
    def num_available_pages(self) -> int:
        return self.pages.num_free + self.pages.num_only_cached

    def start(self, sequence: Sequence, num_spare_pages: int) -> int | None:
        """Give a waiting sequence its cached prefix, a live slot and pages for all its tokens.

        `num_spare_pages` must be left over for others. Returns how many tokens of the prompt
        matched known pages (the hit itself is `num_computed`), or None, with nothing changed for
        the sequence, when there is not enough.
        """
        most = sequence.num_prefill_tokens - 1 if sequence.request.uses_prefix_cache else 0
        match = self.tree.match(sequence.namespace, sequence.tokens, most)
        for node in match.nodes:
            self.pages.retain(node.page_id)
        read_slot = match.nodes[-1].checkpoint_slot if match.nodes else None
        if read_slot is not None:
            self.states.retain(read_slot)
        num_own_pages = self.num_pages_for(len(sequence.tokens)) - len(match.nodes)
        has_room = num_own_pages + num_spare_pages <= self.num_available_pages
        live_slot = self.take_slot(may_evict=True) if has_room else None
        sequence.page_ids = [node.page_id for node in match.nodes]
        sequence.read_slot = read_slot
        if live_slot is None:
            self._release(sequence)
            return None
        sequence.state_slot = live_slot
        sequence.tree_node = match.nodes[-1] if match.nodes else None
        sequence.num_computed = sequence.num_planned = match.num_hit_tokens
        sequence.num_state_tokens = match.num_hit_tokens
        has_pages = self.add_pages(sequence, num_own_pages)
        assert has_pages
        return match.num_matched_tokens

    def add_pages(self, sequence: Sequence, count: int) -> bool:
        """Append pages to a running sequence, evicting cached ones; all or none."""
        if count > self.num_available_pages:
            return False
        if count > self.pages.num_free:
            self.tree.evict_pages(count - self.pages.num_free)
        sequence.page_ids.extend(self.pages.take(count))
        return True

    def take_slot(self, *, may_evict: bool) -> int | None:
        """A state slot with one reference, or None."""
        if self.states.num_free == 0 and not (may_evict and self.tree.evict_checkpoint()):
            return None
        return self.states.take(1)[0]

    def take_checkpoints(self, sequence: Sequence, end: int) -> None:
        """Reserve slots for the checkpoints up to `end`, as far as there are any."""
        taken = []
        for boundaries, may_evict in (
            (sequence.wanted_checkpoints, True),
            (sequence.optional_checkpoints, False),
        ):
            while boundaries and boundaries[0] <= end:
                boundary = boundaries.pop(0)
                slot = self.take_slot(may_evict=may_evict)
                if slot is not None:
                    taken.append(StateCheckpoint(boundary, slot))
        taken.sort(key=lambda checkpoint: checkpoint.num_tokens)
        sequence.pending_checkpoints += tuple(taken)

    def keep_computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Enter the sequence's complete computed pages, up to `num_tokens`, into the tree."""
        if not sequence.request.uses_prefix_cache:
            return
        end = min(num_tokens, sequence.num_computed, sequence.num_keepable_tokens)
        for start in range(sequence.num_tree_tokens, end - self.page_tokens + 1, self.page_tokens):
            page_index = start // self.page_tokens
            own_page = sequence.page_ids[page_index]
            tokens = tuple(sequence.tokens[start : start + self.page_tokens])
            node = self.tree.insert(sequence.namespace, sequence.tree_node, tokens, own_page)
            if node.page_id != own_page:
                self.pages.retain(node.page_id)
                self.pages.release(own_page)
                sequence.page_ids[page_index] = node.page_id
            sequence.tree_node = node

    def keep_checkpoints(self, sequence: Sequence) -> None:
        """Hand the checkpoints within what is computed over to the tree."""
        pending = sequence.pending_checkpoints
        for checkpoint in pending:
            if checkpoint.num_tokens <= sequence.num_computed:
                self._give_to_tree(sequence, checkpoint)
        sequence.pending_checkpoints = tuple(c for c in pending if c.num_tokens > sequence.num_computed)

    def keep_live_state(self, sequence: Sequence) -> None:
        """Let go of the live slot: what it has committed becomes a checkpoint of the tree.

        The committed state is the one at the last page boundary computed, or at the one before if that
        page is still in the ring: no step may be under way that takes it further.
        """
        assert sequence.num_steps_under_way == 0
        self.keep_computed(sequence, sequence.num_computed // self.page_tokens * self.page_tokens)
        boundary = sequence.num_state_tokens
        is_kept = boundary > 0 and sequence.request.uses_prefix_cache
        if is_kept and sequence.read_slot is None and sequence.state_slot is not None:
            slot, sequence.state_slot = sequence.state_slot, None
            self._give_to_tree(sequence, StateCheckpoint(boundary, slot))

    def release(self, sequence: Sequence) -> None:
        """Take back everything a sequence holds; it can start again later."""
        self._release(sequence)
        if sequence.has_moved:  # then all of it is computed anew, by later adapters
            sequence.num_keepable_tokens = 0
        sequence.num_computed = sequence.num_planned = sequence.num_state_tokens = 0
        sequence.num_device_drafts = 0
        sequence.tree_node = None
        sequence.wanted_checkpoints = []
        sequence.optional_checkpoints = []

    def release_read_slot(self, sequence: Sequence) -> None:
        """Drop the reference on the checkpoint the sequence started from."""
        if sequence.read_slot is not None:
            self.states.release(sequence.read_slot)
            sequence.read_slot = None

    def _release(self, sequence: Sequence) -> None:
        for page_id in reversed(sequence.page_ids):
            self.pages.release(page_id)
        sequence.page_ids = []
        self.release_read_slot(sequence)
        for checkpoint in sequence.pending_checkpoints:
            self.states.release(checkpoint.slot)
        sequence.pending_checkpoints = ()
        if sequence.state_slot is not None:
            self.states.release(sequence.state_slot)
            sequence.state_slot = None

    def _give_to_tree(self, sequence: Sequence, checkpoint: StateCheckpoint) -> None:
        node = sequence.tree_node
        while node is not None and node.num_tokens > checkpoint.num_tokens:
            node = node.parent
        at_boundary = node is not None and node.num_tokens == checkpoint.num_tokens
        if node is None or not at_boundary or not self.tree.add_checkpoint(node, checkpoint.slot):
            self.states.release(checkpoint.slot)
