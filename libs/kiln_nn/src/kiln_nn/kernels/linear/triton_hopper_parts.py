"""What Hopper's linear kernels share: requests to the memory accelerator, and storing results.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, 3.7
X_COLUMNS = gl.constexpr(64)  # inputs of a box of bf16 x: one line of 128 bytes, the widest that is swizzled


@gluon.jit
def ask_for_tile(
    box_desc,
    rest_desc,
    tile,
    bar,
    row,
    col,
    num_outputs,
    wanted,
    REST: gl.constexpr,
    HALVES: gl.constexpr,
):
    """Weights of one tile, `[HALVES * BOX + HALVES * REST, columns]`."""
    BOX: gl.constexpr = box_desc.block_type.shape[0]
    for half in gl.static_range(HALVES):
        first = row + half * num_outputs
        tma.async_copy_global_to_shared(
            box_desc, [first, col], bar, tile.slice(half * BOX, BOX, dim=0), wanted
        )
        if REST > 0:
            rest = tile.slice(HALVES * BOX + half * REST, REST, dim=0)
            tma.async_copy_global_to_shared(rest_desc, [first + BOX, col], bar, rest, wanted)


@gluon.jit
def ask_for_weights(
    box_desc,
    rest_desc,
    ring,
    bar,
    slot,
    row,
    num_outputs,
    block,
    wanted,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    HALVES: gl.constexpr,
    SUBS: gl.constexpr,
):
    """One slot's weights, `[SUBS, HALVES * BOX + HALVES * REST, columns]`, and the bytes to wait for."""
    COLUMNS: gl.constexpr = box_desc.block_type.shape[1]
    mbarrier.expect(bar, SLOT_BYTES, pred=wanted)
    for sub in gl.static_range(SUBS):
        col = (block * SUBS + sub) * COLUMNS
        tile = ring.index(slot * SUBS + sub)
        ask_for_tile(box_desc, rest_desc, tile, bar, row, col, num_outputs, wanted, REST, HALVES)


@gluon.jit
def ask_for_x(
    x_desc, x_rest_desc, ring, bar, slot, token, block, wanted, X_REST: gl.constexpr, SUBS: gl.constexpr
):
    """One slot's lines of x, `[SUBS, X_BOX + X_REST]`; rows of the tile beyond keep what they hold."""
    X_BOX: gl.constexpr = x_desc.block_type.shape[0]
    COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    for sub in gl.static_range(SUBS):
        col = (block * SUBS + sub) * COLUMNS
        tile = ring.index(slot * SUBS + sub)
        tma.async_copy_global_to_shared(x_desc, [token, col], bar, tile.slice(0, X_BOX, dim=0), wanted)
        if X_REST > 0:
            rest = tile.slice(X_BOX, X_REST, dim=0)
            tma.async_copy_global_to_shared(x_rest_desc, [token + X_BOX, col], bar, rest, wanted)


@gluon.jit
def source_rows(lanes, row, num_outputs, BOX: gl.constexpr, REST: gl.constexpr, GATED: gl.constexpr):
    """The matrix' rows that lie in a tile's, and whether they are there."""
    if not GATED:
        return row + lanes, (lanes < BOX + REST) & (row + lanes < num_outputs)
    half = lanes // BOX
    inner = lanes % BOX
    if REST > 0:
        rest = lanes - 2 * BOX
        half = gl.where(rest < 0, half, rest // REST)
        inner = gl.where(rest < 0, inner, BOX + rest % REST)
    is_there = (lanes < 2 * (BOX + REST)) & (row + inner < num_outputs)
    return row + inner + half * num_outputs, is_there


@gluon.jit
def store(
    out_ptr,
    result,
    row,
    token,
    split,
    num_rows,
    num_tokens,
    num_outputs,
    out_stride,
    num_warps: gl.constexpr,
):
    """Rows `row` to `row + num_rows` of `[O, T]`, transposed; a token's outputs lie `out_stride` apart."""
    layout: gl.constexpr = gl.BlockedLayout([2, 1], [16, 2], [1, num_warps], [0, 1])
    result = gl.convert_layout(result, layout)
    lanes = gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
    outputs = row + lanes
    tokens = token + gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    places = (split.to(gl.int64) * num_tokens + tokens[None, :]) * out_stride + outputs[:, None]
    mask = (tokens < num_tokens)[None, :] & ((outputs < num_outputs) & (lanes < num_rows))[:, None]
    gl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _gate(sums, first_gate, first_up, OUTPUTS: gl.constexpr, num_warps: gl.constexpr):
    """`silu(gate) * up` of rows that lie apart in shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([2, 1], [16, 2], [1, num_warps], [0, 1])
    gate = sums.slice(first_gate, OUTPUTS, dim=0).load(layout)
    up = sums.slice(first_up, OUTPUTS, dim=0).load(layout)
    return gate / (1 + gl.exp(-gate)) * up


@gluon.jit
def store_gated(
    out_ptr,
    acc,
    row,
    token,
    num_tokens,
    num_outputs,
    out_stride,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    num_warps: gl.constexpr,
):
    """As `store_gated_sums`, from registers."""
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    sums = gl.allocate_shared_memory(gl.float32, acc.shape, shared, acc)
    split = gl.program_id(1)
    store_gated_sums(
        out_ptr, sums, row, token, split, num_tokens, num_outputs, out_stride, BOX, REST, num_warps
    )


@gluon.jit
def store_gated_sums(
    out_ptr,
    sums,
    row,
    token,
    split,
    num_tokens,
    num_outputs,
    out_stride,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The rows of `sums`, in shared memory, are gate and up of the box, gate and up of the rest."""
    boxed = _gate(sums, 0, BOX, BOX, num_warps)
    store(out_ptr, boxed, row, token, split, BOX, num_tokens, num_outputs, out_stride, num_warps)
    if REST > 0:
        rest = _gate(sums, 2 * BOX, 2 * BOX + REST, REST, num_warps)
        store(out_ptr, rest, row + BOX, token, split, REST, num_tokens, num_outputs, out_stride, num_warps)


def boxes(count: int) -> tuple[int, int]:
    """A multiple of eight with two bits at most as two powers of two, or one and nothing."""
    box = 1 << (count.bit_length() - 1)
    return box, count - box


def rows_fetched(num_tokens: int, tile: int) -> int:
    """Rows of x that two boxes can fetch and that cover the tokens; rows past the end are slow to fetch."""
    rows = -(-num_tokens // 8) * 8
    while rows.bit_count() > 2:
        rows += 8
    return min(rows, tile)


def line_layout(columns: int, element_bits: int) -> gl.NVMMASharedLayout:
    """Rows of a line of memory each, swizzled so that eight of them lie in different banks."""
    line_bytes = columns * element_bits // 8
    return gl.NVMMASharedLayout(swizzle_byte_width=line_bytes, element_bitwidth=element_bits, rank=2)


def describe(matrix: torch.Tensor, num_rows: int, columns: int = 64) -> TensorDescriptor:
    """Boxes of `num_rows` rows and one line of columns."""
    layout = line_layout(columns, 8 * matrix.element_size())
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [num_rows, columns], layout)


def can_be_fetched(matrix: torch.Tensor) -> bool:
    """Whether the accelerator takes the matrix: rows of whole multiples of 16 bytes at such addresses."""
    size, row = matrix.element_size(), matrix.stride(0)
    is_aligned = matrix.data_ptr() % 16 == 0 and row * size % 16 == 0
    return (
        is_aligned and matrix.stride(1) == 1 and row >= matrix.shape[1] and matrix.shape[1] * size % 16 == 0
    )
