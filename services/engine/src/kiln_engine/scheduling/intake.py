"""From an accepted request to a sequence that can be scheduled."""

from __future__ import annotations

from kiln_common.errors import PromptTooLong
from kiln_engine.domain.errors import EmptyPrompt
from kiln_engine.domain.request import GenerationRequest
from kiln_engine.scheduling.limits import SchedulerLimits
from kiln_engine.scheduling.output_constraint import start_constraint
from kiln_engine.scheduling.prefix_tree import Namespace
from kiln_engine.scheduling.sequence import Sequence, hash_pages
from kiln_engine.scheduling.stopping import stop_ids


def new_sequence(
    sequence_id: int,
    request: GenerationRequest,
    adapter_slots: tuple[tuple[int, float], ...],
    limits: SchedulerLimits,
    eos_token_ids: frozenset[int],
) -> Sequence:
    """A sequence that waits to begin.

    Raises:
        EmptyPrompt, PromptTooLong: it could never produce a token.
        GrammarFailed: what it resumes does not follow its grammar.
    """
    if not request.prompt_token_ids:
        raise EmptyPrompt("the prompt has no tokens")
    if request.num_known_tokens >= limits.max_num_tokens:
        raise PromptTooLong(request.num_known_tokens, limits.max_num_tokens - 1)
    namespace = Namespace(request.adapters, request.cache_salt)
    cacheable = request.prompt_token_ids if request.uses_prefix_cache else ()
    return Sequence(
        sequence_id=sequence_id,
        request=request,
        adapter_slots=adapter_slots,
        namespace=namespace,
        page_hashes=hash_pages(namespace, cacheable, limits.page_tokens),
        tokens=list(request.known_token_ids),
        is_redecoded=limits.fixed_chunk_tokens > 0,
        constraint=start_constraint(request, stop_ids(request.sampling, eos_token_ids)),
    )
