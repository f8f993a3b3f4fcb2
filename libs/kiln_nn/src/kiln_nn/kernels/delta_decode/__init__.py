"""One decode step of a DeltaNet layer against its slots, in place: convolution to gated norm."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.delta_decode.memory import (
    NO_SLOT,
    DeltaDecodeWeights,
    DeltaMemory,
    DeltaRows,
    check_memory,
)
from kiln_nn.kernels.delta_decode.reference import delta_decode_reference
from kiln_nn.kernels.dispatch import takes_triton

__all__ = ["NO_SLOT", "DeltaDecodeWeights", "DeltaMemory", "DeltaRows", "delta_decode"]


def delta_decode(
    memory: DeltaMemory,
    rows: DeltaRows,
    weights: DeltaDecodeWeights,
    mixed_RC: torch.Tensor,
    a_RH: torch.Tensor,
    b_RH: torch.Tensor,
    z_RHV: torch.Tensor,
) -> torch.Tensor:
    """Advance every row by one token and write what it leaves behind into `memory`.

    `mixed_RC` are the rows q|k|v before the convolution, `a`, `b` and `z` the layer's other
    projections. Each row convolves its token with the J rows before it, normalises q and k,
    reads its committed state and its ring, appends the token to the ring, commits where asked
    to, and leaves through the gated norm. No host synchronisation on the Triton path.

    Returns: `[R, H, V]` in the format of `z`, ready for the output projection.

    Raises:
        ShapeMismatch: a tensor does not fit the others.
    """
    check_memory(memory, weights)
    num_heads, value_dim = memory.state_SHKV.shape[1], memory.state_SHKV.shape[3]
    check_shape("mixed", mixed_RC, (rows.num_rows, memory.conv_rows_SQC.shape[2]))
    check_shape("a", a_RH, (rows.num_rows, num_heads))
    check_shape("b", b_RH, (rows.num_rows, num_heads))
    check_shape("z", z_RHV, (rows.num_rows, num_heads, value_dim))
    if takes_triton(memory.state_SHKV, mixed_RC, rows.ring_slots_R):
        from kiln_nn.kernels.delta_decode import triton

        if triton.supports(memory, weights, mixed_RC, a_RH, b_RH, z_RHV):
            return triton.delta_decode(memory, rows, weights, mixed_RC, a_RH, b_RH, z_RHV)
    return delta_decode_reference(memory, rows, weights, mixed_RC, a_RH, b_RH, z_RHV)
