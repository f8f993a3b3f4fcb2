"""Times the small kernels of a decode step at the 4B shape: norms, SwiGLU, attention's inputs.

    python benchmarks/kernels/norms.py

Activations of a decode step stay in the L2 cache, so these are bound by their launches: a figure
near 2 µs a launch is all there is to have, and the fraction of the memory floor says little.
Each kernel stands beside the same work in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write
from kiln_nn.kernels.qk_norm_rope_write import reference as write_reference
from kiln_nn.kernels.rms_norm import add_rms_norm, gated_rms_norm, rms_norm
from kiln_nn.kernels.rms_norm import reference as norm_reference
from kiln_nn.kernels.swiglu import reference as swiglu_reference
from kiln_nn.kernels.swiglu import swiglu

HIDDEN, INTERMEDIATE, EPS = 2560, 9216, 1e-6
NUM_SETS = 8


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def _attention_inputs(num_rows: int) -> tuple:
    frequencies = 1e7 ** -(torch.arange(0, 64, 2, device="cuda") / 64)
    caches = [torch.zeros(num_rows + 1, 16, 4, 256, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    return (
        _draw(num_rows, 16, 2, 256)[:, :, 0],
        _draw(num_rows, 4, 256),
        _draw(num_rows, 4, 256),
        _draw(256),
        _draw(256),
        EPS,
        torch.randint(2**15, (num_rows,), device="cuda"),
        frequencies,
        torch.randperm(16 * num_rows, device="cuda")[:num_rows],
        *caches,
    )


def _cases(num_rows: int) -> list[tuple[str, int, int, Callable, Callable, Callable]]:
    """Name, calls in a step, bytes of one call, kernel, reference, and a builder of arguments."""
    hidden_bytes = 2 * num_rows * HIDDEN
    return [
        (
            "residual + rms_norm",
            64,
            4 * hidden_bytes,
            partial(add_rms_norm, eps=EPS, offset=1.0),
            partial(norm_reference.add_rms_norm, eps=EPS, offset=1.0),
            lambda: (_draw(num_rows, HIDDEN), _draw(num_rows, HIDDEN), _draw(HIDDEN)),
        ),
        (
            "rms_norm",
            1,
            2 * hidden_bytes,
            partial(rms_norm, eps=EPS, offset=1.0),
            partial(norm_reference.rms_norm, eps=EPS, offset=1.0),
            lambda: (_draw(num_rows, HIDDEN), _draw(HIDDEN)),
        ),
        (
            "gated rms_norm",
            24,
            num_rows * 4096 * (4 + 2 + 2),
            partial(gated_rms_norm, eps=EPS),
            partial(norm_reference.gated_rms_norm, eps=EPS),
            lambda: (_draw(num_rows, 32, 128, dtype=torch.float32), _draw(num_rows, 32, 128), _draw(128)),
        ),
        (
            "swiglu",
            32,
            3 * 2 * num_rows * INTERMEDIATE,
            swiglu,
            swiglu_reference.swiglu,
            lambda: _draw(num_rows, 2 * INTERMEDIATE).chunk(2, dim=1),
        ),
        (
            "q/k norm + rotary + page write",
            8,
            2 * 2 * num_rows * (16 + 4 + 4) * 256,
            qk_norm_rope_write,
            _write_without_padding,
            lambda: _attention_inputs(num_rows),
        ),
    ]


def _write_without_padding(*arguments) -> torch.Tensor:
    """The reference without its look at padding, which a graph cannot hold."""
    q, k, v, q_weight, k_weight, eps, positions, frequencies, slots, k_cache, v_cache = arguments
    cos, sin = write_reference.cos_and_sin(positions, frequencies)
    rotated = [
        write_reference.apply_rotary(norm_reference.rms_norm(x, weight, eps, offset=1.0), cos, sin)
        for x, weight in ((q, q_weight), (k, k_weight))
    ]
    write_reference.write_kv(k_cache, slots, rotated[1])
    write_reference.write_kv(v_cache, slots, v)
    return rotated[0]


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def main() -> None:
    torch.manual_seed(0)
    table = ResultTable("norms")
    for num_rows in (1, 64, 256):
        for name, num_calls, num_bytes, kernel, reference, build in _cases(num_rows):
            sets = [build() for _ in range(NUM_SETS)]
            exact = [
                x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in sets[0]
            ]
            expected = _first(reference(*exact))
            for label, function in (("triton", kernel), ("torch", reference)):
                error = relative_error(_first(function(*sets[0])), expected)
                timing = time_calls([partial(function, *arguments) for arguments in sets])
                each = f"{label}, {timing.p50_ms * 1e3:.2f} us each"
                table.add(
                    f"{name} x {num_calls}, batch {num_rows}",
                    timing,
                    num_calls,
                    num_calls * num_bytes,
                    error,
                    each,
                )


if __name__ == "__main__":
    main()
