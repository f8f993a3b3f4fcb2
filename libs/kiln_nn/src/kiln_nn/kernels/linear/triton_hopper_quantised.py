"""Linear layers over quantised weights on Hopper: fetched as they are stored, unpacked in registers.

The ring, the waiting and the tiles of triton_hopper.py (triton_hopper_quantised_ring.py). A box of weights
holds 128 inputs: 64 bytes of a row in four bits, 128 in eight, unpacked as triton_hopper_unpack.py says;
nothing is reordered in memory, and x lies as in every other linear layer. Sums over a group of 128 inputs
are scaled in float32, in tiles of more than 128 tokens the weights in bf16; E4M3's scale, one an output,
comes last.
A few rows that stay bf16 can be computed beside (triton_hopper_beside.py), for which a launch of their
own would take as long as all the others.

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

from kiln_nn.kernels.linear.config import LinearConfig
from kiln_nn.kernels.linear.triton_hopper_beside import (
    MOST_TOKENS_BESIDE,
    BesideTiles,
    describe_beside,
    multiply_beside,
    multiply_tile_beside,
)
from kiln_nn.kernels.linear.triton_hopper_parts import boxes, can_be_fetched, describe, rows_fetched
from kiln_nn.kernels.linear.triton_hopper_quantised_ring import program
from kiln_nn.kernels.linear.triton_hopper_unpack import places
from kiln_nn.kernels.quantised import FP8, QuantisedMatrix

_MOST_TOKENS_BY_GROUP = 128  # of a tile: sums of a group beside all the sums are what registers hold
BOX_INPUTS = 128  # one group of four-bit weights


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks", "shows_producers"])
def _linear_kernel(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    beside_desc,
    beside_x_desc,
    scales_ptr,
    out_ptr,
    x_ptr,
    beside_ptr,
    num_tokens,
    num_outputs,
    num_beside,
    num_groups,
    scale_stride,
    out_stride,
    num_blocks,
    split_blocks,
    num_inputs,
    x_stride,
    beside_stride,
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
    BESIDE: gl.constexpr,
    BESIDE_INPUTS: gl.constexpr,
    BESIDE_STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    which = gl.program_id(2)
    if BESIDE_STAGES > 0 and which < BESIDE:
        multiply_tile_beside(
            beside_desc,
            beside_x_desc,
            out_ptr + num_outputs,
            which,
            gl.program_id(0) * TOKENS,
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
    elif BESIDE_STAGES == 0 and which < BESIDE:
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
        row = (which - BESIDE) * (BOX + REST)
        program(
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
            PLACES,
            BOX,
            REST,
            X_BOX,
            X_REST,
            ROWS,
            TOKENS,
            GROUPS,
            SUBS,
            STAGES,
            FOUR_BITS,
            SCALED,
            GATED,
            DEPENDENT,
            num_warps,
        )


def takes(x_TI: torch.Tensor, matrix: QuantisedMatrix) -> bool:
    """Whether the accelerator can fetch these tensors, beyond what triton_quantised.py asks of them."""
    return can_be_fetched(x_TI) and can_be_fetched(matrix.values) and matrix.shape[1] % BOX_INPUTS == 0


def scales_weights(config: LinearConfig) -> bool:
    """Whether four-bit weights are scaled, and rounded to bf16, before they meet x."""
    return config.tokens > _MOST_TOKENS_BY_GROUP


def constants(
    config: LinearConfig,
    num_tokens: int,
    num_inputs: int,
    num_beside: int = 0,
    *,
    is_gated: bool,
    is_four_bits: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    rows = max(16 * config.warps, triton.next_power_of_2(config.outputs * (2 if is_gated else 1)))
    num_groups = triton.cdiv(triton.cdiv(num_inputs, config.inputs), config.splits) * (config.inputs // 128)
    ring_bytes = config.stages * config.inputs * (rows * (4 if is_four_bits else 8) // 8 + 2 * config.tokens)
    beside = BesideTiles.of(num_beside, config.tokens, config.warps, ring_bytes)
    is_tiled = num_beside > 0 and num_tokens > MOST_TOKENS_BESIDE
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
        "SCALED": is_four_bits and scales_weights(config),
        "GATED": is_gated,
        "BESIDE": beside.num_programs if is_tiled else num_beside,
        "BESIDE_INPUTS": triton.next_power_of_2(num_inputs) if num_beside else 1,
        "BESIDE_STAGES": beside.stages if is_tiled else 0,
        "num_warps": config.warps,
    }


def launch(
    x_TI: torch.Tensor,
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
    (num_tokens, num_inputs), num_rows = x_TI.shape, matrix.shape[0]
    is_four_bits = matrix.values.dtype is not FP8
    num_outputs = num_rows // (2 if is_gated else 1)
    num_blocks = triton.cdiv(num_inputs, config.inputs)
    num_beside = 0 if beside_BI is None else len(beside_BI)
    kinds = {"is_gated": is_gated, "is_four_bits": is_four_bits}
    fixed = constants(config, num_tokens, num_inputs, num_beside, **kinds)
    beside = x_TI if beside_BI is None else beside_BI
    stored = matrix.values if is_four_bits else matrix.values.view(torch.int16)
    columns = 16 if is_four_bits else 64
    x_desc = describe(x_TI, fixed["X_BOX"])
    beside_descs = (x_desc, x_desc)
    if fixed["BESIDE_STAGES"]:
        beside_descs = describe_beside(x_TI, beside, config.tokens)
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        config.splits,
        fixed["BESIDE"] + triton.cdiv(num_outputs, config.outputs),
    )
    _linear_kernel[grid](
        describe(stored, fixed["BOX"], columns),
        describe(stored, fixed["REST"] or fixed["BOX"], columns),
        x_desc,
        describe(x_TI, fixed["X_REST"] or fixed["X_BOX"]),
        *beside_descs,
        matrix.scales,
        out,
        x_TI,
        beside,
        num_tokens,
        num_outputs,
        num_beside,
        matrix.scales.shape[1],
        matrix.scales.stride(0),
        out.stride(-2),
        num_blocks,
        triton.cdiv(num_blocks, config.splits),
        num_inputs,
        x_TI.stride(0),
        beside.stride(0),
        int(shows_producers),
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
