"""The memory plan against what the stores really allocate."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kiln_engine.execution.adapter_store import AdapterStore
from kiln_engine.execution.adapter_tables import largest_matrix_bytes
from kiln_engine.execution.adapter_upload import upload_block_bytes
from kiln_engine.execution.memory_plan import MemoryRequest, NotEnoughMemory, plan_memory
from kiln_engine.model import KvStore, StateStore
from kiln_engine.model.carried_hidden import carried_slot_bytes
from kiln_engine.model.page_table import PageTable
from kiln_engine.model.store_shape import StoreShape
from tests.support.tiny_models import SHAPES, tiny_config

REQUEST = MemoryRequest(
    page_tokens=16,
    max_model_len=512,
    max_running=4,
    step_token_budget=128,
    num_adapter_slots=3,
    max_adapter_rank=8,
)
CPU = torch.device("cpu")
_DELTANET = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16}
_PUBLISHED = {"vocab_size": 248_320, "head_dim": 256, "max_position_embeddings": 262_144, **_DELTANET}
# Shape, and GiB of its weights in bfloat16.
PUBLISHED = {
    "4b": (
        tiny_config(
            **_PUBLISHED,
            hidden_size=2560,
            intermediate_size=9216,
            num_attention_heads=16,
            num_kv_heads=4,
            linear_num_value_heads=32,
            layer_types=(("linear_attention",) * 3 + ("full_attention",)) * 8,
        ),
        8.4,
    ),
    "27b": (
        tiny_config(
            **_PUBLISHED,
            hidden_size=5120,
            intermediate_size=17_408,
            num_attention_heads=24,
            num_kv_heads=4,
            linear_num_value_heads=48,
            layer_types=(("linear_attention",) * 3 + ("full_attention",)) * 16,
        ),
        54,
    ),
}


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plan_counts_the_bytes_that_are_allocated(shape: str, dtype: torch.dtype, drafts: bool):
    config = tiny_config(**SHAPES[shape])
    request = dataclasses.replace(REQUEST, drafts_by_mtp=drafts, max_draft_tokens=3 if drafts else 0)
    plan = plan_memory(config, request, dtype, free_bytes=2**30)
    common = {"dtype": dtype, "device": CPU}
    pages = KvStore(config, num_pages=plan.num_pages, page_tokens=16, num_mtp_layers=int(drafts), **common)
    drafted = {"max_draft_tokens": plan.max_draft_tokens}
    states = StateStore(config, num_slots=plan.num_state_slots, page_tokens=16, **drafted, **common)
    adapters = AdapterStore(config, num_slots=3, max_rank=8, with_mtp=drafts, **common)
    assert plan.kv_bytes == pages.num_bytes
    carried = plan.num_state_slots * carried_slot_bytes(config, 3, dtype) if drafts else 0
    assert plan.state_bytes == states.num_bytes + carried
    assert plan.adapter_bytes == adapters.num_bytes
    shape = StoreShape.of(page_tokens=16, max_model_len=512, num_state_slots=plan.num_state_slots)
    assert plan.page_table_bytes == PageTable(shape, CPU).num_bytes


def test_kernels_need_room_to_upload_adapters_through():
    config = tiny_config()
    with_kernels = dataclasses.replace(REQUEST, has_kernels=True)
    plans = [plan_memory(config, each, torch.float32, free_bytes=2**34) for each in (REQUEST, with_kernels)]
    block = upload_block_bytes(largest_matrix_bytes(config, REQUEST.max_adapter_rank))
    assert plans[1].adapter_bytes - plans[0].adapter_bytes == block


def test_quantised_weights_need_room_to_be_made_whole_again():
    config, _ = PUBLISHED["4b"]
    request = dataclasses.replace(REQUEST, has_kernels=True)
    quantised = dataclasses.replace(request, has_quantised_weights=True)
    plans = [plan_memory(config, each, torch.bfloat16, free_bytes=2**36) for each in (request, quantised)]
    # gate_proj and up_proj together are the largest.
    assert plans[1].workspace_bytes - plans[0].workspace_bytes == 2 * 9216 * 2560 * 2


def test_a_quantised_head_needs_room_where_no_kernel_reads_it():
    config, _ = PUBLISHED["4b"]
    plain = dataclasses.replace(REQUEST, has_quantised_weights=True)
    with_head = dataclasses.replace(plain, has_quantised_head=True)
    plans = [plan_memory(config, each, torch.float32, free_bytes=2**36) for each in (plain, with_head)]
    more_rows = config.vocab_size - 2 * config.intermediate_size
    assert plans[1].workspace_bytes - plans[0].workspace_bytes == more_rows * config.hidden_size * 16


def test_four_bit_weights_leave_room_for_a_long_context_on_twelve_gib():
    config, weights_gib = PUBLISHED["4b"]
    # The decoder's matrices shrink from 16 bits to 4.125, and a little more than one GiB stays as it is.
    matrices_gib = 7.13e9 / 2**30
    int4_gib = weights_gib - matrices_gib * (1 - 4.125 / 16)
    request = MemoryRequest(
        page_tokens=16,
        max_model_len=32_768,
        least_model_len=32_768,
        max_running=256,
        step_token_budget=8192,
        num_adapter_slots=8,
        max_adapter_rank=64,
        has_kernels=True,
        has_quantised_weights=True,
    )
    free_bytes = int((12 - int4_gib) * 2**30)
    plan = plan_memory(config, request, torch.bfloat16, free_bytes)
    assert plan.total_bytes <= free_bytes
    assert plan.num_pages * 16 >= 32_768


def test_pages_take_what_is_left_but_not_more_than_can_be_filled():
    config = tiny_config()
    plenty = plan_memory(config, REQUEST, torch.float32, free_bytes=2**34)
    assert plenty.num_pages == 4 * 512 // 16
    assert plenty.num_state_slots == 8
    page_bytes = plenty.kv_bytes // plenty.num_pages
    tight = plan_memory(config, REQUEST, torch.float32, plenty.total_bytes - 50 * page_bytes)
    assert tight.num_pages == plenty.num_pages - 50
    assert tight.total_bytes <= plenty.total_bytes - 50 * page_bytes


@pytest.mark.parametrize(
    ("size", "device_gib", "least_running"), [("4b", 48, 16), ("4b", 141, 128), ("27b", 141, 16)]
)
def test_published_sizes_start_with_the_default_settings(size: str, device_gib: int, least_running: int):
    """On a GPU of so many GiB, of which six tenths are the engine's."""
    config, weights_gib = PUBLISHED[size]
    request = MemoryRequest(
        page_tokens=16,
        max_model_len=262_144,
        least_model_len=4096,
        max_running=128,
        step_token_budget=8192,
        num_adapter_slots=8,
        max_adapter_rank=64,
    )
    free_bytes = int((0.6 * device_gib - weights_gib) * 2**30)
    plan = plan_memory(config, request, torch.bfloat16, free_bytes)
    assert plan.total_bytes <= free_bytes
    assert plan.num_state_slots >= least_running
    assert plan.num_pages * 16 >= 50_000


