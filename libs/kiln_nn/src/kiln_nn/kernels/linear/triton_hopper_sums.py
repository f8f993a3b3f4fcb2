"""Products of a few tokens in tensor cores by `mma.sync`, and the sums of a program's warps.

Machine code of triton_hopper_fragments.py around tensors that give each thread one element. Sums of four
bits are scaled by group, in float32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.triton_hopper_fragments import (
    SUM_SCALES,
    TILE_TOKENS,
    codes,
    minus_eights,
    multiply_group,
    prepare_x,
)
from kiln_nn.kernels.linear.triton_hopper_operands import (
    copy_x,
    fetch_weights,
    group_scales,
    read_scales,
    read_words,
    x_registers,
)

MOST_TILES = gl.constexpr(4)  # of 8 tokens, whose x a thread holds
_TILE_TOKENS = gl.constexpr(TILE_TOKENS)
# Of eight bits, then of four; the last also by tiles of 8 tokens.
_MINUS_EIGHTS, _MINUS_EIGHTS_OPERANDS = map(gl.constexpr, minus_eights())
_PREPARE_X, _PREPARE_X_OPERANDS = codes(prepare_x(four) for four in (False, True))
_MULTIPLY, _MULTIPLY_OPERANDS = codes(
    multiply_group(four, tiles) for four in (False, True) for tiles in range(1, MOST_TILES.value + 1)
)
_SUM_SCALES = gl.constexpr(SUM_SCALES)


@gluon.jit
def _minus_eight(g):
    """The left operand of products of -8 and x; `g` is each thread's row."""
    return gl.inline_asm_elementwise(
        _MINUS_EIGHTS, _MINUS_EIGHTS_OPERANDS, [g], dtype=(gl.int32,) * 4, is_pure=False, pack=1
    )


@gluon.jit
def _prepare(x, eights, FOUR_BITS: gl.constexpr):
    """A group's registers of x as products want them, and of four bits what sums lack."""
    outputs = gl.inline_asm_elementwise(
        _PREPARE_X[FOUR_BITS],
        _PREPARE_X_OPERANDS[FOUR_BITS],
        x + eights,
        dtype=(gl.int32,) * 16 + ((gl.float32,) * 4 if FOUR_BITS else ()),
        is_pure=True,
        pack=1,
    )
    return outputs[:16], outputs[16:]


