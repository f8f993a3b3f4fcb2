"""Quantised weights from Hopper's shared memory into the registers of a product, and the sums over them.

Warps read a box into the places that the left operand of warp-group products has in registers, where
four threads that share a row look at the same words and each takes the two weights of a word that
are its own. Four bits become bf16 by setting them under the exponent of 128 and subtracting 136, E4M3
by moving its bits into place and multiplying by 2^120: both exact.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kiln_nn.kernels.linear.triton_hopper_parts import ask_for_weights, ask_for_x, barrier


@gluon.jit
def _halves(low, high):
    """Pairs of neighbours as two tensors `[ROWS, 64]`: the first and the last inputs of a box."""
    ROWS: gl.constexpr = low.shape[0]
    inputs = gl.join(low, high).reshape([ROWS, 2, 64])
    return gl.permute(inputs, (0, 2, 1)).split()


@gluon.jit
def four_bits(tile, PLACES: gl.constexpr):
    """bf16 of the numbers in a tile of words, `[ROWS, 16]`; input `8 w + 2 t + b` is bits `4 (2 t + b)`."""
    words = tile.load(gl.SliceLayout(2, PLACES))
    thread = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, PLACES)))[None, None, :]
    choice = thread | 0x4440  # byte t of the word, and zeros
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 pair, least;
        prmt.b32 pair, $2, 0, $3;
        mul.lo.u32 pair, pair, 0x1001;
        lop3.b32 pair, pair, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 least, 0x43084308;
        sub.rn.bf16x2 pair, pair, least;
        mov.b32 {$0, $1}, pair;
        }""",
        "=h,=h,r,r",
        [gl.expand_dims(words, 2), choice],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return _halves(low, high)


@gluon.jit
def four_bits_scaled(tile, scales, PLACES: gl.constexpr):
    """The same times the rows' scales, `[ROWS, 1]` in shared memory, rounded to bf16."""
    words = tile.load(gl.SliceLayout(2, PLACES))
    thread = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, PLACES)))[None, None, :]
    scale = scales.load(gl.SliceLayout(2, PLACES)).to(gl.bfloat16)
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 pair, least, scale;
        prmt.b32 pair, $2, 0, $3;
        mul.lo.u32 pair, pair, 0x1001;
        lop3.b32 pair, pair, 0x000F000F, 0x43004300, 0xEA;
        mov.b32 least, 0x43084308;
        sub.rn.bf16x2 pair, pair, least;
        mov.b32 scale, {$4, $4};
        mul.rn.bf16x2 pair, pair, scale;
        mov.b32 {$0, $1}, pair;
        }""",
        "=h,=h,r,r,h",
        [gl.expand_dims(words, 2), thread | 0x4440, gl.expand_dims(scale, 2)],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return _halves(low, high)


@gluon.jit
def eight_bits(tile, PLACES: gl.constexpr):
    """bf16 of the numbers in a tile of pairs of E4M3, `[ROWS, 64]`."""
    pairs = tile.load(PLACES)
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b32 pair, sign, scale;
        cvt.u32.u16 pair, $2;
        prmt.b32 pair, pair, 0, 0x4140;
        mul.lo.u32 sign, pair, 256;
        mul.lo.u32 pair, pair, 16;
        and.b32 pair, pair, 0x07F007F0;
        lop3.b32 pair, sign, 0x80008000, pair, 0xEA;
        mov.b32 scale, 0x7B807B80;
        mul.rn.bf16x2 pair, pair, scale;
        mov.b32 {$0, $1}, pair;
        }""",
        "=h,=h,h",
        [pairs],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=1,
    )
    return _halves(low, high)


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
def fetch_group_scales(
    scales_ptr,
    scale_stride,
    shared,
    row,
    num_outputs,
    first,
    num_groups,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    GATED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Scales of a program's rows and groups into shared memory, `[GROUPS, ROWS]`."""
    GROUPS: gl.constexpr = shared.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [num_warps, 1], [1, 0])
    lanes = gl.arange(0, shared.shape[1], gl.SliceLayout(1, layout))
    groups = gl.arange(0, GROUPS, gl.SliceLayout(0, layout))
    rows, is_there = source_rows(lanes, row, num_outputs, BOX, REST, GATED)
    mask = is_there[:, None] & (groups < num_groups)[None, :]
    places = rows.to(gl.int64)[:, None] * scale_stride + (first + groups)[None, :]
    scales = gl.load(scales_ptr + places, mask=mask, other=0.0)
    shared.store(gl.permute(scales, (1, 0)))


