"""Linear layers of E4M3 weights and E4M3 rows of x on Hopper: tensor cores read both from shared memory.

The programs of triton_hopper_ring.py with a byte for each input, weights and x, and a scale for every
row of either, which the sums in float32 are multiplied by before they are rounded once. Nothing is
unpacked, so that programs do little but ask for memory.

A few rows that stay bf16 can be computed beside, from x as it was before it was rounded: programs of
the same kernel, 64 rows and 16 tokens each, run while the others do. A launch of their own would take
as long as all the others.

Takes E4M3 matrices of any number of outputs whose rows are 16-byte aligned (inputs in whole multiples
of 128) on compute capability 9.0. Every element is summed in one order, given by the configuration
alone. Partial sums always stay apart; the other forms do not split inputs.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width, `B` rows beside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kiln_nn.kernels.linear.config import LinearConfig
from kiln_nn.kernels.linear.triton_hopper_parts import boxes, can_be_fetched, describe, rows_fetched
from kiln_nn.kernels.linear.triton_hopper_ring import program
from kiln_nn.kernels.quantised import QuantisedMatrix, RoundedRows

BOX_INPUTS = 128  # a line of 128 bytes
_BESIDE_ROWS = 64
_BESIDE_TOKENS = 16
_BESIDE_SUBS = 2  # lines of 64 inputs in a slot
_MOST_BESIDE_STAGES = 6
_LINE_BYTES = 128


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks", "beside_blocks", "shows_producers"])
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
    beside_blocks,
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
    BESIDE: gl.constexpr,
    BESIDE_TOKENS: gl.constexpr,
    BESIDE_SUBS: gl.constexpr,
    BESIDE_STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    which = gl.program_id(2)
    token = gl.program_id(0) * TOKENS
    if BESIDE > 0 and which < BESIDE:
        BESIDE_BOX: gl.constexpr = beside_desc.block_type.shape[0]
        PARTS: gl.constexpr = TOKENS // BESIDE_TOKENS
        program(
            beside_desc,
            beside_desc,
            whole_x_desc,
            whole_x_desc,
            row_scales_ptr,
            token_scales_ptr,
            out_ptr + num_outputs,
            which // PARTS * BESIDE_BOX,
            token + which % PARTS * BESIDE_TOKENS,
            num_tokens,
            num_beside,
            out_stride,
            beside_blocks,
            beside_blocks,
            shows_producers,
            BESIDE_BOX,
            0,
            BESIDE_TOKENS,
            0,
            16 * num_warps,
            BESIDE_TOKENS,
            BESIDE_SUBS,
            BESIDE_STAGES,
            False,
            False,
            False,
            False,
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
            DEPENDENT,
            num_warps,
        )


def takes_beside(x_TI: torch.Tensor, beside_BI: torch.Tensor) -> bool:
    """Whether rows of this matrix can be computed beside."""
    is_plain = beside_BI.dtype is torch.bfloat16 and x_TI.dtype is torch.bfloat16
    return is_plain and can_be_fetched(x_TI) and can_be_fetched(beside_BI)


def constants(
    config: LinearConfig, num_tokens: int, num_beside: int = 0, *, is_gated: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    rows = max(16 * config.warps, triton.next_power_of_2(config.outputs * (2 if is_gated else 1)))
    beside_tokens = min(_BESIDE_TOKENS, config.tokens)
    slot_bytes = _BESIDE_SUBS * _LINE_BYTES * (16 * config.warps + beside_tokens)
    ring_bytes = config.stages * (config.inputs // BOX_INPUTS) * _LINE_BYTES * (rows + config.tokens)
    num_row_tiles = triton.cdiv(num_beside, _BESIDE_ROWS)
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
        "BESIDE": num_row_tiles * (config.tokens // beside_tokens),
        "BESIDE_TOKENS": beside_tokens,
        "BESIDE_SUBS": _BESIDE_SUBS,
        "BESIDE_STAGES": max(2, min(_MOST_BESIDE_STAGES, ring_bytes // slot_bytes)),  # in the others' memory
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
    num_beside = 0 if beside_BI is None else len(beside_BI)
    fixed = constants(config, num_tokens, num_beside, is_gated=is_gated)
    box_desc = describe(matrix.values, fixed["BOX"], BOX_INPUTS)
    x_desc = describe(x.numbers_TI, fixed["X_BOX"], BOX_INPUTS)
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
        box_desc if beside_BI is None else describe(beside_BI, _BESIDE_ROWS),
        x_desc if beside_BI is None else describe(x.x_TI, fixed["BESIDE_TOKENS"]),
        matrix.scales,
        x.scales_T1,
        out,
        num_tokens,
        num_outputs,
        num_beside,
        out.stride(-2),
        num_blocks,
        triton.cdiv(num_blocks, config.splits),
        triton.cdiv(num_inputs, 64 * _BESIDE_SUBS),
        int(shows_producers),
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
