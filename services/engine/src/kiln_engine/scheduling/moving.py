"""What it means for a sequence to go on with other adapters than it began with."""

from __future__ import annotations

from kiln_engine.domain.adapter import AdapterChange
from kiln_engine.scheduling.prefix_tree import Namespace
from kiln_engine.scheduling.sequence import Sequence, hash_pages


def move(sequence: Sequence, change: AdapterChange, page_tokens: int) -> None:
    """Have the sequence's next tokens computed with other adapters; no step under way may have a row of it.

    What was computed stays as it is. From here on its pages and states belong to no single set of
    adapters, so none of them enters the prefix tree. One that has not begun is as if it had come with
    the new adapters.
    """
    assert sequence.num_steps_under_way == 0
    if sequence.adapter_slots == change.slots:
        return
    sequence.adapter_slots = change.slots
    sequence.moved_to = change.versions
    if not sequence.is_running and sequence.num_outputs == 0:
        sequence.namespace = Namespace(change.uses, sequence.namespace.salt)
        prompt = sequence.request.prompt_token_ids if sequence.request.uses_prefix_cache else ()
        sequence.page_hashes = hash_pages(sequence.namespace, prompt, page_tokens)
        return
    sequence.num_keepable_tokens = min(sequence.num_keepable_tokens, sequence.num_computed)
    sequence.wanted_checkpoints = []
    sequence.optional_checkpoints = []
