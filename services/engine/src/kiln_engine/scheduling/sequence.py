"""One request while the engine works on it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from kiln_engine.domain.adapter import AdapterVersion
from kiln_engine.domain.plan import StateCheckpoint
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.scheduling.output_constraint import OutputConstraint
from kiln_engine.scheduling.prefix_tree import Namespace, PrefixNode


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and everything it holds. Only the loop thread changes it.

    `tokens` are the prompt and what was drawn so far; the first `num_computed` of them have their K
    and V in `page_ids` and are part of the state. `num_planned` counts those of the steps under way
    too: it passes the last known token when a step is planned before the one that draws its input has
    been committed. While waiting (new, or preempted) a sequence holds nothing. While running it owns
    `state_slot`, and until its first chunk is committed it may read its starting state from
    `read_slot`, a checkpoint it has a reference on. A sequence that ends while steps under way have
    rows for it keeps what it holds until the last of them is committed.
    """

    sequence_id: int
    request: GenerationRequest
    # (adapter slot, scale) pairs, as rows carry them. These, and the two after, change with `move`.
    adapter_slots: tuple[tuple[int, float], ...]
    namespace: Namespace
    # Entry i identifies the namespace and the first i + 1 pages of the prompt (a chained hash).
    page_hashes: tuple[int, ...]
    tokens: list[int]
    # After it gave way, what it had answered is decoded again, token by token, as the first time.
    is_redecoded: bool = False
    # Follows the outputs in `tokens`; None without rules.
    constraint: OutputConstraint | None = None

    num_computed: int = 0
    num_planned: int = 0
    # Tokens in the committed state that the sequence goes on from; the ring holds the computed ones since.
    num_state_tokens: int = 0
    # Drafts that the device has made for the next step.
    num_device_drafts: int = 0
    # Steps under way that have a row or a chunk for this sequence.
    num_steps_under_way: int = 0
    is_running: bool = False
    # Until its last chunk is planned.
    is_prefilling: bool = False
    # Ended, and later requests can start from its answer.
    is_answer_useful: bool = False
    page_ids: list[int] = field(default_factory=list)
    state_slot: int | None = None
    read_slot: int | None = None
    # The deepest node of the prefix tree whose pages are this sequence's; None at the root.
    tree_node: PrefixNode | None = None
    # Boundaries (in tokens) still to be checkpointed, ascending: those worth evicting for, and
    # those made only while a slot is free.
    wanted_checkpoints: list[int] = field(default_factory=list)
    optional_checkpoints: list[int] = field(default_factory=list)
    # Slots taken for the steps under way, ascending.
    pending_checkpoints: tuple[StateCheckpoint, ...] = ()
    # Tokens from the start whose pages and states are of its namespace: later ones were computed with
    # other adapters.
    num_keepable_tokens: int = sys.maxsize
    # Adapters it goes on with, until the next token tells the client.
    moved_to: tuple[AdapterVersion, ...] = ()

    # Prompt tokens whose successors have been looked up (see Readout).
    num_read_out: int = 0
    first_scheduled_s: float | None = None
    # Prompt tokens that came from the prefix cache when the sequence first ran.
    num_cached_tokens: int | None = None

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts by priority, then arrival."""
        return (self.request.priority, self.request.arrival_s, self.sequence_id)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens that are computed in chunks; those after them are decoded."""
        return self.num_prompt_tokens if self.is_redecoded else len(self.tokens)

    @property
    def has_moved(self) -> bool:
        """Whether other adapters than its namespace's took part."""
        return self.num_keepable_tokens < sys.maxsize

    @property
    def is_next_token_known(self) -> bool:
        """Whether the token to compute next has been read from the device."""
        return self.num_planned < len(self.tokens)

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_tree_tokens(self) -> int:
        return self.tree_node.num_tokens if self.tree_node else 0


def hash_pages(namespace: Namespace, tokens: tuple[int, ...], page_tokens: int) -> tuple[int, ...]:
    """Chained hashes of the complete pages of a prompt, to compare prompts page by page."""
    chained = hash(namespace)
    hashes = []
    for end in range(page_tokens, len(tokens) + 1, page_tokens):
        chained = hash((chained, tokens[end - page_tokens : end]))
        hashes.append(chained)
    return tuple(hashes)


def num_common_pages(left: Sequence, right: Sequence) -> int:
    """Leading pages that two prompts share (0 across namespaces)."""
    low, high = 0, min(len(left.page_hashes), len(right.page_hashes))
    while low < high:
        middle = (low + high + 1) // 2
        if left.page_hashes[middle - 1] == right.page_hashes[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
