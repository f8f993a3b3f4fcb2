"""A program of Hopper's linear layers whose both operands tensor cores read from shared memory.

bf16 with bf16, or E4M3 with E4M3 and a scale for each row of either. A ring of slots fills ahead:
a line of 128 bytes of every row of weights and of x is 64 inputs in bf16, 128 in E4M3.

Tensor cores add up products of E4M3 in fewer bits than float32 has. `PROMOTED` sums leave them every
128 inputs and are added up in float32, as DeepSeek-V3 does (arXiv 2412.19437, section 3.3.2); there each 128
inputs of x may have a scale of their own.

Legend: `T` tokens, `I` inputs, `O` outputs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.triton_hopper_parts import (
    ask_for_weights,
    ask_for_x,
    barrier,
    source_rows,
    store,
    store_gated,
)


@gluon.jit
def _fetch_scales(
    scales,
    scales_ptr,
    token,
    num_tokens,
    first_group,
    num_groups,
    num_warps: gl.constexpr,
):
    """Scales of x `[G, T]`, as far as this tile's go; whoever reads them waits for a barrier."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [num_warps, 1], [1, 0])
    groups = first_group + gl.arange(0, scales.shape[0], gl.SliceLayout(1, layout))
    tokens = token + gl.arange(0, scales.shape[1], gl.SliceLayout(0, layout))
    is_there = (groups < num_groups)[:, None] & (tokens < num_tokens)[None, :]
    places = groups[:, None] * num_tokens + tokens[None, :]
    scales.store(gl.load(scales_ptr + places, mask=is_there, other=0.0))


@gluon.jit
def _scales_of(sums, scales, group, GROUPS: gl.constexpr):
    """What sums over one group of inputs are to be multiplied by, a column for each token."""
    if GROUPS > 0:
        return scales.index(group).load(sums.type.layout)
    else:
        return 1.0


