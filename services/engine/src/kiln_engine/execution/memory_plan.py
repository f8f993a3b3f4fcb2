"""How many pages, state slots and adapter slots the device's memory is cut into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_common.errors import KilnError
from kiln_engine.execution.adapter_store import adapter_slot_bytes
from kiln_engine.model import kv_page_bytes, state_slot_bytes
from kiln_nn.config import ModelConfig


class NotEnoughMemory(KilnError):
    """What was asked for does not fit beside the weights."""

    code = "not_enough_memory"
    hint = "Lower max_running, kv_cache_tokens, num_adapter_slots or max_adapter_rank, or free memory."


@dataclass(frozen=True)
class MemoryRequest:
    """The settings that decide. Zero for `num_state_slots` or `kv_cache_tokens` leaves it to the plan."""

    page_tokens: int
    max_model_len: int
    max_running: int
    step_token_budget: int
    num_adapter_slots: int
    max_adapter_rank: int
    num_state_slots: int = 0
    kv_cache_tokens: int = 0
    max_draft_tokens: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """What start-up allocates, in counts and bytes."""

    page_tokens: int
    num_pages: int
    num_state_slots: int
    num_adapter_slots: int
    max_adapter_rank: int
    kv_bytes: int
    state_bytes: int
    adapter_bytes: int
    # Left alone for the activations of one step.
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.state_bytes + self.adapter_bytes + self.workspace_bytes


def plan_memory(
    config: ModelConfig, request: MemoryRequest, dtype: torch.dtype, free_bytes: int
) -> MemoryPlan:
    """Cut `free_bytes` (what is free once the weights are loaded) into the pools.

    Adapters and states come first, because their counts are given; pages take the rest, but never
    more than every running sequence at full length could fill.

    Raises:
        NotEnoughMemory: less is left than the pages of one sequence of full length.
    """
    # One live slot for each running sequence, and as many again for checkpoints.
    num_slots = request.num_state_slots or 2 * request.max_running
    slot = state_slot_bytes(config, request.page_tokens, dtype, max_draft_tokens=request.max_draft_tokens)
    page = kv_page_bytes(config, request.page_tokens, dtype)
    adapters = request.num_adapter_slots * adapter_slot_bytes(config, request.max_adapter_rank, dtype)
    workspace = _workspace_bytes(config, request, dtype)
    left = free_bytes - num_slots * slot - adapters - workspace
    pages_per_sequence = -(-request.max_model_len // request.page_tokens)
    if request.kv_cache_tokens:
        num_pages = max(1, request.kv_cache_tokens // request.page_tokens)
    else:
        affordable = max(0, left) // page if page else request.max_running * pages_per_sequence
        num_pages = min(affordable, request.max_running * pages_per_sequence)
    if num_pages * page > left or (not request.kv_cache_tokens and num_pages < pages_per_sequence):
        raise NotEnoughMemory(
            f"{free_bytes / 2**20:.0f} MiB are free; {num_slots} state slots take"
            f" {num_slots * slot / 2**20:.0f} MiB, adapters {adapters / 2**20:.0f} MiB, a step"
            f" {workspace / 2**20:.0f} MiB, and {max(num_pages, pages_per_sequence)} pages"
            f" {max(num_pages, pages_per_sequence) * page / 2**20:.0f} MiB"
        )
    return MemoryPlan(
        page_tokens=request.page_tokens,
        num_pages=num_pages,
        num_state_slots=num_slots,
        num_adapter_slots=request.num_adapter_slots,
        max_adapter_rank=request.max_adapter_rank,
        kv_bytes=num_pages * page,
        state_bytes=num_slots * slot,
        adapter_bytes=adapters,
        workspace_bytes=workspace,
    )


def _workspace_bytes(config: ModelConfig, request: MemoryRequest, dtype: torch.dtype) -> int:
    """An upper estimate of one step's activations: the widest layer's, and the sampled rows' logits."""
    float32 = torch.float32.itemsize
    mixer = 4 * (config.conv_dim + config.value_dim) * float32
    # The chunked rule keeps scores and their inverse, 64 by 64 for each chunk and head.
    scores = 6 * 64 * config.linear_num_value_heads * float32
    mlp = 3 * config.intermediate_size * dtype.itemsize
    residual = 4 * config.hidden_size * dtype.itemsize
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    step = request.step_token_budget * (max(mixer + scores, mlp) + residual)
    rows = request.max_running * (4 * config.vocab_size + 3 * state) * float32
    return step + rows
