"""A few rows of bf16 weights, computed by programs of a kernel that is about something else.

A program takes one row for all tokens, each thread a part of the inputs, and adds up in float32
without tensor cores: cheap for as many tokens as one step of eight sequences has.

Legend: `T` tokens, `I` inputs, `B` rows beside.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST_TOKENS_BESIDE = 8


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