@gluon.jit
def _multiply(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    w_ring,
    x_ring,
    scales,
    bars,
    row,
    token,
    num_outputs,
    begin,
    count,
    split_blocks,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    FOLDED: gl.constexpr,
    PROMOTED: gl.constexpr,
    GROUPS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`[ROWS, TOKENS]` sums over `count` blocks of inputs, while the ring fills behind them."""
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    STEP: gl.constexpr = 256 // w_ring.dtype.primitive_bitwidth  # inputs of one instruction
    # Blocks whose products may be in flight while the next one waits: their slots are not free yet.
    LAG: gl.constexpr = 0 if PROMOTED else 1
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, STEP])
    acc = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    total = acc
    for block in range(count):
        ready = block % STAGES
        mbarrier.wait(bars.index(ready), (block // STAGES) & 1)
        if FOLDED:  # noqa: SIM102 (known when compiling)
            if block > 0 and block % split_blocks == 0:
                # One partial sum is complete; they are added in the order in which the norm does.
                total = total + acc
                acc = gl.zeros([ROWS, TOKENS], gl.float32, layout)
        before, before_scales = acc, 1.0
        for sub in gl.static_range(SUBS):
            w = w_ring.index(ready * SUBS + sub)
            x = x_ring.index(ready * SUBS + sub).permute((1, 0))
            if PROMOTED:
                part = warpgroup_mma(w, x, gl.zeros_like(acc), use_acc=False, is_async=True)
                # Read while products run.
                part_scales = _scales_of(acc, scales, block * SUBS + sub, GROUPS)
                if sub > 0:
                    before = warpgroup_mma_wait(1, deps=[before])
                    acc = acc + before * before_scales
                before, before_scales = part, part_scales
            else:
                acc = warpgroup_mma(w, x, acc, is_async=True)
        if PROMOTED:
            before = warpgroup_mma_wait(0, deps=[before])
            acc = acc + before * before_scales
        else:
            # Folded sums may not be in flight where the branch above moves them.
            acc = warpgroup_mma_wait(0 if FOLDED else SUBS, deps=[acc])
        # All warps are done with the slot after the barrier.
        barrier()
        later = block - LAG + STAGES
        slot = later % STAGES
        bar = bars.index(slot)
        wanted = (block >= LAG) & (later < count)
        where = begin + later
        ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            bar,
            slot,
            row,
            num_outputs,
            where,
            wanted,
            SLOT_BYTES,
            REST,
            HALVES,
            SUBS,
        )
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, where, wanted, X_REST, SUBS)
    if not PROMOTED:
        acc = warpgroup_mma_wait(0, deps=[acc])
    if FOLDED:
        acc = total + acc
    return acc


@gluon.jit
def program(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    row_scales_ptr,
    token_scales_ptr,
    out_ptr,
    row,
    token,
    num_tokens,
    num_outputs,
    out_stride,
    num_blocks,
    split_blocks,
    num_groups,
    shows_producers,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    X_BOX: gl.constexpr,
    X_REST: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    FOLDED: gl.constexpr,
    SCALED: gl.constexpr,
    PROMOTED: gl.constexpr,
    GROUPS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Outputs from `row` on of tokens from `token` on; only `SCALED` reads the scales.

    With `GROUPS`, a power of two that a program's inputs do not exceed, x has a scale for each 128 inputs of
    a token, `num_groups` in all; without, one for each token.
    """
    HALVES: gl.constexpr = 2 if GATED else 1
    OUTPUTS: gl.constexpr = BOX + REST
    SLOT_BYTES: gl.constexpr = (HALVES * OUTPUTS + X_BOX + X_REST) * SUBS * 128
    COLUMNS: gl.constexpr = box_desc.block_type.shape[1]
    split = gl.program_id(1)
    w_ring = gl.allocate_shared_memory(box_desc.dtype, [STAGES * SUBS, ROWS, COLUMNS], box_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * SUBS, TOKENS, COLUMNS], x_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    group_scales = w_ring  # read by nobody
    if GROUPS > 0:
        group_scales = gl.allocate_shared_memory(gl.float32, [GROUPS, TOKENS], plain)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(bars.index(slot), count=1)
    fence_async_shared()
    begin = split * split_blocks
    count = num_blocks if FOLDED else gl.minimum(split_blocks, num_blocks - begin)
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        bar = bars.index(slot)
        where = begin + slot
        wanted = slot < count
        ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            bar,
            slot,
            row,
            num_outputs,
            where,
            wanted,
            SLOT_BYTES,
            REST,
            HALVES,
            SUBS,
        )
    if SCALED:
        across: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
        rows, is_row = source_rows(gl.arange(0, ROWS, across), row, num_outputs, BOX, REST, GATED)
        row_scales = gl.load(row_scales_ptr + rows, mask=is_row, other=0.0)
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        bar = bars.index(slot)
        where = begin + slot
        wanted = slot < count
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, where, wanted, X_REST, SUBS)
    if GROUPS > 0:
        first_group = begin * SUBS
        _fetch_scales(group_scales, token_scales_ptr, token, num_tokens, first_group, num_groups, num_warps)
        group_scales = group_scales._reinterpret(gl.float32, [GROUPS, 1, TOKENS], plain)
        barrier()
    elif SCALED:
        tokens = token + gl.arange(0, TOKENS, across)
        token_scales = gl.load(token_scales_ptr + tokens, mask=tokens < num_tokens, other=0.0)
    acc = _multiply(
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        group_scales,
        bars,
        row,
        token,
        num_outputs,
        begin,
        count,
        split_blocks,
        SLOT_BYTES,
        REST,
        X_REST,
        HALVES,
        SUBS,
        STAGES,
        FOLDED,
        PROMOTED,
        GROUPS,
        num_warps,
    )
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(slot))
    if SCALED:
        # One register each until here, not one for every row and token of a thread.
        by_row = gl.convert_layout(row_scales, gl.SliceLayout(1, acc.type.layout))
        acc = acc * gl.expand_dims(by_row, 1)
        if GROUPS == 0:
            by_token = gl.convert_layout(token_scales, gl.SliceLayout(0, acc.type.layout))
            acc = acc * gl.expand_dims(by_token, 0)
    if GATED:
        store_gated(out_ptr, acc, row, token, num_tokens, num_outputs, out_stride, BOX, REST, num_warps)
    else:
        store(out_ptr, acc, row, token, split, OUTPUTS, num_tokens, num_outputs, out_stride, num_warps)
