"""A few rows of bf16 weights, computed by programs of a kernel that is about something else.

For as many tokens as one step of eight sequences has, a program takes one row for all of them, each
thread a part of the inputs, and adds up in float32 without tensor cores (`multiply_beside`). For more, it
takes 64 rows and 16 tokens, or more, as triton_hopper.py's programs do (`multiply_tile_beside`), in the memory
that the others' ring has. Either runs while they do: a launch of its own would take longer than all.

Legend: `T` tokens, `I` inputs, `B` rows beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.triton_hopper_parts import can_be_fetched, describe
from kiln_nn.kernels.linear.triton_hopper_ring import program

MOST_TOKENS_BESIDE = 8  # of `multiply_beside`
_ROWS = 64
_TOKENS = 16
_MOST_STAGES = 6
_LINE_BYTES = 128
_SUBS = gl.constexpr(2)  # lines of 64 inputs in a slot


def takes_beside(x_TI: torch.Tensor, beside_BI: torch.Tensor) -> bool:
    """Whether rows of this matrix can be computed beside, by tiles."""
    is_plain = beside_BI.dtype is torch.bfloat16 and x_TI.dtype is torch.bfloat16
    return is_plain and can_be_fetched(x_TI) and can_be_fetched(beside_BI)


@dataclass(frozen=True)
class BesideTiles:
    """How rows beside are cut into programs, for kernels whose tiles have `tile_tokens` tokens.

    `num_programs`: beside a tile of tokens. `stages`: of the ring of one, which is no larger than that of
    the others, two slots at least.
    """

    num_programs: int
    stages: int

    @staticmethod
    def of(
        num_beside: int, tile_tokens: int, warps: int, ring_bytes: int, tokens: int = _TOKENS
    ) -> BesideTiles:
        """For kernels of so many warps whose others' ring takes `ring_bytes`; `tokens` of a program."""
        tokens = min(tokens, tile_tokens)
        slot_bytes = _SUBS.value * _LINE_BYTES * (16 * warps + tokens)
        num_programs = -(-num_beside // _ROWS) * (tile_tokens // tokens)
        return BesideTiles(num_programs, max(2, min(_MOST_STAGES, ring_bytes // slot_bytes)))


def describe_beside(
    x_TI: torch.Tensor, beside_BI: torch.Tensor, tile_tokens: int, tokens: int = _TOKENS
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Boxes of the rows beside and of x for `multiply_tile_beside`, among tiles of `tile_tokens`."""
    return describe(beside_BI, _ROWS), describe(x_TI, min(tokens, tile_tokens))


@gluon.jit
def multiply_tile_beside(
    beside_desc,
    x_desc,
    out_ptr,
    which,
    first_token,
    num_tokens,
    num_beside,
    num_inputs,
    out_stride,
    shows_producers,
    TILE_TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Program `which` of `x Wᵀ` of the tokens of one tile; `out_ptr` is at the first of these outputs."""
    ROWS: gl.constexpr = beside_desc.block_type.shape[0]
    TOKENS: gl.constexpr = x_desc.block_type.shape[0]
    SLOT_INPUTS: gl.constexpr = _SUBS * x_desc.block_type.shape[1]
    PARTS: gl.constexpr = TILE_TOKENS // TOKENS
    num_blocks = gl.cdiv(num_inputs, SLOT_INPUTS)
    program(
        beside_desc,
        beside_desc,
        x_desc,
        x_desc,
        out_ptr,  # for scales, which bf16 has none of
        out_ptr,
        out_ptr,
        which // PARTS * ROWS,
        first_token + which % PARTS * TOKENS,
        num_tokens,
        num_beside,
        out_stride,
        num_blocks,
        num_blocks,
        0,
        shows_producers,
        ROWS,
        0,
        TOKENS,
        0,
        16 * num_warps,
        TOKENS,
        _SUBS,
        STAGES,
        False,
        False,
        False,
        False,
        0,
        DEPENDENT,
        num_warps,
    )


@gluon.jit
def multiply_beside(
    x_ptr,
    w_ptr,
    out_ptr,
    row,
    num_tokens,
    num_inputs,
    x_stride,
    w_stride,
    out_stride,
    shows_producers,
    INPUTS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Output `row` of `x Wᵀ`; `INPUTS` is a power of two that holds the inputs."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [num_warps], [0])
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    cols = gl.arange(0, INPUTS, layout)
    is_input = cols < num_inputs
    w = gl.load(w_ptr + row * w_stride + cols, mask=is_input, other=0.0).to(gl.float32)
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    for token in range(num_tokens):
        x = gl.load(x_ptr + token * x_stride + cols, mask=is_input, other=0.0).to(gl.float32)
        total = gl.sum(w * x, axis=0)
        gl.store(out_ptr + token * out_stride + row, total.to(out_ptr.dtype.element_ty))
