"""What routing looks at in a request: the names of its prompt's beginnings."""

from __future__ import annotations

from dataclasses import dataclass

from kiln_common.pb import engine_pb2
from kiln_common.prefix_path import page_name, path_names, root_name

# Tokens beyond the shared beginning that tell conversations apart.
_TELLING_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PromptPath:
    """`names`: of the beginnings, shortest first. `kept`: of those that an engine will keep a state for.

    `key` stands for the conversation before anybody has seen it.
    """

    names: list[bytes]
    kept: list[bytes]
    key: bytes


def prompt_path(request: engine_pb2.GenerateRequest, page_tokens: int) -> PromptPath:
    tokens = list(request.prompt_token_ids)
    uses = ((use.sha256, use.scale or 1.0) for use in request.adapters)
    root = root_name(uses, request.cache_salt)
    key = page_name(root, tokens[: request.num_shared_prefix_tokens + _TELLING_TOKENS])
    if request.wants_embedding or request.HasField("num_prompt_logprobs"):
        return PromptPath([], [], key)  # computed whole, and nothing is kept
    names = path_names(root, tokens, page_tokens)
    # Where the engine's scheduler makes checkpoints that later requests are expected to start from.
    boundaries = (request.num_stable_prefix_tokens, request.num_shared_prefix_tokens, len(tokens) - 1)
    kept_pages = {end // page_tokens for end in boundaries}
    return PromptPath(names, [names[pages - 1] for pages in kept_pages if 0 < pages <= len(names)], key)
