"""The recurrent states' formats and bytes."""

from __future__ import annotations

import pytest
import torch

from kiln_engine.model import StateStore, state_slot_bytes
from tests.support.tiny_models import tiny_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_draft_tokens", [0, 7])
def test_a_slot_has_the_bytes_it_is_said_to_have(state_dtype, max_draft_tokens):
    config, dtype = tiny_config(), torch.bfloat16
    options = {"state_dtype": state_dtype, "max_draft_tokens": max_draft_tokens}
    store = StateStore(config, num_slots=3, page_tokens=16, dtype=dtype, device=CPU, **options)
    assert store.num_bytes == 3 * state_slot_bytes(config, 16, dtype, **options)
    memory = store.layer(0).slots
    assert memory.state_SHKV.dtype is state_dtype
    assert memory.ring.u_RHPV.dtype is torch.float32
    assert memory.conv_rows_SQC.dtype is dtype
    assert memory.ring.u_RHPV.shape[2] == 16 + max_draft_tokens


def test_bf16_states_halve_only_the_states():
    config = tiny_config()
    wide = state_slot_bytes(config, 16, torch.bfloat16)
    narrow = state_slot_bytes(config, 16, torch.bfloat16, state_dtype=torch.bfloat16)
    num_elements = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    assert wide - narrow == 2 * config.num_linear_layers * num_elements
