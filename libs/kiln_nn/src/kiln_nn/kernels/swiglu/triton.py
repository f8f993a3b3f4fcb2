"""The gated activation of a feed-forward layer in Triton.

Paper: Shazeer 2020, GLU Variants Improve Transformer (arXiv 2002.05202).
Takes float32, bf16 and fp16, two-dimensional, last dimension contiguous; gate and up may be
halves of one wider tensor. Arithmetic is float32 and rounds once, where the reference rounds
the activation before it multiplies.

Measured against float64 under the interpreter: 1e-7 relative in float32. bf16: one rounding.

Legend: `T` tokens, `F` feed-forward width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kiln_nn.kernels.dependent_launch import (
    launch_options,
    start_dependents,
    supports_dependent_launch,
    wait_for_producers,
)

_BLOCK = 1024
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _swiglu_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride,
    up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < WIDTH
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def takes(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> bool:
    """Whether the kernel computes these shapes, formats and strides."""
    return all(
        x.dim() == 2 and x.numel() and x.stride(1) == 1 and x.dtype in _FORMATS for x in (gate_TF, up_TF)
    )


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """As the reference, for inputs that `takes` accepts."""
    num_tokens, width = gate_TF.shape
    out = gate_TF.new_empty(gate_TF.shape)
    block = min(_BLOCK, triton.next_power_of_2(width))
    grid = (num_tokens, triton.cdiv(width, block))
    _swiglu_kernel[grid](
        gate_TF,
        up_TF,
        out,
        gate_TF.stride(0),
        up_TF.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=4,
        **launch_options(supports_dependent_launch(gate_TF.device)),
    )
    return out
