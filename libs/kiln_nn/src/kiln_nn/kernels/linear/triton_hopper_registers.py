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
    TILE_TOKENS,
    scale_layout,
    sum_layout,
    x_layouts,
)
from kiln_nn.kernels.linear.triton_hopper_operands import (
    copy_x,
    fetch_weights,
    group_scales,
    read_scales,
    read_words,
    x_registers,
)
from kiln_nn.kernels.linear.triton_hopper_parts import can_be_fetched
from kiln_nn.kernels.linear.triton_hopper_sums import MOST_TILES, add_warps, minus_eight, multiply, prepare
from kiln_nn.kernels.quantised import FP8, GROUP_INPUTS, QuantisedMatrix

_TILE_TOKENS = gl.constexpr(TILE_TOKENS)


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
    eights: gl.tuple = ()
    if FOUR_BITS:
        eights = minus_eight(g)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    SLOTS: gl.constexpr = 2 * STRIPES * HALVES * (1 if FOUR_BITS else 2)  # of a step
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
    ROWS: gl.constexpr = 16 * STRIPES * HALVES
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
                num_warps,
            )
            of_groups += (at,)
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    scales: gl.tuple = ()
    if FOUR_BITS:
        for step in gl.static_range(STEPS):
            scales += (gl.allocate_shared_memory(gl.float32, [num_warps, ROWS], plain),)
            scales[step].store(of_groups[step].to(gl.float32))
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
        STAGED,
        num_warps,
    )
    totals: gl.tuple = ()
    for _place in gl.static_range(4 * TILES * STRIPES * HALVES):
        totals += (gl.zeros([32 * num_warps], gl.float32, layout),)
    for step in gl.static_range(STEPS):
        ready: gl.tuple = ()
        begin: gl.tuple = ()
        for tile in gl.static_range(TILES):
            registers = x_registers(x[tile * STEPS + step], READING, FOUR_BITS, num_warps)
            prepared, sums = prepare(registers, eights, FOUR_BITS)
            ready += prepared
            begin += sums
        these = words[step]
        if STAGED:
            # Asked for by now, less this one and those before it.
            async_copy.wait_group((step + AHEAD if step + AHEAD < STEPS else STEPS) - step - 1)
            these = read_words(slots[step % AHEAD], SLOTS, num_warps)
        these_scales = read_scales(scales[step], ROWS // 8, SCALING, num_warps) if FOUR_BITS else ()
        totals = multiply(these, these_scales, ready, begin, totals, FOUR_BITS, HALVES * STRIPES, TILES)
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
    result = add_warps(totals, 0, NUM_TILES, PLACES, FOUR_BITS, num_warps)
    across: gl.constexpr = gl.SliceLayout(1, PLACES)
    tile = gl.arange(0, NUM_TILES, gl.SliceLayout(1, across))
    column = gl.arange(0, 128, gl.SliceLayout(0, across))
    outputs = row + (tile // TILES * 16)[:, None] + (column % 2 * 8 + column // 16)[None, :]
    tokens = token + (tile % TILES * 8)[:, None] + (column // 4 % 4 * 2 + column // 2 % 2)[None, :]
    is_there = (outputs < num_outputs) & (tokens < num_tokens)
    if not FOUR_BITS:
        result *= gl.load(scales_ptr + outputs.to(gl.int64) * scale_stride, mask=is_there, other=0.0)
    if GATED:
        up = add_warps(totals, 4 * NUM_TILES, NUM_TILES, PLACES, FOUR_BITS, num_warps)
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
    tiles = min(MOST_TILES.value, triton.next_power_of_2(triton.cdiv(num_tokens, TILE_TOKENS)))
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