@gluon.jit
def multiply_quantised(
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
    PLACES: gl.constexpr,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`[ROWS, TOKENS]` sums over `count` blocks of inputs, those of four bits scaled.

    With `SCALED` their weights are, not the sums of groups, which want as many registers again.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    for block in range(count):
        slot = block % STAGES
        bar = bars.index(slot)
        mbarrier.wait(bar, (block // STAGES) & 1)
        # What one block has in flight ends within it: the next one writes the same registers.
        before = total
        for sub in gl.static_range(SUBS):
            place = slot * SUBS + sub
            if SCALED:
                group = scales.index(block * SUBS + sub)
                first, last = four_bits_scaled(w_ring.index(place), group, PLACES)
            elif FOUR_BITS:
                first, last = four_bits(w_ring.index(place), PLACES)
            else:
                first, last = eight_bits(w_ring.index(place), PLACES)
            first = gl.convert_layout(first, operand)
            last = gl.convert_layout(last, operand)
            x_first = x_ring.index(2 * place).permute((1, 0))
            x_last = x_ring.index(2 * place + 1).permute((1, 0))
            if FOUR_BITS and not SCALED:
                part = warpgroup_mma(first, x_first, gl.zeros_like(total), use_acc=False, is_async=True)
                part = warpgroup_mma(last, x_last, part, is_async=True)
                if sub > 0:
                    before = warpgroup_mma_wait(2, deps=[before])
                    scale = scales.index(block * SUBS + sub - 1).load(layout).to(gl.float32)
                    total += before * scale
                before = part
            else:
                total = warpgroup_mma(first, x_first, total, is_async=True)
                total = warpgroup_mma(last, x_last, total, is_async=True)
        if FOUR_BITS and not SCALED:
            before = warpgroup_mma_wait(0, deps=[before])
            scale = scales.index(block * SUBS + SUBS - 1).load(layout).to(gl.float32)
            total += before * scale
        else:
            total = warpgroup_mma_wait(0, deps=[total])
        barrier()  # all warps are done with the slot
        later = block + STAGES
        wanted = later < count
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
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, where, wanted, X_REST, 2 * SUBS)
    return total


def places(rows: int, warps: int, *, is_four_bits: bool) -> gl.DistributedLinearLayout:
    """Which registers and threads hold what of a tile, as the left operand has its weights.

    A thread of a warp-group product has rows `g` and `g + 8` of sixteen and of every eight inputs
    two neighbours, `2 t` and `2 t + 1`. Of words every thread of a row holds all, and names by the
    third coordinate which byte is its own.
    """
    inner = [[0, step] for step in ((1, 2, 4, 8) if is_four_bits else (4, 8, 16, 32))]
    row_steps = [1 << bit for bit in range(rows.bit_length() - 1)]
    warp_steps = [step for step in row_steps[4:] if step < 16 * warps]
    registers = [*inner, [8, 0], *([step, 0] for step in row_steps[4:] if step >= 16 * warps)]
    lanes, warp_bases = [[1, 0], [2, 0], [4, 0]], [[step, 0] for step in warp_steps]
    if not is_four_bits:
        lanes = [[0, 1], [0, 2], *lanes]
        return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [rows, 64])
    registers, lanes, warp_bases = (
        [[*base, 0] for base in bases] for bases in (registers, lanes, warp_bases)
    )
    lanes = [[0, 0, 1], [0, 0, 2], *lanes]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases, [], [rows, 16, 4])
