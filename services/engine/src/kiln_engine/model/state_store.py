"""Recurrent state of the DeltaNet layers; the StatePool counts the slots.

A slot holds, for each DeltaNet layer, the state at its last page boundary, the `J` rows that
entered the convolution just before that boundary, and the ring of the tokens since: key `k`,
corrected value `u`, cumulative log-decay `G` and the row that entered the convolution.

Legend: `L` DeltaNet layers, `S` slots, `P` ring capacity, `h`/`H` key and value heads, `K`/`V` key
and value width, `C` convolution channels, `J` rows of tail, `R` rows of this step, `N` states written.
"""

from __future__ import annotations

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.kernels.delta_decode import DeltaMemory
from kiln_nn.kernels.gated_delta import DeltaRing


def state_slot_bytes(
    config: ModelConfig,
    page_tokens: int,
    dtype: torch.dtype,
    *,
    state_dtype: torch.dtype = torch.float32,
    max_draft_tokens: int = 0,
) -> int:
    """Bytes of one slot across all DeltaNet layers; `dtype` is that of the convolution's rows."""
    capacity = page_tokens + max_draft_tokens
    heads, key_heads = config.linear_num_value_heads, config.linear_num_key_heads
    key_width, value_width = config.linear_key_head_dim, config.linear_value_head_dim
    state = heads * key_width * value_width * state_dtype.itemsize
    ring = capacity * (key_heads * key_width + heads * value_width + heads) * torch.float32.itemsize
    conv_rows = (config.linear_conv_kernel_dim - 1 + capacity) * config.conv_dim * dtype.itemsize
    return config.num_linear_layers * (state + ring + conv_rows)


class LayerState:
    """One DeltaNet layer's part of the store: its slots, and its convolution rows under flat numbers."""

    def __init__(self, memory: DeltaMemory) -> None:
        self.slots = memory
        self.state_SHKV = memory.state_SHKV
        self.ring = memory.ring
        # Row `slot * (J + P) + i`: tail for i < J, then the ring.
        self.conv_rows_C = memory.conv_rows_SQC.view(-1, memory.conv_rows_SQC.shape[-1])


class StateStore:
    """All slots of all DeltaNet layers: states in `state_dtype`, rings in float32, convolution rows in `dtype`.

    bfloat16 states halve what a decode step reads; they are rounded once per page.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        state_dtype: torch.dtype = torch.float32,
        max_draft_tokens: int = 0,
    ) -> None:
        self.num_slots = num_slots
        self.page_tokens = page_tokens
        self.capacity = page_tokens + max_draft_tokens
        self.num_tail_rows = config.linear_conv_kernel_dim - 1
        self.num_key_heads, self.num_heads = config.linear_num_key_heads, config.linear_num_value_heads
        layers, key_width, value_width = (
            config.num_linear_layers,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
        )

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros((layers, num_slots, *shape), dtype=dtype, device=device)

        self._state = zeros(self.num_heads, key_width, value_width, dtype=state_dtype)
        self._ring_k = zeros(self.num_key_heads, self.capacity, key_width)
        self._ring_u = zeros(self.num_heads, self.capacity, value_width)
        self._ring_log_decay = zeros(self.num_heads, self.capacity)
        self._conv_rows = zeros(self.num_tail_rows + self.capacity, config.conv_dim, dtype=dtype)
        ring = DeltaRing(self._ring_k, self._ring_u, self._ring_log_decay)
        # Every tensor with the layers as its first dimension.
        self.all_layers = DeltaMemory(self._state, ring, self._conv_rows, page_tokens)
        self._layers = [LayerState(self.all_layers.layer(index)) for index in range(layers)]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def conv_rows_per_slot(self) -> int:
        return self.num_tail_rows + self.capacity

    @property
    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self._state, self._ring_k, self._ring_u, self._ring_log_decay, self._conv_rows

    def layer(self, index: int) -> LayerState:
        """The index-th DeltaNet layer."""
        return self._layers[index]

    def clear_rings(self, slots: torch.Tensor) -> None:
        """Forget what an earlier owner left in the rings of slots that a sequence moves to."""
        for ring in (self._ring_k, self._ring_u, self._ring_log_decay):
            ring.index_fill_(1, slots, 0)
