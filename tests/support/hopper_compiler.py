"""Compiling Hopper's Gluon kernels without a GPU, from their constants and the types of their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BITS = {"bf16": 16, "i16": 16, "i32": 32, "fp8e4nv": 8}


def boxes_of(kind: str, columns: int, **num_rows: int) -> dict[str, str]:
    """The types of descriptors, by argument, of boxes with so many rows and one line of `columns`."""
    from kiln_nn.kernels.linear.triton_hopper_parts import line_layout

    layout = line_layout(columns, _BITS[kind])
    return {name: f"tensordesc<{kind}[{rows}, {columns}],{layout!r}>" for name, rows in num_rows.items()}


def weights_and_x(
    kind: str, columns: int, constants: Mapping[str, Any], x_kind: str = "bf16"
) -> dict[str, str]:
    """The types of the descriptors that all kernels with a ring have."""
    box, rest, x_box, x_rest = (constants[name] for name in ("BOX", "REST", "X_BOX", "X_REST"))
    x_columns = 128 * 8 // _BITS[x_kind]
    return boxes_of(kind, columns, box_desc=box, rest_desc=rest or box) | boxes_of(
        x_kind, x_columns, x_desc=x_box, x_rest_desc=x_rest or x_box
    )


def compile_for_hopper(
    kernel: Any, tensors: Mapping[str, str], constants: Mapping[str, Any], *, warps: int
) -> Any:
    """The kernel's binary for compute capability 9.0, which waits for its predecessor.

    `tensors` are the types of pointers and descriptors; other arguments in small letters are integers.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    fixed = {**constants, "DEPENDENT": True}
    numbers = [name for name in kernel.arg_names if name.islower() and name not in {*tensors, *fixed}]
    signature = {**tensors, **dict.fromkeys(numbers, "i32"), **dict.fromkeys(fixed, "constexpr")}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = GluonASTSource(kernel, signature, places)
    options = {"num_warps": warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
