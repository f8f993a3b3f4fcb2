"""The prefill of a DeltaNet layer against its slots, in place: convolution to gated norm."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaDecodeWeights, DeltaMemory
from kiln_nn.kernels.delta_decode.memory import check_memory
from kiln_nn.kernels.delta_prefill.chunks import (
    TILE_TOKENS,
    ChunkCapacity,
    ChunkSlots,
    DeltaChunks,
    chunk_lists,
)
from kiln_nn.kernels.delta_prefill.reference import delta_prefill_reference
from kiln_nn.kernels.dispatch import takes_triton

__all__ = [
    "NO_SLOT",
    "TILE_TOKENS",
    "ChunkCapacity",
    "ChunkSlots",
    "DeltaChunks",
    "chunk_lists",
    "delta_prefill",
]


def delta_prefill(
    memory: DeltaMemory,
    chunks: DeltaChunks,
    weights: DeltaDecodeWeights,
    mixed_TC: torch.Tensor,
    a_TH: torch.Tensor,
    b_TH: torch.Tensor,
    z_THV: torch.Tensor,
    *,
    is_batch_invariant: bool = False,
) -> torch.Tensor:
    """Run every chunk through the layer and write what it leaves behind into `memory`.

    `mixed_TC` are the rows q|k|v before the convolution, `a`, `b` and `z` the layer's other
    projections. Each chunk goes on from its slot's state and tail, through convolution, L2
    norms and the gated delta rule, and leaves states, tails and a ring as `DeltaChunks` says,
    from which `delta_decode` goes on. No host synchronisation on the Triton path. Batch-invariant
    kernels are cut alike for any number of chunks; the reference ignores that.

    Returns: `[T, H, V]` in the format of `z`, ready for the output projection; tokens of no chunk
    (they can only be the last ones) are zero.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    check_memory(memory, weights)
    chunks.check()
    num_heads, value_dim = memory.state_SHKV.shape[1], memory.state_SHKV.shape[3]
    num_tokens = mixed_TC.shape[0]
    check_shape("mixed", mixed_TC, (None, memory.conv_rows_SQC.shape[2]))
    check_shape("a", a_TH, (num_tokens, num_heads))
    check_shape("b", b_TH, (num_tokens, num_heads))
    check_shape("z", z_THV, (num_tokens, num_heads, value_dim))
    if takes_triton(memory.state_SHKV, mixed_TC, chunks.read_slots_N):
        from kiln_nn.kernels.delta_prefill import triton

        if triton.supports(memory, weights, mixed_TC, a_TH, b_TH, z_THV):
            config = triton.invariant_config(mixed_TC.dtype, mixed_TC.device) if is_batch_invariant else None
            return triton.delta_prefill(memory, chunks, weights, mixed_TC, a_TH, b_TH, z_THV, config)
    return delta_prefill_reference(memory, chunks, weights, mixed_TC, a_TH, b_TH, z_THV)
