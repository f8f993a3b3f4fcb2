"""The gated activation of a feed-forward layer."""

from __future__ import annotations

import torch

from kiln_nn.kernels.checks import check_shape
from kiln_nn.kernels.dispatch import may_train_on_gpu, takes_triton
from kiln_nn.kernels.swiglu import reference

__all__ = ["swiglu"]


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, in the format of `gate_TF`.

    Raises:
        ShapeMismatch: gate and up differ in shape.
    """
    check_shape("up", up_TF, tuple(gate_TF.shape))
    if takes_triton(gate_TF, up_TF):
        from kiln_nn.kernels.swiglu import triton

        if triton.takes(gate_TF, up_TF):
            return triton.swiglu(gate_TF, up_TF)
    elif may_train_on_gpu("swiglu", gate_TF, up_TF):
        from kiln_nn.kernels.swiglu import training, triton

        if triton.takes(gate_TF, up_TF):
            return training.swiglu(gate_TF, up_TF)
    return reference.swiglu(gate_TF, up_TF)
