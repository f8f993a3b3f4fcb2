"""A program of Hopper's linear layers whose weights are unpacked from shared memory into registers.

As triton_hopper_ring.py's, whose weights tensor cores read as they lie there: here a slot's are words of four
bits or pairs of E4M3 (triton_hopper_unpack.py), and x is bf16.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.triton_hopper_parts import (
    X_COLUMNS,
    ask_for_weights,
    ask_for_x,
    barrier,
    source_rows,
    store,
    store_gated,
)
from kiln_nn.kernels.linear.triton_hopper_unpack import fetch_group_scales, multiply_quantised


@gluon.jit
def program(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    scales_ptr,
    out_ptr,
    row,
    num_tokens,
    num_outputs,
    num_groups,
    scale_stride,
    out_stride,
    num_blocks,
    split_blocks,
    shows_producers,
    PLACES: gl.constexpr,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    X_BOX: gl.constexpr,
    X_REST: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The rows of the quantised matrix from `row` on."""
    HALVES: gl.constexpr = 2 if GATED else 1
    OUTPUTS: gl.constexpr = BOX + REST
    COLUMNS: gl.constexpr = box_desc.block_type.shape[1]
    LINE_BYTES: gl.constexpr = 64 if FOUR_BITS else 128
    SLOT_BYTES: gl.constexpr = SUBS * (HALVES * OUTPUTS * LINE_BYTES + (X_BOX + X_REST) * 256)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    across: gl.constexpr = gl.SliceLayout(1, layout)
    token = gl.program_id(0) * TOKENS
    split = gl.program_id(1)
    w_ring = gl.allocate_shared_memory(box_desc.dtype, [STAGES * SUBS, ROWS, COLUMNS], box_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * SUBS * 2, TOKENS, X_COLUMNS], x_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    scales = gl.allocate_shared_memory(scales_ptr.dtype.element_ty, [GROUPS, ROWS], plain)
    # The same bytes as columns of one group each.
    columns = scales._reinterpret(scales_ptr.dtype.element_ty, [GROUPS, ROWS, 1], plain)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)
    fence_async_shared()
    begin = split * split_blocks
    count = gl.minimum(split_blocks, num_blocks - begin)
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            bars.index(slot),
            slot,
            row,
            num_outputs,
            begin + slot,
            slot < count,
            SLOT_BYTES,
            REST,
            HALVES,
            SUBS,
        )
    if FOUR_BITS:
        fetch_group_scales(
            scales_ptr,
            scale_stride,
            scales,
            row,
            num_outputs,
            begin * SUBS,
            num_groups - begin * SUBS,
            BOX,
            REST,
            GATED,
            num_warps,
        )
        barrier()
    else:
        lanes = gl.arange(0, ROWS, across)
        rows, is_there = source_rows(lanes, row, num_outputs, BOX, REST, GATED)
        row_scales = gl.load(scales_ptr + rows.to(gl.int64) * scale_stride, mask=is_there, other=0.0)
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        ask_for_x(
            x_desc,
            x_rest_desc,
            x_ring,
            bars.index(slot),
            slot,
            token,
            begin + slot,
            slot < count,
            X_REST,
            2 * SUBS,
        )
    acc = multiply_quantised(
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        columns,
        bars,
        row,
        token,
        num_outputs,
        begin,
        count,
        PLACES,
        SLOT_BYTES,
        REST,
        X_REST,
        HALVES,
        SUBS,
        STAGES,
        FOUR_BITS,
        SCALED,
        num_warps,
    )
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(slot))
    if not FOUR_BITS:
        acc = acc * gl.expand_dims(row_scales, 1)
    if GATED:
        store_gated(out_ptr, acc, row, token, num_tokens, num_outputs, out_stride, BOX, REST, num_warps)
    else:
        store(out_ptr, acc, row, token, split, OUTPUTS, num_tokens, num_outputs, out_stride, num_warps)
