"""Linear layers of a few tokens over quantised weights on Hopper: weights go from memory into registers.

With few tokens triton_hopper_quantised.py is slow in its multiprocessors, not in their memory: few warps,
each waiting for one thing after another. Here every warp has groups of 128 inputs of its own, asks for the
weights of several of them at once, before it waits for its predecessor, and multiplies what has come by
`mma.sync` (triton_hopper_fragments.py). There is no ring, no barrier and no other warp to wait for until the
warps of a program, which share its rows, add up their sums in order.

Takes bf16 x and quantised matrices of any number of outputs whose rows are 16-byte aligned (inputs in
whole groups of 128) on compute capability 9.0; any number of tokens, of which 32 share the reading of the
weights. Sums are float32 and rounded once; every element is summed in one order, given by the
configuration alone. Partial sums always stay apart; the other forms do not split inputs.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.config import RegisterConfig
from kiln_nn.kernels.linear.triton_hopper_beside import multiply_beside
from kiln_nn.kernels.linear.triton_hopper_fragments import (
    SUM_SCALES,
    TILE_TOKENS,
    fetch_words,
    minus_eights,
    multiply_group,
    prepare_x,
    scale_layout,
    sum_layout,
    x_layouts,
)
from kiln_nn.kernels.linear.triton_hopper_parts import can_be_fetched
from kiln_nn.kernels.quantised import FP8, GROUP_INPUTS, QuantisedMatrix

_TILE_TOKENS = gl.constexpr(TILE_TOKENS)


def _codes(pieces: Iterable[tuple[str, str]]) -> tuple[gl.constexpr, gl.constexpr]:
    """Machine codes and their operands, each by place."""
    codes, operands = zip(*pieces, strict=True)
    return gl.constexpr(codes), gl.constexpr(operands)


_MOST_TILES = gl.constexpr(4)  # of 8 tokens, whose x a thread holds
_MOST_STEPS = 16  # groups of a warp; its code has them one after another
# Of eight bits, then of four; of each without and with a mask, or by tiles of 8 tokens.
_FETCH_WORDS, _FETCH_WORDS_OPERANDS = _codes(fetch_words(is_masked=masked) for masked in (False, True))
_MINUS_EIGHTS, _MINUS_EIGHTS_OPERANDS = map(gl.constexpr, minus_eights())
_PREPARE_X, _PREPARE_X_OPERANDS = _codes(prepare_x(four) for four in (False, True))
_MULTIPLY, _MULTIPLY_OPERANDS = _codes(
    multiply_group(four, tiles) for four in (False, True) for tiles in range(1, _MOST_TILES.value + 1)
)
_SUM_SCALES = gl.constexpr(SUM_SCALES)


@gluon.jit
def _fetch_weights(
    values_ptr,
    rows,
    first_word,
    step: gl.constexpr,
    is_group,
    value_stride,
    num_outputs,
    slots,
    FOUR_BITS: gl.constexpr,
    WHOLE: gl.constexpr,
    STRIPES: gl.constexpr,
    GATED: gl.constexpr,
    STAGED: gl.constexpr,
):
    """Words of a warp's group `step` for all stripes: of each, rows `g`, then rows `g + 8`.

    `rows` are each thread's own first one, `first_word` where its words of the first group begin. Staged
    words go to `slots`, by row and piece.
    """
    HALVES: gl.constexpr = 2 if GATED else 1
    LINE: gl.constexpr = 16 if FOUR_BITS else 32
    words = ()
    for part in gl.static_range(HALVES * STRIPES * 2):
        # Stripes of gates come before those of ups.
        inner = part // 2 % STRIPES * 16 + part % 2 * 8
        down = (inner + part // 2 // STRIPES * num_outputs).to(gl.int64)
        is_there = is_group & (rows + inner < num_outputs)
        places = first_word + down * value_stride + step * LINE
        for piece in gl.static_range(LINE // 16):
            if STAGED:
                _copy_words(values_ptr, places + 16 * piece, is_there, slots[part * (LINE // 16) + piece])
            else:
                at = values_ptr.to(gl.int64) + 4 * (places + 16 * piece)
                words += gl.inline_asm_elementwise(
                    _FETCH_WORDS[not WHOLE],
                    _FETCH_WORDS_OPERANDS[not WHOLE],
                    (at,) if WHOLE else (at, is_there.to(gl.int32)),
                    dtype=(gl.int32,) * 4,
                    is_pure=False,
                    pack=1,
                )
    if STAGED:
        async_copy.commit_group()
    return words


@gluon.jit
def _copy_words(values_ptr, places, is_there, slot):
    """Four words of each thread from `places` on to its own part of a slot, `[threads, 4]`."""
    WARPS: gl.constexpr = slot.shape[0] // 32
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [WARPS, 1], [1, 0])
    along: gl.constexpr = gl.SliceLayout(1, layout)
    places = gl.convert_layout(places, along, assert_trivial=True)
    is_there = gl.convert_layout(is_there, along, assert_trivial=True)
    words = gl.arange(0, 4, gl.SliceLayout(0, layout))
    ptrs = values_ptr + gl.max_contiguous(gl.multiple_of(places[:, None] + words[None, :], [1, 4]), [1, 4])
    async_copy.async_copy_global_to_shared(slot, ptrs, mask=is_there[:, None])


@gluon.jit
def _read_words(slots, COUNT: gl.constexpr, num_warps: gl.constexpr):
    """What `_copy_words` has left there, four words of each of `COUNT` slots."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    quads: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [1, 0])
    words = ()
    for place in gl.static_range(COUNT):
        quad = slots[place].load(quads).reshape([32 * num_warps, 2, 2])
        four = _halve(_halve((quad,), 1), 2)
        for word in gl.static_range(4):
            words += (gl.convert_layout(four[word], layout, assert_trivial=True),)
    return words


