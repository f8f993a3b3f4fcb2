"""The numbers a scheduler works within."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Sizes of the pools and of a step.

    Raises:
        ValueError: a step cannot hold every running sequence and one page of prefill, or there
            are too few state slots to run one sequence from a checkpoint.
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

    def __post_init__(self) -> None:
        if self.num_state_slots < 2:
            raise ValueError(f"num_state_slots must be at least 2, got {self.num_state_slots}")
        if self.max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {self.max_running}")
        least = self.num_most_running + self.page_tokens
        if self.step_token_budget < least:
            raise ValueError(
                f"step_token_budget is {self.step_token_budget}; {self.num_most_running} running sequences "
                f"and one page of prefill need {least}"
            )
        if self.max_num_tokens < 2:
            raise ValueError("the context must hold at least one prompt and one output token")

    @property
    def num_most_running(self) -> int:
        """Every running sequence owns a state slot."""
        return min(self.max_running, self.num_state_slots)

    @property
    def max_num_tokens(self) -> int:
        """Most tokens of one sequence: the context, or less when the pages are fewer."""
        return min(self.max_model_len, self.num_pages * self.page_tokens)
