"""Linear layers of E4M3 weights and E4M3 rows of x on Hopper: tensor cores read both from shared memory.

The programs of triton_hopper_ring.py with a byte for each input, weights and x, and a scale for every
row of either, which the sums in float32 are multiplied by before they are rounded once. x may have a scale for
each 128 inputs of a row instead: sums over them are multiplied on their way into float32. Nothing is
unpacked, so that programs do little but ask for memory.

A few rows that stay bf16 can be computed beside (triton_hopper_beside.py), from x as it was before it
was rounded.

Takes E4M3 matrices of any number of outputs whose rows are 16-byte aligned (inputs in whole multiples
of 128) on compute capability 9.0. Every element is summed in one order, given by the configuration
alone. Partial sums always stay apart; the other forms do not split inputs.

Measured against float32 products of the same rounded rows on an H200, 16 to 256 tokens: 1.7e-3
relative in bf16, one rounding; 1.8e-3 to 2.3e-3 where sums are left to tensor cores.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width, `B` rows beside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kiln_nn.kernels.linear.config import LinearConfig
from kiln_nn.kernels.linear.triton_hopper_beside import BesideTiles, describe_beside, multiply_tile_beside
from kiln_nn.kernels.linear.triton_hopper_parts import boxes, describe, rows_fetched
from kiln_nn.kernels.linear.triton_hopper_ring import program
from kiln_nn.kernels.quantised import QuantisedMatrix, RoundedRows

BOX_INPUTS = 128  # a line of 128 bytes
_LINE_BYTES = 128


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks", "num_inputs", "shows_producers"])
def _linear_kernel(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    beside_desc,
    whole_x_desc,
    row_scales_ptr,
    token_scales_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_beside,
    out_stride,
    num_blocks,
    split_blocks,
    num_inputs,
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
    PROMOTED: gl.constexpr,
    GROUPS: gl.constexpr,
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
        program(
            box_desc,
            rest_desc,
            x_desc,
            x_rest_desc,
            row_scales_ptr,
            token_scales_ptr,
            out_ptr,
            (which - BESIDE) * (BOX + REST),
            token,
            num_tokens,
            num_outputs,
            out_stride,
            num_blocks,
            split_blocks,
            num_inputs // 128,
            shows_producers,
            BOX,
            REST,
            X_BOX,
            X_REST,
            ROWS,
            TOKENS,
            SUBS,
            STAGES,
            GATED,
            False,
            True,
            PROMOTED,
            GROUPS,
            DEPENDENT,
            num_warps,
        )


def constants(
    config: LinearConfig, num_tokens: int, num_beside: int = 0, num_groups: int = 0, *, is_gated: bool
) -> dict[str, Any]:
    """What the kernel is compiled for; `num_groups` of a program's inputs where groups of x have scales."""
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    rows = max(16 * config.warps, triton.next_power_of_2(config.outputs * (2 if is_gated else 1)))
    ring_bytes = config.stages * (config.inputs // BOX_INPUTS) * _LINE_BYTES * (rows + config.tokens)
    beside = BesideTiles.of(num_beside, config.tokens, config.warps, ring_bytes)
    return {
        "BOX": box,
        "REST": rest,
        "X_BOX": x_box,
        "X_REST": x_rest,
        "ROWS": rows,
        "TOKENS": config.tokens,
        "SUBS": config.inputs // BOX_INPUTS,
        "STAGES": config.stages,
        "GATED": is_gated,
        "PROMOTED": config.promotes,
        "GROUPS": triton.next_power_of_2(num_groups) if num_groups else 0,
        "BESIDE": beside.num_programs,
        "BESIDE_STAGES": beside.stages,
        "num_warps": config.warps,
    }


def launch(
    x: RoundedRows,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: LinearConfig,
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
    num_outputs = num_rows // (2 if is_gated else 1)
    num_blocks = triton.cdiv(num_inputs, config.inputs)
    split_blocks = triton.cdiv(num_blocks, config.splits)
    num_beside = 0 if beside_BI is None else len(beside_BI)
    num_groups = 0
    if x.has_groups:
        assert config.promotes, "sums that stay in tensor cores have one scale"
        num_groups = split_blocks * (config.inputs // BOX_INPUTS)
    fixed = constants(config, num_tokens, num_beside, num_groups, is_gated=is_gated)
    box_desc = describe(matrix.values, fixed["BOX"], BOX_INPUTS)
    x_desc = describe(x.numbers_TI, fixed["X_BOX"], BOX_INPUTS)
    beside_desc, whole_x_desc = box_desc, x_desc
    if beside_BI is not None:
        beside_desc, whole_x_desc = describe_beside(x.x_TI, beside_BI, config.tokens)
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        config.splits,
        fixed["BESIDE"] + triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        box_desc,
        describe(matrix.values, fixed["REST"] or fixed["BOX"], BOX_INPUTS),
        x_desc,
        describe(x.numbers_TI, fixed["X_REST"] or fixed["X_BOX"], BOX_INPUTS),
        beside_desc,
        whole_x_desc,
        matrix.scales,
        x.scales_GT,
        out,
        num_tokens,
        num_outputs,
        num_beside,
        out.stride(-2),
        num_blocks,
        split_blocks,
        num_inputs,
        int(shows_producers),
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
