"""Linear layers over quantised weights on Hopper: fetched as they are stored, unpacked in registers.

The ring, the waiting and the tiles of triton_hopper.py. A box of weights holds 128 inputs: 64 bytes
of a row in four bits, 128 in eight. Warps read it into the places that the left operand of
warp-group products has in registers, where four threads that share a row look at the same words and
each takes the two weights of a word that are its own: nothing is reordered in memory, and x lies as
in every other linear layer. Four bits become bf16 by setting them under the exponent of 128 and
subtracting 136, E4M3 by moving its bits into place and multiplying by 2^120: both exact.
Sums over a group of 128 inputs are scaled in float32; E4M3's scale, one an output, comes last.

Takes bf16 x and quantised matrices of any number of outputs whose rows are 16-byte aligned (inputs in
whole groups of 128) on compute capability 9.0. Sums are float32 and rounded once; every element is
summed in one order, given by the configuration alone. Partial sums always stay apart; the other
forms do not split inputs.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.config import LinearConfig
from kiln_nn.kernels.linear.triton_hopper_parts import (
    X_COLUMNS,
    ask_for_weights,
    ask_for_x,
    boxes,
    can_be_fetched,
    describe,
    rows_fetched,
    store,
    store_gated,
)
from kiln_nn.kernels.quantised import FP8, QuantisedMatrix

_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # Triton 3.6, 3.7
BOX_INPUTS = 128  # one group of four-bit weights


@gluon.jit
def _halves(low, high):
    """Pairs of neighbours as two tensors `[ROWS, 64]`: the first and the last inputs of a box."""
    ROWS: gl.constexpr = low.shape[0]
    inputs = gl.join(low, high).reshape([ROWS, 2, 64])
    return gl.permute(inputs, (0, 2, 1)).split()


@gluon.jit
def _four_bits(tile, PLACES: gl.constexpr):
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
def _eight_bits(tile, PLACES: gl.constexpr):
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
def _source_rows(lanes, row, num_outputs, BOX: gl.constexpr, REST: gl.constexpr, GATED: gl.constexpr):
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
def _fetch_group_scales(
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
    rows, is_there = _source_rows(lanes, row, num_outputs, BOX, REST, GATED)
    mask = is_there[:, None] & (groups < num_groups)[None, :]
    places = rows.to(gl.int64)[:, None] * scale_stride + (first + groups)[None, :]
    scales = gl.load(scales_ptr + places, mask=mask, other=0.0)
    shared.store(gl.permute(scales, (1, 0)))


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
    PLACES: gl.constexpr,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    SUBS: gl.constexpr,
    STAGES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`[ROWS, TOKENS]` sums over `count` blocks of inputs, those of four bits scaled."""
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
            if FOUR_BITS:
                first, last = _four_bits(w_ring.index(place), PLACES)
            else:
                first, last = _eight_bits(w_ring.index(place), PLACES)
            first = gl.convert_layout(first, operand)
            last = gl.convert_layout(last, operand)
            x_first = x_ring.index(2 * place).permute((1, 0))
            x_last = x_ring.index(2 * place + 1).permute((1, 0))
            if FOUR_BITS:
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
        if FOUR_BITS:
            before = warpgroup_mma_wait(0, deps=[before])
            scale = scales.index(block * SUBS + SUBS - 1).load(layout).to(gl.float32)
            total += before * scale
        else:
            total = warpgroup_mma_wait(0, deps=[total])
        _barrier()  # all warps are done with the slot
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


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks"])
def _linear_kernel(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    scales_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_groups,
    scale_stride,
    out_stride,
    num_blocks,
    split_blocks,
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
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
    SHOWS_PRODUCERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    HALVES: gl.constexpr = 2 if GATED else 1
    OUTPUTS: gl.constexpr = BOX + REST
    COLUMNS: gl.constexpr = box_desc.block_type.shape[1]
    LINE_BYTES: gl.constexpr = 64 if FOUR_BITS else 128
    SLOT_BYTES: gl.constexpr = SUBS * (HALVES * OUTPUTS * LINE_BYTES + (X_BOX + X_REST) * 256)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, TOKENS, 16])
    across: gl.constexpr = gl.SliceLayout(1, layout)
    token = gl.program_id(0) * TOKENS
    split = gl.program_id(1)
    row = gl.program_id(2) * OUTPUTS
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
    if DEPENDENT and not SHOWS_PRODUCERS:
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
        _fetch_group_scales(
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
        _barrier()
    else:
        lanes = gl.arange(0, ROWS, across)
        rows, is_there = _source_rows(lanes, row, num_outputs, BOX, REST, GATED)
        row_scales = gl.load(scales_ptr + rows.to(gl.int64) * scale_stride, mask=is_there, other=0.0)
    if DEPENDENT:
        gdc_wait()
        if SHOWS_PRODUCERS:
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
    acc = _multiply(
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


def takes(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether the accelerator can fetch these tensors, beyond what triton_quantised.py asks of them."""
    return can_be_fetched(x_TI) and can_be_fetched(matrix.values) and matrix.shape[1] % BOX_INPUTS == 0


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


def constants(
    config: LinearConfig, num_tokens: int, num_inputs: int, *, is_gated: bool, is_four_bits: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    rows = max(16 * config.warps, triton.next_power_of_2(config.outputs * (2 if is_gated else 1)))
    num_groups = triton.cdiv(triton.cdiv(num_inputs, config.inputs), config.splits) * (config.inputs // 128)
    return {
        "PLACES": places(rows, config.warps, is_four_bits=is_four_bits),
        "BOX": box,
        "REST": rest,
        "X_BOX": x_box,
        "X_REST": x_rest,
        "ROWS": rows,
        "TOKENS": config.tokens,
        "GROUPS": max(16, triton.next_power_of_2(num_groups)) if is_four_bits else 1,
        "SUBS": config.inputs // BOX_INPUTS,
        "STAGES": config.stages,
        "FOUR_BITS": is_four_bits,
        "GATED": is_gated,
        "num_warps": config.warps,
    }


def launch(
    x_TI: torch.Tensor,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: LinearConfig,
    *,
    is_gated: bool = False,
    is_dependent: bool = True,
    shows_producers: bool = False,
) -> None:
    """Fill `out`: `[T, O]`, `[T, F]` in the gated form, or `[S, T, O]` partial sums.

    The rows of `out` may lie apart, where it has two dimensions. `shows_producers` as in
    triton_hopper.py.
    """
    (num_tokens, num_inputs), num_rows = x_TI.shape, matrix.shape[0]
    is_four_bits = matrix.values.dtype is not FP8
    num_outputs = num_rows // (2 if is_gated else 1)
    num_blocks = triton.cdiv(num_inputs, config.inputs)
    fixed = constants(config, num_tokens, num_inputs, is_gated=is_gated, is_four_bits=is_four_bits)
    stored = matrix.values if is_four_bits else matrix.values.view(torch.int16)
    columns = 16 if is_four_bits else 64
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        config.splits,
        triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        describe(stored, fixed["BOX"], columns),
        describe(stored, fixed["REST"] or fixed["BOX"], columns),
        describe(x_TI, fixed["X_BOX"]),
        describe(x_TI, fixed["X_REST"] or fixed["X_BOX"]),
        matrix.scales,
        out,
        num_tokens,
        num_outputs,
        matrix.scales.shape[1],
        matrix.scales.stride(0),
        out.stride(-2),
        num_blocks,
        triton.cdiv(num_blocks, config.splits),
        **fixed,
        DEPENDENT=is_dependent,
        SHOWS_PRODUCERS=shows_producers,
        **options,
    )
