"""How many pages, state slots and adapter slots the device's memory is cut into."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kiln_common.errors import KilnError
from kiln_engine.domain.speculation import most_lines
from kiln_engine.execution.adapter_tables import adapter_slot_bytes, largest_matrix_bytes
from kiln_engine.execution.adapter_upload import upload_block_bytes
from kiln_engine.model import kv_page_bytes, page_table_bytes, state_slot_bytes
from kiln_engine.model.carried_hidden import carried_slot_bytes
from kiln_nn.config import ModelConfig
from kiln_nn.kernels.paged_attention.reference import MOST_GATHERED_TOKENS, MOST_SCORES


class NotEnoughMemory(KilnError):
    """What was asked for does not fit beside the weights."""

    code = "not_enough_memory"
    hint = (
        "Lower step_token_budget, max_running, num_adapter_slots, max_adapter_rank, kv_cache_tokens or"
        " max_model_len, raise gpu_memory_fraction, or free memory."
    )


@dataclass(frozen=True)
class MemoryRequest:
    """The settings that decide. Zero for `num_state_slots` or `kv_cache_tokens` leaves it to the plan.

    `least_model_len`: the shortest context worth starting with, where `max_model_len` does not fit.
    """

    page_tokens: int
    max_model_len: int
    max_running: int
    step_token_budget: int
    num_adapter_slots: int
    max_adapter_rank: int
    num_state_slots: int = 0
    kv_cache_tokens: int = 0
    least_model_len: int = 1
    max_draft_tokens: int = 0
    # Whether the model's multi-token-prediction layer makes the drafts.
    drafts_by_mtp: bool = False
    state_dtype: torch.dtype = torch.float32
    # None is the model's own format.
    kv_dtype: torch.dtype | None = None
    # Whether the step runs on kernels, which keep less aside than the references do.
    has_kernels: bool = False
    # Whether steps of many tokens make a quantised matrix whole again while they use it.
    has_quantised_weights: bool = False
    # Whether there is a quantised copy of the head, which the references make whole again.
    has_quantised_head: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """What start-up allocates, in counts, formats and bytes."""

    page_tokens: int
    max_model_len: int
    max_running: int
    step_token_budget: int
    max_draft_tokens: int
    drafts_by_mtp: bool
    state_dtype: torch.dtype
    kv_dtype: torch.dtype
    num_pages: int
    num_state_slots: int
    num_adapter_slots: int
    max_adapter_rank: int
    kv_bytes: int
    state_bytes: int
    adapter_bytes: int
    page_table_bytes: int
    # Left alone for the activations of one step.
    workspace_bytes: int

    @property
    def total_bytes(self) -> int:
        stores = self.kv_bytes + self.state_bytes + self.adapter_bytes + self.page_table_bytes
        return stores + self.workspace_bytes


def plan_memory(
    config: ModelConfig, request: MemoryRequest, dtype: torch.dtype, free_bytes: int
) -> MemoryPlan:
    """Cut `free_bytes` (what is free once the weights are loaded) into the pools.

    Adapters come first, because their count is given. Of the rest, states that nobody counted take
    half at the most, and pages what is left then, but never more than every running sequence at
    full length could fill. Fewer slots mean fewer running sequences, fewer pages a shorter context.

    Raises:
        NotEnoughMemory: less is left than two state slots and the pages of `least_model_len` tokens.
    """
    kv_dtype = request.kv_dtype or dtype
    slot = state_slot_bytes(
        config,
        request.page_tokens,
        dtype,
        state_dtype=request.state_dtype,
        max_draft_tokens=request.max_draft_tokens,
    )
    if request.drafts_by_mtp:
        slot += carried_slot_bytes(config, request.max_draft_tokens, dtype)
    page = kv_page_bytes(config, request.page_tokens, kv_dtype, num_mtp_layers=int(request.drafts_by_mtp))
    adapters = _adapter_bytes(config, request, dtype)
    workspace = _workspace_bytes(config, request, dtype)
    workspace += _whole_matrix_bytes(config, request, dtype)
    left = free_bytes - adapters - workspace
    num_slots = request.num_state_slots or _affordable_slots(request, slot, left)
    table = page_table_bytes(num_slots, request.max_model_len, request.page_tokens)
    left -= num_slots * slot + table
    num_fillable = request.max_running * _num_pages(request, request.max_model_len)
    if request.kv_cache_tokens:
        num_pages = num_least = max(1, request.kv_cache_tokens // request.page_tokens)
    else:
        num_pages = min(max(0, left) // page, num_fillable) if page else num_fillable
        num_least = _num_pages(request, request.least_model_len)
    if num_pages * page > left or num_pages < num_least:
        raise NotEnoughMemory(
            f"{free_bytes / 2**20:.0f} MiB are free; {num_slots} state slots take"
            f" {num_slots * slot / 2**20:.0f} MiB, adapters {adapters / 2**20:.0f} MiB, a step"
            f" {workspace / 2**20:.0f} MiB, and {num_least} pages {num_least * page / 2**20:.0f} MiB"
        )
    return MemoryPlan(
        page_tokens=request.page_tokens,
        max_model_len=request.max_model_len,
        max_running=min(request.max_running, num_slots),
        step_token_budget=request.step_token_budget,
        max_draft_tokens=request.max_draft_tokens,
        drafts_by_mtp=request.drafts_by_mtp,
        state_dtype=request.state_dtype,
        kv_dtype=kv_dtype,
        num_pages=num_pages,
        num_state_slots=num_slots,
        num_adapter_slots=request.num_adapter_slots,
        max_adapter_rank=request.max_adapter_rank,
        kv_bytes=num_pages * page,
        page_table_bytes=table,
        state_bytes=num_slots * slot,
        adapter_bytes=adapters,
        workspace_bytes=workspace,
    )


def _adapter_bytes(config: ModelConfig, request: MemoryRequest, dtype: torch.dtype) -> int:
    """The slots, and what uploads go through."""
    rank, with_mtp = request.max_adapter_rank, request.drafts_by_mtp
    num_bytes = request.num_adapter_slots * adapter_slot_bytes(config, rank, dtype, with_mtp=with_mtp)
    if request.has_kernels:
        num_bytes += upload_block_bytes(largest_matrix_bytes(config, rank, with_mtp=with_mtp))
    return num_bytes


def _num_pages(request: MemoryRequest, num_tokens: int) -> int:
    return -(-num_tokens // request.page_tokens)


def _affordable_slots(request: MemoryRequest, slot_bytes: int, left_bytes: int) -> int:
    """A live slot for each running sequence and as many for checkpoints, or what fits in half of the rest."""
    wanted = 2 * request.max_running
    affordable = left_bytes // 2 // slot_bytes if slot_bytes else wanted
    return max(2, min(wanted, affordable))


def _workspace_bytes(config: ModelConfig, request: MemoryRequest, dtype: torch.dtype) -> int:
    """An upper estimate of one step's activations: the widest layer's, and the sampled rows' logits."""
    float32 = torch.float32.itemsize
    mixer = 4 * (config.conv_dim + config.value_dim) * float32
    # The chunked rule keeps scores and their inverse, 64 by 64 for each chunk and head.
    scores = 6 * 64 * config.linear_num_value_heads * float32
    mlp = 3 * config.intermediate_size * dtype.itemsize
    residual = 4 * config.hidden_size * dtype.itemsize
    state = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    num_lines = most_lines(request.max_running, request.max_draft_tokens)
    step = request.step_token_budget * (max(mixer + scores, mlp) + residual)
    if request.has_kernels:
        # Logits and one copy to edit; graphs keep what a decode step makes on the way.
        rows = num_lines * (2 * config.vocab_size * float32 + 4 * (mixer + mlp + residual))
        return step + rows
    # Logits, their copies, and in float64 those that top-k and top-p sort.
    rows = num_lines * (10 * config.vocab_size + 3 * state) * float32
    return step + rows + _attention_bytes(config, request, dtype)


