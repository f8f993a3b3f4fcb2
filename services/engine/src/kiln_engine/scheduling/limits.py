"""The numbers a scheduler works within."""

from __future__ import annotations

from dataclasses import dataclass

from kiln_engine.domain.speculation import most_lines


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes of the pools and of a step.

    Raises:
        ValueError: a step cannot hold every running sequence and one page (or fixed chunk) of prefill,
            a fixed chunk is not made of pages, drafts are longer than a page or come with fixed chunks,
            or there are too few state slots to run one sequence from a checkpoint.
    """

    num_pages: int
    num_state_slots: int
    # Most tokens of prompt and completion together.
    max_model_len: int
    max_running: int
    # Most tokens in one forward pass.
    step_token_budget: int
    page_tokens: int = 16
    # Distance between the checkpoints made while there is room.
    checkpoint_interval_tokens: int = 1024
    # 0: chunks of prompts are as long as a step has room for. Otherwise what a sequence computes never
    # depends on others: its prompt is cut at the multiples of this, a chunk runs whole or waits, only
    # whole chunks are cached, and an answer that had to give way is decoded again, not prefilled.
    fixed_chunk_tokens: int = 0
    # The longest draft; 0: nothing is guessed.
    max_draft_tokens: int = 0

    def __post_init__(self) -> None:
        if self.num_state_slots < 2:
            raise ValueError(f"num_state_slots must be at least 2, got {self.num_state_slots}")
        if self.max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {self.max_running}")
        if self.fixed_chunk_tokens % self.page_tokens:
            raise ValueError(
                f"fixed_chunk_tokens is {self.fixed_chunk_tokens}, no multiple of {self.page_tokens}"
            )
        least = self.num_most_running + self.cache_unit_tokens
        if self.step_token_budget < least:
            unit = "fixed chunk" if self.fixed_chunk_tokens else "page"
            raise ValueError(
                f"step_token_budget is {self.step_token_budget}; {self.num_most_running} running sequences "
                f"and one {unit} of prefill need {least}"
            )
        if self.max_draft_tokens >= self.page_tokens:
            raise ValueError(
                f"max_draft_tokens is {self.max_draft_tokens}; a page of {self.page_tokens} tokens must hold"
                " the newest token and its drafts"
            )
        if self.max_draft_tokens and self.fixed_chunk_tokens:
            raise ValueError("speculation computes tokens in groups that vary, so fixed chunks forbid it")
        if self.max_num_tokens < 2:
            raise ValueError("the context must hold at least one prompt and one output token")

    @property
    def num_most_running(self) -> int:
        """Every running sequence owns a state slot."""
        return min(self.max_running, self.num_state_slots)

    @property
    def num_most_lines(self) -> int:
        """Lines of verify rows that a step holds beside a page of prefill."""
        wanted = most_lines(self.num_most_running, self.max_draft_tokens)
        return min(wanted, self.step_token_budget - self.cache_unit_tokens)

    @property
    def cache_unit_tokens(self) -> int:
        """Prompts are cached, and hit, up to multiples of this."""
        return self.fixed_chunk_tokens or self.page_tokens

    def whole_units(self, num_tokens: int) -> int:
        """The part of so many tokens that can be cached."""
        return num_tokens // self.cache_unit_tokens * self.cache_unit_tokens

    def chunk_length(self, num_done: int, num_left: int, budget: int) -> int:
        """Tokens of the next chunk of a prompt that `num_done` tokens are behind; 0: it waits."""
        if not self.fixed_chunk_tokens:
            return num_left if num_left <= budget else budget // self.page_tokens * self.page_tokens
        whole = min(num_left, self.fixed_chunk_tokens - num_done % self.fixed_chunk_tokens)
        return whole if whole <= budget else 0

    @property
    def max_num_tokens(self) -> int:
        """Most tokens of one sequence: the context, or less when the pages are fewer."""
        return min(self.max_model_len, self.num_pages * self.page_tokens)