@gluon.jit
def _group_scales(
    scales_ptr,
    row,
    group,
    last,
    scale_stride,
    num_outputs,
    step: gl.constexpr,
    STEPS: gl.constexpr,
    ROWS: gl.constexpr,
    GATED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Of each warp's group `step` the scales of a program's rows, `[warps, ROWS]`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [num_warps, 1], [1, 0])
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    lanes = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    groups = group + step + gl.arange(0, num_warps, gl.SliceLayout(1, layout)) * STEPS
    outputs = row + lanes % OUTPUTS
    starts = (outputs + lanes // OUTPUTS * num_outputs).to(gl.int64) * scale_stride
    is_there = (groups < last)[:, None] & (outputs < num_outputs)[None, :]
    return gl.load(scales_ptr + starts[None, :] + groups[:, None], mask=is_there, other=0.0)


@gluon.jit
def _read_scales(scales, COUNT: gl.constexpr, SCALING: gl.constexpr, num_warps: gl.constexpr):
    """Those of a thread's own rows, of which `COUNT` lie eight apart."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    shared_by: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [num_warps, 1, 1], [2, 1, 0])
    across: gl.constexpr = gl.SliceLayout(2, shared_by)
    own = gl.permute(scales.load(SCALING).reshape([num_warps, COUNT, 8]), (0, 2, 1))
    if COUNT == 2:
        parts = _halve((own,), 1)
    elif COUNT == 4:
        parts = _halve(_halve((own.reshape([num_warps, 8, 2, 2]),), 1), 2)
    elif COUNT == 8:
        parts = _halve(_halve(_halve((own.reshape([num_warps, 8, 2, 2, 2]),), 1), 2), 4)
    else:
        parts = _halve(_halve(_halve(_halve((own.reshape([num_warps, 8, 2, 2, 2, 2]),), 1), 2), 4), 8)
    everywhere = gl.zeros([num_warps, 8, 4], gl.float32, shared_by)
    found = ()
    for part in gl.static_range(COUNT):
        one = gl.expand_dims(gl.convert_layout(parts[part], across, assert_trivial=True), 2)
        one, _ = gl.broadcast(one, everywhere)
        found += (gl.convert_layout(one.reshape([32 * num_warps]), layout, assert_trivial=True),)
    return found


@gluon.jit
def _copy_x(
    x_ptr,
    x,
    token,
    group,
    last,
    num_tokens,
    x_stride,
    STEPS: gl.constexpr,
    TILES: gl.constexpr,
    COPYING: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    STAGED: gl.constexpr,
    num_warps: gl.constexpr,
):
    """All x of a program into shared memory: by tile and step, `[rows, 32]` words as `x_layouts` has them."""
    ROWS: gl.constexpr = x[0].shape[0] // num_warps
    TOKENS: gl.constexpr = ROWS // 2
    lines = gl.arange(0, num_warps * ROWS, gl.SliceLayout(1, COPYING))
    columns = gl.arange(0, 32, gl.SliceLayout(0, COPYING))
    inner = lines % ROWS // 2 if FOUR_BITS else lines % TOKENS
    half = lines % 2 if FOUR_BITS else lines % ROWS // TOKENS
    words = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    groups = group + lines // ROWS * STEPS
    loaded = ()
    for place in gl.static_range(TILES * STEPS):
        tokens = token + place // STEPS * TOKENS + inner
        groups_here = groups + place % STEPS
        starts = tokens.to(gl.int64) * (x_stride // 2) + groups_here * 64 + half * 32
        is_there = (tokens < num_tokens) & (groups_here < last)
        ptrs = words + starts[:, None] + columns[None, :]
        if STAGED:
            # Copies are waited for in their order, and the weights' were asked for before.
            loaded += (gl.load(ptrs, mask=is_there[:, None], other=0),)
        else:
            async_copy.async_copy_global_to_shared(x[place], ptrs, mask=is_there[:, None])
    if STAGED:
        for place in gl.static_range(TILES * STEPS):
            x[place].store(loaded[place])
    else:
        async_copy.commit_group()
        async_copy.wait_group(0)


@gluon.jit
def _halve(tensors, COUNT: gl.constexpr):
    """`COUNT` tensors by their last index, first those of 0."""
    lower = ()
    upper = ()
    for place in gl.static_range(COUNT):
        low, high = gl.split(tensors[place])
        lower += (low,)
        upper += (high,)
    return lower + upper


@gluon.jit
def _x_registers(tile, READING: gl.constexpr, FOUR_BITS: gl.constexpr, num_warps: gl.constexpr):
    """What each thread wants of x of its warp's group, 16 registers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    shared_by: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [num_warps, 1, 1], [2, 1, 0])
    across: gl.constexpr = gl.SliceLayout(1, shared_by)
    TOKENS: gl.constexpr = tile.shape[0] // num_warps // 2
    words = tile.load(READING)
    if FOUR_BITS:
        # Half and pair of pairs are the thread's, place in a word and pair the register's.
        words = words.reshape([num_warps, TOKENS, 2, 8, 2, 2])
        words = gl.permute(words, (0, 1, 2, 4, 3, 5)).reshape([num_warps * TOKENS * 4, 2, 2, 2, 2])
    else:
        words = words.reshape([num_warps, 2, TOKENS, 4, 8])
        words = gl.permute(words, (0, 2, 3, 1, 4)).reshape([num_warps * TOKENS * 4, 2, 2, 2, 2])
    x = _halve(_halve(_halve(_halve((words,), 1), 2), 4), 8)
    registers = ()
    for place in gl.static_range(16):
        register = x[place]
        if TOKENS == 1:  # which all threads of a row read
            register = gl.convert_layout(register.reshape([num_warps, 4]), across, assert_trivial=True)
            register = gl.expand_dims(register, 1) + gl.zeros([num_warps, 8, 4], gl.int32, shared_by)
            register = register.reshape([32 * num_warps])
        registers += (gl.convert_layout(register, layout, assert_trivial=True),)
    return registers


@gluon.jit
def _multiply(
    words, scales, x, begin, totals, FOUR_BITS: gl.constexpr, STRIPES: gl.constexpr, TILES: gl.constexpr
):
    """The sums of all stripes, `4 * TILES` each, and those of one more group."""
    WORDS: gl.constexpr = 8 if FOUR_BITS else 16
    SUMS: gl.constexpr = 4 * TILES
    CODE: gl.constexpr = FOUR_BITS * _MOST_TILES + TILES - 1
    added = ()
    for stripe in gl.static_range(STRIPES):
        total = totals[SUMS * stripe : SUMS * stripe + SUMS]
        sums = gl.inline_asm_elementwise(
            _MULTIPLY[CODE],
            _MULTIPLY_OPERANDS[CODE],
            words[WORDS * stripe : WORDS * stripe + WORDS] + x + (begin if FOUR_BITS else total),
            dtype=(gl.float32,) * SUMS,
            is_pure=True,
            pack=1,
        )
        if FOUR_BITS:
            for place in gl.static_range(SUMS):
                added += (total[place] + sums[place] * scales[2 * stripe + place % 4 // 2],)
        else:
            added += sums
    return added


@gluon.jit
def _add_warps(
    totals, first: gl.constexpr, NUM_TILES: gl.constexpr, PLACES: gl.constexpr, num_warps: gl.constexpr
):
    """`NUM_TILES` times four sums from `first` on over a program's warps, `[NUM_TILES, 128]`; see `sum_layout`."""
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [NUM_TILES, num_warps, 128], whole)
    tiles = shared._reinterpret(gl.float32, [NUM_TILES, num_warps, 128], plain)
    for tile in gl.static_range(NUM_TILES):
        low = gl.join(totals[first + 4 * tile], totals[first + 4 * tile + 1])
        high = gl.join(totals[first + 4 * tile + 2], totals[first + 4 * tile + 3])
        # Bit 0 says which output, bit 1 which token.
        sums = gl.join(low, high).reshape([num_warps, 128])
        tiles.index(tile).store(gl.convert_layout(sums, layout))
    return gl.sum(shared.load(PLACES), axis=1)


@gluon.jit
def _program(
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
    HALVES: gl.constexpr = 2 if GATED else 1
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
    eights = ()
    if FOUR_BITS:
        eights = gl.inline_asm_elementwise(
            _MINUS_EIGHTS, _MINUS_EIGHTS_OPERANDS, [g], dtype=(gl.int32,) * 4, is_pure=False, pack=1
        )
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SLOTS: gl.constexpr = 2 * STRIPES * HALVES * (1 if FOUR_BITS else 2)  # of a step
    slots = ()
    if STAGED:
        for _step in gl.static_range(AHEAD):
            of_step = ()
            for _slot in gl.static_range(SLOTS):  # apart, or the compiler takes them for one
                of_step += (gl.allocate_shared_memory(gl.int32, [32 * num_warps, 4], plain),)
            slots += (of_step,)
    words = ()
    for step in gl.static_range(AHEAD):
        fetched = _fetch_weights(
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
    ROWS: gl.constexpr = 16 * STRIPES * HALVES
    group_scales = ()
    if FOUR_BITS:
        for step in gl.static_range(STEPS):
            at = _group_scales(
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
                num_warps,
            )
            group_scales += (at,)
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    scales = ()
    if FOUR_BITS:
        for step in gl.static_range(STEPS):
            scales += (gl.allocate_shared_memory(gl.float32, [num_warps, ROWS], plain),)
            scales[step].store(group_scales[step].to(gl.float32))
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    x = ()
    for _place in gl.static_range(TILES * STEPS):  # apart, or the compiler takes them for one
        x += (gl.allocate_shared_memory(gl.int32, [num_warps * 2 * X_TOKENS, 32], swizzled),)
    _copy_x(
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
        STAGED,
        num_warps,
    )
    totals = ()
    for _place in gl.static_range(4 * TILES * STRIPES * HALVES):
        totals += (gl.zeros([32 * num_warps], gl.float32, layout),)
    for step in gl.static_range(STEPS):
        ready = ()
        begin = ()
        for tile in gl.static_range(TILES):
            registers = _x_registers(x[tile * STEPS + step], READING, FOUR_BITS, num_warps)
            outputs = gl.inline_asm_elementwise(
                _PREPARE_X[FOUR_BITS],
                _PREPARE_X_OPERANDS[FOUR_BITS],
                registers + eights,
                dtype=(gl.int32,) * 16 + ((gl.float32,) * 4 if FOUR_BITS else ()),
                is_pure=True,
                pack=1,
            )
            ready += outputs[:16]
            begin += outputs[16:]
        these = words[step]
        if STAGED:
            # Asked for by now, less this one and those before it.
            async_copy.wait_group((step + AHEAD if step + AHEAD < STEPS else STEPS) - step - 1)
            these = _read_words(slots[step % AHEAD], SLOTS, num_warps)
        these_scales = _read_scales(scales[step], ROWS // 8, SCALING, num_warps) if FOUR_BITS else ()
        totals = _multiply(these, these_scales, ready, begin, totals, FOUR_BITS, HALVES * STRIPES, TILES)
        if step + AHEAD < STEPS:
            fetched = _fetch_weights(
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
    result = _add_warps(totals, 0, NUM_TILES, PLACES, num_warps) * _SUM_SCALES[FOUR_BITS]
    across: gl.constexpr = gl.SliceLayout(1, PLACES)
    tile = gl.arange(0, NUM_TILES, gl.SliceLayout(1, across))
    column = gl.arange(0, 128, gl.SliceLayout(0, across))
    outputs = row + (tile // TILES * 16)[:, None] + (column % 2 * 8 + column // 16)[None, :]
    tokens = token + (tile % TILES * 8)[:, None] + (column // 4 % 4 * 2 + column // 2 % 2)[None, :]
    is_there = (outputs < num_outputs) & (tokens < num_tokens)
    if not FOUR_BITS:
        result *= gl.load(scales_ptr + outputs.to(gl.int64) * scale_stride, mask=is_there, other=0.0)
    if GATED:
        up = _add_warps(totals, 4 * NUM_TILES, NUM_TILES, PLACES, num_warps) * _SUM_SCALES[FOUR_BITS]
        if not FOUR_BITS:
            ptrs = scales_ptr + (outputs + num_outputs).to(gl.int64) * scale_stride
            up *= gl.load(ptrs, mask=is_there, other=0.0)
        result = result / (1 + gl.exp(-result)) * up
    out_ptrs = out_ptr + (split.to(gl.int64) * num_tokens + tokens) * out_stride + outputs
    gl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=is_there)


@gluon.jit(do_not_specialize=["num_tokens", "num_groups", "split_groups", "shows_producers"])
def _linear_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    out_ptr,
    beside_ptr,
    num_tokens,
    num_outputs,
    num_groups,
    split_groups,
    num_inputs,
    x_stride,
    value_stride,
    scale_stride,
    out_stride,
    beside_stride,
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
    BESIDE: gl.constexpr,
    BESIDE_INPUTS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    which = gl.program_id(2)
    if which < BESIDE:
        multiply_beside(
            x_ptr,
            beside_ptr,
            out_ptr + num_outputs,
            which,
            num_tokens,
            num_inputs,
            x_stride,
            beside_stride,
            out_stride,
            shows_producers,
            BESIDE_INPUTS,
            DEPENDENT,
            num_warps,
        )
    else:
        _program(
            x_ptr,
            values_ptr,
            scales_ptr,
            out_ptr,
            (which - BESIDE) * (16 * STRIPES),
            num_tokens,
            num_outputs,
            num_groups,
            split_groups,
            x_stride,
            value_stride,
            scale_stride,
            out_stride,
            shows_producers,
            PLACES,
            COPYING,
            READING,
            SCALING,
            X_TOKENS,
            FOUR_BITS,
            WHOLE,
            GATED,
            STRIPES,
            TILES,
            STEPS,
            AHEAD,
            STAGED,
            DEPENDENT,
            num_warps,
        )


def takes(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether 16 bytes can be fetched at a time, beyond what triton_quantised.py asks of these."""
    return can_be_fetched(x_TI) and can_be_fetched(matrix.values) and matrix.shape[1] % GROUP_INPUTS == 0


def constants(
    config: RegisterConfig,
    num_tokens: int,
    num_rows: int,
    num_inputs: int,
    num_beside: int = 0,
    *,
    is_gated: bool,
    is_four_bits: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    num_outputs = num_rows // (2 if is_gated else 1)
    split_groups = _split_groups(config, num_inputs)
    steps = triton.cdiv(split_groups, config.warps)
    has_whole_splits = split_groups * config.splits * GROUP_INPUTS == num_inputs
    is_whole = has_whole_splits and steps * config.warps == split_groups and num_outputs % config.outputs == 0
    tiles = min(_MOST_TILES.value, triton.next_power_of_2(triton.cdiv(num_tokens, TILE_TOKENS)))
    stripes = config.outputs // 16
    x_tokens = 1 if num_tokens == 1 else TILE_TOKENS
    copying, reading = x_layouts(config.warps, x_tokens, is_four_bits=is_four_bits)
    return {
        "PLACES": sum_layout(stripes * tiles, config.warps),
        "COPYING": copying,
        "READING": reading,
        "SCALING": scale_layout(16 * stripes * (2 if is_gated else 1), config.warps),
        "X_TOKENS": x_tokens,
        "FOUR_BITS": is_four_bits,
        "WHOLE": is_whole,
        "GATED": is_gated,
        "STRIPES": stripes,
        "TILES": tiles,
        "STEPS": steps,
        "AHEAD": min(config.ahead, steps),
        "STAGED": config.is_staged,
        "BESIDE": num_beside,
        "BESIDE_INPUTS": triton.next_power_of_2(num_inputs) if num_beside else 1,
        "num_warps": config.warps,
    }


def _split_groups(config: RegisterConfig, num_inputs: int) -> int:
    return triton.cdiv(num_inputs // GROUP_INPUTS, config.splits)


def launch(
    x_TI: torch.Tensor,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: RegisterConfig,
    *,
    beside_BI: torch.Tensor | None = None,
    is_gated: bool = False,
    is_dependent: bool = True,
    shows_producers: bool = False,
) -> None:
    """Fill `out`: `[T, O]`, `[T, F]` in the gated form, or `[S, T, O]` partial sums.

    With `beside_BI`, a bf16 matrix of a few rows, `out` is `[T, O + B]`. The rows of `out` may lie apart,
    where it has two dimensions. `shows_producers` as in triton_hopper.py.
    """
    (num_tokens, num_inputs), num_rows = x_TI.shape, matrix.shape[0]
    is_four_bits = matrix.values.dtype is not FP8
    num_outputs = num_rows // (2 if is_gated else 1)
    num_beside = 0 if beside_BI is None else len(beside_BI)
    kinds = {"is_gated": is_gated, "is_four_bits": is_four_bits}
    fixed = constants(config, num_tokens, num_rows, num_inputs, num_beside, **kinds)
    beside = x_TI if beside_BI is None else beside_BI
    values = matrix.values if is_four_bits else matrix.values.view(torch.int32)
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    if config.registers:
        options["maxnreg"] = config.registers
    grid = (
        triton.cdiv(num_tokens, fixed["TILES"] * TILE_TOKENS),
        config.splits,
        fixed["BESIDE"] + triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        x_TI,
        values,
        matrix.scales,
        out,
        beside,
        num_tokens,
        num_outputs,
        num_inputs // GROUP_INPUTS,
        _split_groups(config, num_inputs),
        num_inputs,
        x_TI.stride(0),
        values.stride(0),
        matrix.scales.stride(0),
        out.stride(-2),
        beside.stride(0),
        int(shows_producers),
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