@gluon.jit
def _multiply(
    words, scales, x, lacking, totals, FOUR_BITS: gl.constexpr, STRIPES: gl.constexpr, TILES: gl.constexpr
):
    """The sums of all stripes, `4 * TILES` each, and those of one more group."""
    WORDS: gl.constexpr = 8 if FOUR_BITS else 16
    SUMS: gl.constexpr = 4 * TILES
    CODE: gl.constexpr = FOUR_BITS * MOST_TILES + TILES - 1
    added: gl.tuple = ()
    for stripe in gl.static_range(STRIPES):
        total = totals[SUMS * stripe : SUMS * stripe + SUMS]
        sums = gl.inline_asm_elementwise(
            _MULTIPLY[CODE],
            _MULTIPLY_OPERANDS[CODE],
            words[WORDS * stripe : WORDS * stripe + WORDS] + x,
            dtype=(gl.float32,) * SUMS,
            is_pure=True,
            pack=1,
        )
        # No product waits for those of the group before, nor for what is lacking.
        for place in gl.static_range(SUMS):
            if FOUR_BITS:
                whole = sums[place] + lacking[place]
                added += (total[place] + whole * scales[2 * stripe + place % 4 // 2],)
            else:
                added += (total[place] + sums[place],)
    return added


@gluon.jit
def _add_warps(
    totals,
    NUM_TILES: gl.constexpr,
    PLACES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Sums of a program's warps, four of each tile, `[NUM_TILES, 128]` as `sum_layout` says."""
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [NUM_TILES, num_warps, 128], whole)
    tiles = shared._reinterpret(gl.float32, [NUM_TILES, num_warps, 128], plain)
    for tile in gl.static_range(NUM_TILES):
        low = gl.join(totals[4 * tile], totals[4 * tile + 1])
        high = gl.join(totals[4 * tile + 2], totals[4 * tile + 3])
        # Bit 0 says which output, bit 1 which token.
        sums = gl.join(low, high).reshape([num_warps, 128])
        tiles.index(tile).store(gl.convert_layout(sums, layout))
    return gl.sum(shared.load(PLACES), axis=1) * _SUM_SCALES[FOUR_BITS]


@gluon.jit
def multiply_rows(
    x_ptr,
    values_ptr,
    scales_ptr,
    out_ptr,
    row,
    num_tokens,
    num_outputs,
    num_groups,
    split_groups,
    x_stride,
    value_stride,
    scale_stride,
    out_stride,
    shows_producers,
    PLACES: gl.constexpr,
    COPYING: gl.constexpr,
    READING: gl.constexpr,
    SCALING: gl.constexpr,
    X_TOKENS: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    WHOLE: gl.constexpr,
    GATED: gl.constexpr,
    STRIPES: gl.constexpr,
    TILES: gl.constexpr,
    STEPS: gl.constexpr,
    AHEAD: gl.constexpr,
    STAGED: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """The rows of the quantised matrix from `row` on."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    threads = gl.arange(0, 32 * num_warps, layout)
    g = threads % 32 // 4
    t = threads % 4
    token = gl.program_id(0) * (_TILE_TOKENS * TILES)
    split = gl.program_id(1)
    # Groups of a warp follow each other, as far as the program's go.
    last = gl.minimum((split + 1) * split_groups, num_groups)
    group = split * split_groups + threads // 32 * STEPS
    rows = row + g
    first_word = rows.to(gl.int64) * value_stride + group * (16 if FOUR_BITS else 32) + 4 * t
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    eights: gl.tuple = ()
    if FOUR_BITS:
        eights = _minus_eight(g)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SLOTS: gl.constexpr = 2 * STRIPES * (1 if FOUR_BITS else 2)  # of a step
    slots: gl.tuple = ()
    if STAGED:
        for _step in gl.static_range(AHEAD):
            of_step: gl.tuple = ()
            for _slot in gl.static_range(SLOTS):  # apart, or the compiler takes them for one
                of_step += (gl.allocate_shared_memory(gl.int32, [32 * num_warps, 4], plain),)
            slots += (of_step,)
    words: gl.tuple = ()
    for step in gl.static_range(AHEAD):
        fetched = fetch_weights(
            values_ptr,
            rows,
            first_word,
            step,
            group + step < last,
            value_stride,
            num_outputs,
            slots[step] if STAGED else (),
            FOUR_BITS,
            WHOLE,
            STRIPES,
            GATED,
            STAGED,
        )
        words += (fetched,)
    ROWS: gl.constexpr = 16 * STRIPES
    of_groups: gl.tuple = ()
    if FOUR_BITS:
        for step in gl.static_range(STEPS):
            at = group_scales(
                scales_ptr,
                row,
                split * split_groups,
                last,
                scale_stride,
                num_outputs,
                step,
                STEPS,
                ROWS,
                GATED,
                WHOLE,
                num_warps,
            )
            of_groups += (at,)
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    x: gl.tuple = ()
    for _place in gl.static_range(TILES * STEPS):  # apart, or the compiler takes them for one
        x += (gl.allocate_shared_memory(gl.int32, [num_warps * 2 * X_TOKENS, 32], swizzled),)
    copy_x(
        x_ptr,
        x,
        token,
        split * split_groups,
        last,
        num_tokens,
        x_stride,
        STEPS,
        TILES,
        COPYING,
        FOUR_BITS,
        WHOLE,
        STAGED,
        num_warps,
    )
    # Only now, or x would be asked for when these have come.
    scales: gl.tuple = ()
    if FOUR_BITS:
        for step in gl.static_range(STEPS):
            scales += (gl.allocate_shared_memory(gl.float32, [num_warps, ROWS], plain),)
            scales[step].store(of_groups[step].to(gl.float32))
    if not STAGED:
        async_copy.wait_group(0)
    totals: gl.tuple = ()
    for _place in gl.static_range(4 * TILES * STRIPES):
        totals += (gl.zeros([32 * num_warps], gl.float32, layout),)
    for step in gl.static_range(STEPS):
        ready: gl.tuple = ()
        lacking: gl.tuple = ()
        for tile in gl.static_range(TILES):
            registers = x_registers(x[tile * STEPS + step], READING, FOUR_BITS, num_warps)
            prepared, sums = _prepare(registers, eights, FOUR_BITS)
            ready += prepared
            lacking += sums
        these = words[step]
        if STAGED:
            # Asked for by now, less this one and those before it.
            async_copy.wait_group((step + AHEAD if step + AHEAD < STEPS else STEPS) - step - 1)
            these = read_words(slots[step % AHEAD], SLOTS, num_warps)
        these_scales = read_scales(scales[step], ROWS // 8, SCALING, num_warps) if FOUR_BITS else ()
        totals = _multiply(these, these_scales, ready, lacking, totals, FOUR_BITS, STRIPES, TILES)
        if step + AHEAD < STEPS:
            fetched = fetch_weights(
                values_ptr,
                rows,
                first_word,
                step + AHEAD,
                group + step + AHEAD < last,
                value_stride,
                num_outputs,
                slots[step % AHEAD] if STAGED else (),
                FOUR_BITS,
                WHOLE,
                STRIPES,
                GATED,
                STAGED,
            )
            words += (fetched,)
    NUM_TILES: gl.constexpr = STRIPES * TILES
    sums = _add_warps(totals, NUM_TILES, PLACES, FOUR_BITS, num_warps)
    if GATED:
        gate, up = gl.split(sums.reshape([NUM_TILES, 64, 2]))
        across: gl.constexpr = gate.type.layout
        column = gl.arange(0, 64, gl.SliceLayout(0, across))
        inner = column // 8
        token += column % 8
    else:
        across: gl.constexpr = gl.SliceLayout(1, PLACES)  # type: ignore[no-redef]
        column = gl.arange(0, 128, gl.SliceLayout(0, across))
        inner = column % 2 * 8 + column // 16
        token += column // 2 % 8
    tile = gl.arange(0, NUM_TILES, gl.SliceLayout(1, across))
    outputs = row + (tile // TILES * (8 if GATED else 16))[:, None] + inner[None, :]
    tokens = (tile % TILES * 8)[:, None] + token[None, :]
    is_there = (outputs < num_outputs) & (tokens < num_tokens)
    if FOUR_BITS:
        result = gate / (1 + gl.exp(-gate)) * up if GATED else sums
    else:
        ptrs = scales_ptr + outputs.to(gl.int64) * scale_stride
        scale = gl.load(ptrs, mask=is_there, other=0.0)
        if GATED:
            ptrs += num_outputs.to(gl.int64) * scale_stride
            gate *= scale
            up *= gl.load(ptrs, mask=is_there, other=0.0)
            result = gate / (1 + gl.exp(-gate)) * up
        else:
            result = sums * scale
    out_ptrs = out_ptr + (split.to(gl.int64) * num_tokens + tokens) * out_stride + outputs
    gl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=is_there)
