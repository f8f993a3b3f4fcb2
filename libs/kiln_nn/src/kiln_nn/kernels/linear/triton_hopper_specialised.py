"""Linear layers over four-bit weights of many tokens on Hopper: one warp fetches, the others multiply.

One warp (triton_hopper_fetching.py) asks the memory accelerator for slot after slot of a ring, as
triton_hopper_quantised.py does for fewer tokens. Two or three warp groups unpack weights of their own and
share x, which bounds tiles of many tokens: it comes from the L2 cache as often as there are programs of
outputs. They wait for nobody but the fetching warp, so that tensor cores multiply while registers are unpacked.

Over bf16 x (triton_hopper_groups.py) sums over a group of 128 inputs are scaled in float32, in tiles of
more than 64 tokens, or several, the weights in bf16. Over x in E4M3 (triton_hopper_groups_rounded.py) weights
become E4M3, which costs half the instructions, and half the bytes of x; tensor cores are twice as fast.
x is rounded, its inputs in the order of words, by who made it, or else in front of the product.
A few rows that stay bf16 can be computed beside (triton_hopper_beside.py), from x as it was before.

Takes four-bit matrices of any number of outputs whose rows are 16-byte aligned (inputs in whole groups of
128) on compute capability 9.0. Sums are float32 and rounded once; every element is summed in one order,
given by the configuration alone. Partial sums always stay apart; the other forms do not split inputs.

Measured on an H200 beside bf16, us a layer at 64, 128 and 256 tokens: [12288, 2560] 14.4, 17.3, 23.8
(17.7, 19.5, 24.3); gated [18432, 2560] 19.3, 23.5, 44.4 (27.8, 30.4, 38.0); partial sums of [2560, 9216]
with the norm behind 14.2, 16.7, 25.4 (16.3, 18.6, 27.8), of [2560, 4096] 10.0, 13.5, 16.3 (9.7, 11.6, 13.3).
Over x in E4M3: docs/decisions/0016; against float32 products of the same rounded rows 1.7e-3 relative in bf16,
one rounding.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from kiln_nn.kernels.linear.config import SpecialisedConfig
from kiln_nn.kernels.linear.triton_hopper_beside import BesideTiles, describe_beside, multiply_tile_beside
from kiln_nn.kernels.linear.triton_hopper_fetching import fetch
from kiln_nn.kernels.linear.triton_hopper_groups import consume
from kiln_nn.kernels.linear.triton_hopper_parts import boxes, describe, rows_fetched
from kiln_nn.kernels.quantised import QuantisedMatrix, Rows, round_rows, whole

_MOST_TOKENS_BY_GROUP = 64  # of one tile: sums of a group beside all the sums are what registers hold
_INPUTS, _WORDS = 128, 16  # of a slot: one group of weights, and its words
_LINE_BITS = 1024  # the widest that is swizzled
_FIRST, _SECOND, _THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
_FETCHING_REGISTERS = gl.constexpr(24)
_REGISTERS = {2: 240, 3: 160}  # of a thread that multiplies: what a multiprocessor has


@gluon.jit
def _program(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    scales_ptr,
    token_scales_ptr,
    out_ptr,
    which,
    token,
    num_tokens,
    num_outputs,
    num_scales,
    scale_stride,
    out_stride,
    num_blocks,
    split_blocks,
    shows_producers,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    X_BOX: gl.constexpr,
    X_REST: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    TILES: gl.constexpr,
    SCALES: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    SCALED: gl.constexpr,
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The outputs of program `which` for tokens from `token` on."""
    HALVES: gl.constexpr = 2 if GATED else 1
    OUTPUTS: gl.constexpr = BOX + REST
    ROWS: gl.constexpr = 64
    COLUMNS: gl.constexpr = box_desc.block_type.shape[1]
    ALL_TILES: gl.constexpr = GROUPS * TILES
    ROUNDED: gl.constexpr = x_desc.dtype.primitive_bitwidth == 8
    X_COLUMNS: gl.constexpr = x_desc.block_type.shape[1]
    LINES: gl.constexpr = 1 if ROUNDED else 2  # of 128 bytes, of a slot's x, a token
    SLOT_BYTES: gl.constexpr = ALL_TILES * HALVES * OUTPUTS * 64 + (X_BOX + X_REST) * LINES * 128
    split = gl.program_id(1)
    row = which * (ALL_TILES * OUTPUTS)
    w_ring = gl.allocate_shared_memory(box_desc.dtype, [STAGES * ALL_TILES, ROWS, COLUMNS], box_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * LINES, TOKENS, X_COLUMNS], x_desc.layout)
    # The same bytes as sums: eight rows side by side, other places for every other two tokens.
    across: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [0, 1])
    sums = x_ring._reinterpret(gl.float32, [STAGES * LINES // 2, ROWS, TOKENS], across)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    kind: gl.constexpr = scales_ptr.dtype.element_ty
    scales = gl.allocate_shared_memory(kind, [ALL_TILES, SCALES, ROWS], plain)
    # The same bytes as columns of one group of inputs each.
    columns = scales._reinterpret(kind, [ALL_TILES * SCALES, ROWS, 1], plain)
    token_scales = scales  # read by nobody
    if ROUNDED:
        token_scales = gl.allocate_shared_memory(gl.float32, [GROUPS, 1, TOKENS], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    mbarrier.init(done.index(0), count=GROUPS)
    fence_async_shared()
    begin = split * split_blocks
    count = gl.minimum(split_blocks, num_blocks - begin)
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    fetching = (
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        full,
        empty,
        row,
        token,
        num_outputs,
        begin,
        count,
        shows_producers,
    )
    memory = (
        w_ring,
        x_ring,
        scales,
        columns,
        token_scales,
        sums,
        full,
        empty,
        turns,
        done.index(0),
        scales_ptr,
        token_scales_ptr,
        out_ptr,
    )
    numbers = (
        row,
        token,
        split,
        num_tokens,
        num_outputs,
        num_scales,
        scale_stride,
        out_stride,
        begin,
        count,
    )
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (memory, numbers, _FIRST, BOX, REST, TILES, SCALED, GATED, DEPENDENT)),
                (consume, (memory, numbers, _SECOND, BOX, REST, TILES, SCALED, GATED, DEPENDENT)),
                (fetch, (fetching, SLOT_BYTES, REST, X_REST, HALVES, ALL_TILES, STAGES, DEPENDENT)),
            ],
            [4, 1],
            [REGISTERS, _FETCHING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (memory, numbers, _FIRST, BOX, REST, TILES, SCALED, GATED, DEPENDENT)),
                (consume, (memory, numbers, _SECOND, BOX, REST, TILES, SCALED, GATED, DEPENDENT)),
                (consume, (memory, numbers, _THIRD, BOX, REST, TILES, SCALED, GATED, DEPENDENT)),
                (fetch, (fetching, SLOT_BYTES, REST, X_REST, HALVES, ALL_TILES, STAGES, DEPENDENT)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, _FETCHING_REGISTERS],
        )


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks", "num_inputs", "shows_producers"])
def _linear_kernel(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    beside_desc,
    whole_x_desc,
    scales_ptr,
    token_scales_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_beside,
    num_scales,
    scale_stride,
    out_stride,
    num_blocks,
    split_blocks,
    num_inputs,
    shows_producers,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    X_BOX: gl.constexpr,
    X_REST: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    TILES: gl.constexpr,
    SCALES: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    SCALED: gl.constexpr,
    GATED: gl.constexpr,
    BESIDE: gl.constexpr,
    BESIDE_STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    which = gl.program_id(2)
    token = gl.program_id(0) * TOKENS
    if BESIDE > 0 and which < BESIDE:
        multiply_tile_beside(
            beside_desc,
            whole_x_desc,
            out_ptr + num_outputs,
            which,
            token,
            num_tokens,
            num_beside,
            num_inputs,
            out_stride,
            shows_producers,
            TOKENS,
            BESIDE_STAGES,
            DEPENDENT,
            num_warps,
        )
    else:
        _program(
            box_desc,
            rest_desc,
            x_desc,
            x_rest_desc,
            scales_ptr,
            token_scales_ptr,
            out_ptr,
            which - BESIDE,
            token,
            num_tokens,
            num_outputs,
            num_scales,
            scale_stride,
            out_stride,
            num_blocks,
            split_blocks,
            shows_producers,
            BOX,
            REST,
            X_BOX,
            X_REST,
            TOKENS,
            GROUPS,
            TILES,
            SCALES,
            STAGES,
            REGISTERS,
            SCALED,
            GATED,
            DEPENDENT,
        )


def scales_weights(config: SpecialisedConfig) -> bool:
    """Whether four-bit weights are scaled, and rounded to bf16, before they meet x."""
    return config.tiles > 1 or config.tokens > _MOST_TOKENS_BY_GROUP


def beside_tokens(config: SpecialisedConfig) -> int:
    """Of a program of rows beside: programs have multiprocessors for themselves, of which few are left."""
    return 64 if config.tokens > 64 else 16


def constants(
    config: SpecialisedConfig, num_tokens: int, num_inputs: int, num_beside: int = 0, *, is_gated: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    beside = BesideTiles.of(num_beside, config.tokens, 4, config.ring_bytes, beside_tokens(config))
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    num_scales = triton.cdiv(triton.cdiv(num_inputs, _INPUTS), config.splits)
    return {
        "BOX": box,
        "REST": rest,
        "X_BOX": x_box,
        "X_REST": x_rest,
        "TOKENS": config.tokens,
        "GROUPS": config.groups,
        "TILES": config.tiles,
        "SCALES": max(16, triton.next_power_of_2(num_scales)),
        "STAGES": config.stages,
        "REGISTERS": _REGISTERS[config.groups],
        "SCALED": scales_weights(config),
        "GATED": is_gated,
        "BESIDE": beside.num_programs,
        "BESIDE_STAGES": beside.stages,
        "num_warps": 4,
    }


def launch(
    x: Rows,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: SpecialisedConfig,
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
    (num_tokens, num_inputs), num_rows = x.shape, matrix.shape[0]
    x_columns = _LINE_BITS // config.x_bits
    x_TI, token_scales = whole(x), matrix.scales  # these are read in E4M3 alone
    if config.x_bits == 8:
        rounded = round_rows(x, "words")
        x_TI, token_scales = rounded.numbers_TI, rounded.scales_GT
    assert matrix.scheme == "int4"
    num_outputs = num_rows // (2 if is_gated else 1)
    num_blocks = triton.cdiv(num_inputs, _INPUTS)
    num_beside = 0 if beside_BI is None else len(beside_BI)
    fixed = constants(config, num_tokens, num_inputs, num_beside, is_gated=is_gated)
    box_desc = describe(matrix.values, fixed["BOX"], _WORDS)
    x_desc = describe(x_TI, fixed["X_BOX"], x_columns)
    beside_desc, whole_x_desc = box_desc, x_desc
    if beside_BI is not None:
        beside_desc, whole_x_desc = describe_beside(whole(x), beside_BI, config.tokens, beside_tokens(config))
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        config.splits,
        fixed["BESIDE"] + triton.cdiv(num_outputs, config.groups * config.tiles * config.outputs),
    )
    _linear_kernel[grid](
        box_desc,
        describe(matrix.values, fixed["REST"] or fixed["BOX"], _WORDS),
        x_desc,
        describe(x_TI, fixed["X_REST"] or fixed["X_BOX"], x_columns),
        beside_desc,
        whole_x_desc,
        matrix.scales,
        token_scales,
        out,
        num_tokens,
        num_outputs,
        num_beside,
        matrix.scales.shape[1],
        matrix.scales.stride(0),
        out.stride(-2),
        num_blocks,
        triton.cdiv(num_blocks, config.splits),
        num_inputs,
        int(shows_producers),
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
