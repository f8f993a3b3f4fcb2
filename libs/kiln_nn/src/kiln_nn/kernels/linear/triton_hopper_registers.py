"""Linear layers of a few tokens over quantised weights on Hopper, each warp on its own.

With few tokens triton_hopper_quantised.py waits in its multiprocessors, not for their memory: it has few
warps, and each does one thing after another. Here every warp has groups of 128 inputs of its own, a program's
warps share its rows, and only their sums meet, in order. Before it waits for its predecessor a warp asks for
the weights of several groups, which come to its registers, or wait in shared memory in the place of the
thread that will multiply them: then programs are small, and those of the next kernel fill what this one
leaves of the multiprocessor and of the memory's time. x and the groups' scales come once for a program to
shared memory, and are read in the order of the products. These are `mma.sync`
(triton_hopper_fragments.py), which takes the weights in any order of inputs, as it finds them in memory.

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

from kiln_nn.kernels.linear.config import RegisterConfig
from kiln_nn.kernels.linear.triton_hopper_beside import multiply_beside
from kiln_nn.kernels.linear.triton_hopper_fragments import (
    TILE_TOKENS,
    scale_layout,
    sum_layout,
    x_layouts,
)
from kiln_nn.kernels.linear.triton_hopper_sums import MOST_TILES, multiply_rows
from kiln_nn.kernels.quantised import FP8, GROUP_INPUTS, QuantisedMatrix

_MOST_SHARED_BYTES = 200 * 1024


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
        multiply_rows(
            x_ptr,
            values_ptr,
            scales_ptr,
            out_ptr,
            (which - BESIDE) * ((8 if GATED else 16) * STRIPES),
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
    """What the kernel is compiled for.

    Raises:
        ValueError: what a program keeps in shared memory does not fit.
    """
    num_outputs = num_rows // (2 if is_gated else 1)
    split_groups = _split_groups(config, num_inputs)
    steps = triton.cdiv(split_groups, config.warps)
    has_whole_splits = split_groups * config.splits * GROUP_INPUTS == num_inputs
    is_whole = has_whole_splits and steps * config.warps == split_groups and num_outputs % config.outputs == 0
    rows = config.outputs * (2 if is_gated else 1)
    stripes = rows // 16
    x_tokens = 1 if num_tokens == 1 else TILE_TOKENS
    slot_bytes = min(config.ahead, steps) * rows * (64 if is_four_bits else 128) * config.is_staged
    scale_bytes = steps * rows * 4 * is_four_bits
    x_bytes = steps * x_tokens * 2 * GROUP_INPUTS
    most_tiles = (_MOST_SHARED_BYTES // config.warps - slot_bytes - scale_bytes) // x_bytes
    if most_tiles < 1:
        raise ValueError(
            f"{config.warps} warps of {steps} groups, {slot_bytes + scale_bytes + x_bytes} bytes each, do not "
            f"fit into {_MOST_SHARED_BYTES} bytes of shared memory: more splits, or fewer groups ahead"
        )
    wanted = triton.next_power_of_2(triton.cdiv(num_tokens, TILE_TOKENS))
    tiles = min(MOST_TILES.value, wanted, 1 << (most_tiles.bit_length() - 1))
    copying, reading = x_layouts(config.warps, x_tokens, is_four_bits=is_four_bits)
    return {
        "PLACES": sum_layout(stripes * tiles, config.warps, is_gated=is_gated),
        "COPYING": copying,
        "READING": reading,
        "SCALING": scale_layout(rows, config.warps),
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
