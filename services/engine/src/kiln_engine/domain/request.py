"""What a client asks for, as the engine keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from kiln_engine.domain.adapter import AdapterUse
from kiln_engine.domain.output_rules import OutputRules

_NO_BIAS: Mapping[int, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn. Field meanings and neutral values as in engine.proto."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: _NO_BIAS)
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    num_top_logprobs: int = 0

    @property
    def needs_history(self) -> bool:
        """Whether earlier tokens change the distribution."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """An accepted request. The seed is always set: the servicer draws one when the client did not."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    # Of the completion, drawn by another engine before this one took it over.
    resumed_token_ids: tuple[int, ...] = ()
    adapters: tuple[AdapterUse, ...] = ()
    rules: OutputRules | None = None
    num_stable_prefix_tokens: int = 0
    num_shared_prefix_tokens: int = 0
    cache_salt: str = ""
    priority: int = 0
    # Alternatives to report with each prompt token's log-probability; None reports neither.
    num_prompt_logprobs: int | None = None
    # The first prompt token, counted from 0, that is reported.
    first_prompt_logprob: int = 1
    # Report the alternatives as two runs of numbers, not one by one.
    packs_prompt_logprobs: bool = False
    wants_embedding: bool = False
    # Absolute times on the loop's clock, in seconds; deadline_s is None without a limit.
    arrival_s: float = 0.0
    deadline_s: float | None = None

    @property
    def known_token_ids(self) -> tuple[int, ...]:
        """What is there before the first token is drawn."""
        return self.prompt_token_ids + self.resumed_token_ids

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.resumed_token_ids)

    @property
    def uses_prefix_cache(self) -> bool:
        """Whether the prompt may start from cached pages, and leave its own: not when it is read out."""
        return self.num_prompt_logprobs is None and not self.wants_embedding