def _whole_matrix_bytes(config: ModelConfig, request: MemoryRequest, dtype: torch.dtype) -> int:
    """The largest quantised matrix in the model's format; references unpack it in float32 first."""
    widest = 0
    if request.has_quantised_weights:
        attention = 2 * (config.num_attention_heads + config.num_kv_heads) * config.head_dim
        widest = max(2 * config.intermediate_size, config.conv_dim + config.value_dim, attention)
    if request.has_quantised_head and not request.has_kernels:
        widest = max(widest, config.vocab_size)
    item_bytes = dtype.itemsize + (0 if request.has_kernels else 3 * torch.float32.itemsize)
    return widest * config.hidden_size * item_bytes


def _attention_bytes(config: ModelConfig, request: MemoryRequest, dtype: torch.dtype) -> int:
    """Keys and values copied out of their pages, and a block of scores with its mask and softmax."""
    if not config.num_full_layers:
        return 0
    gathered = max(MOST_GATHERED_TOKENS, request.max_model_len)
    keys_and_values = 2 * gathered * config.num_kv_heads * config.head_dim * dtype.itemsize
    num_scores = request.step_token_budget * request.max_model_len * config.num_attention_heads
    return keys_and_values + 3 * min(MOST_SCORES, num_scores) * torch.float32.itemsize
