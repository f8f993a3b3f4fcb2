"""Times the linear layers and the head of one decode step at the 4B shape, over distinct weights.

    python benchmarks/kernels/linears.py [--rows 1 16 64]

One CUDA graph holds every linear layer, the residual norms and SwiGLU between them, and the head,
in the order of a step (attention and the recurrent state left out: the mixers' outputs are slices
of their inputs' products). Prediction: 8.41 GB, 1.96 ms at copy speed; the arithmetic of 256 rows
takes 2.8 ms at 780 TFLOP/s. `library` is cuBLAS between the same norms, `invariant` the tiles that
serve every batch alike. The error is that of the logits against the same chain in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.linear import invariant_config, linear, linear_partials, linear_swiglu
from kiln_nn.kernels.rms_norm import add_rms_norm
from kiln_nn.kernels.rms_norm import reference as norm_reference
from kiln_nn.kernels.swiglu import swiglu

HIDDEN, INTERMEDIATE, VALUES, VOCABULARY, EPS = 2560, 9216, 4096, 248_320, 1e-6
KINDS = [10_240 if index % 4 == 3 else 12_352 for index in range(32)]  # outputs of a layer's first matrix
ROWS = (1, 4, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Layer:
    """The weights of one layer's linear parts."""

    mixer_in_OI: torch.Tensor
    mixer_out_OI: torch.Tensor
    gate_up_OI: torch.Tensor
    down_OI: torch.Tensor


@dataclass(frozen=True)
class Operations:
    """The linear layers of one implementation and the norm between them."""

    linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    swiglu: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    partials: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    head: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    norm: Callable = add_rms_norm


def _invariant(operation: Callable, x_TI: torch.Tensor, w_OI: torch.Tensor, **options) -> torch.Tensor:
    return operation(x_TI, w_OI, config=invariant_config(*w_OI.shape), **options)


def _library_swiglu(x_TI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    return swiglu(*F.linear(x_TI, w_OI).chunk(2, dim=1))


def _float32_swiglu(x_TI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    gate, up = (x_TI @ w_OI.float().t()).chunk(2, dim=1)
    return F.silu(gate) * up


def _float32(x_TI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    return x_TI @ w_OI.float().t()


IMPLEMENTATIONS = {
    "kiln": Operations(linear, linear_swiglu, linear_partials, partial(linear, out_dtype=torch.float32)),
    "library": Operations(
        F.linear, _library_swiglu, F.linear, lambda x, w: torch.mm(x, w.t(), out_dtype=torch.float32)
    ),
    "invariant": Operations(
        partial(_invariant, linear),
        partial(_invariant, linear_swiglu),
        partial(_invariant, linear_partials),
        partial(_invariant, linear, out_dtype=torch.float32),
    ),
}
EXACT = Operations(_float32, _float32_swiglu, _float32, _float32, norm_reference.add_rms_norm)


def _step(
    operations: Operations,
    layers: list[Layer],
    head_OI: torch.Tensor,
    norm_D: torch.Tensor,
    x_TD: torch.Tensor,
) -> torch.Tensor:
    """The logits of a step without its mixers."""
    norm = partial(operations.norm, weight_D=norm_D, eps=EPS, offset=1.0)
    hidden, residual = norm(x_TD, x_TD)
    for layer in layers:
        mixed = operations.linear(hidden, layer.mixer_in_OI)[:, :VALUES]
        hidden, residual = norm(operations.partials(mixed, layer.mixer_out_OI), residual)
        gated = operations.swiglu(hidden, layer.gate_up_OI)
        hidden, residual = norm(operations.partials(gated, layer.down_OI), residual)
    return operations.head(hidden, head_OI)


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    rows = parser.parse_args().rows
    torch.manual_seed(0)
    layers = [
        Layer(
            _draw(outputs, HIDDEN),
            _draw(HIDDEN, VALUES),
            _draw(2 * INTERMEDIATE, HIDDEN),
            _draw(HIDDEN, INTERMEDIATE),
        )
        for outputs in KINDS
    ]
    head, norm = _draw(VOCABULARY, HIDDEN), torch.zeros(HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight_bytes = head.nbytes + sum(w.nbytes for layer in layers for w in vars(layer).values())
    table = ResultTable("linears")
    for num_rows in rows:
        x = torch.randn(num_rows, HIDDEN, device="cuda").bfloat16()
        expected = _step(EXACT, layers, head, norm.float(), x.float())
        for name, operations in IMPLEMENTATIONS.items():
            run = partial(_step, operations, layers, head, norm, x)
            error = relative_error(run(), expected)
            table.add(f"linears and head, batch {num_rows}", time_calls([run]), 1, weight_bytes, error, name)


if __name__ == "__main__":
    main()