def test_a_context_is_cut_to_what_fits_but_not_below_what_is_asked_for():
    config = tiny_config()
    full = plan_memory(config, REQUEST, torch.float32, free_bytes=2**30)
    page_bytes = full.kv_bytes // full.num_pages
    request = dataclasses.replace(REQUEST, num_state_slots=2, max_model_len=4096, least_model_len=512)
    plenty = plan_memory(config, request, torch.float32, free_bytes=2**30)
    for num_pages in (300, 100, 32):
        free_bytes = plenty.total_bytes - plenty.kv_bytes + num_pages * page_bytes
        assert plan_memory(config, request, torch.float32, free_bytes).num_pages == num_pages
    with pytest.raises(NotEnoughMemory, match="32 pages"):
        plan_memory(config, request, torch.float32, free_bytes - 1)


def test_given_numbers_are_kept():
    request = dataclasses.replace(REQUEST, num_state_slots=5, kv_cache_tokens=1000)
    plan = plan_memory(tiny_config(), request, torch.float32, free_bytes=2**30)
    assert (plan.num_state_slots, plan.num_pages) == (5, 62)


def test_too_little_memory_is_an_error_with_numbers():
    with pytest.raises(NotEnoughMemory, match=r"1 MiB are free; 2 state slots"):
        plan_memory(tiny_config(), REQUEST, torch.float32, free_bytes=2**20)
    wants_too_much = dataclasses.replace(REQUEST, kv_cache_tokens=10**9)
    with pytest.raises(NotEnoughMemory):
        plan_memory(tiny_config(), wants_too_much, torch.float32, free_bytes=2**30)
