"""Times linear layers over quantised weights at the 4B shape against bf16, and finds their best tiles.

    python benchmarks/kernels/quantised_linear.py [--rows 1 64] [--layers down_proj] [--schemes int4]
        [--kernel registers]

For each big layer and number of rows, microseconds a layer in one CUDA graph over all the model's
distinct weights of that layer (with SwiGLU, or with the residual's norm, where the model has them):
`bf16` as the engine computes it today; `own` the best of quantised_candidates.py; `library` the product
of weights made whole (int4) or of E4M3 with E4M3, x rounded in front (fp8); `tinygemm` torch's four-bit
product. `ideal` is the larger of the weights' bytes at copy speed and the products at 780 TFLOP/s, plus
1 microsecond a kernel; own times below 1.3 times that have used the memory well. Ends with what the
model's linear layers take in all, and with the tables for choice_quantised.py.

With `--kernel registers` (or `specialised`) only the candidates of triton_hopper_registers.py (or
triton_hopper_specialised.py) are tried, and each one's time is printed, beside what is `chosen` today and
bf16.

Kernels are compiled in parallel before anything is timed; a candidate that does not fit the GPU or
computes something else than the reference is named and left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import torch
from measure import ResultTable, relative_error, time_calls
from quantised_candidates import LAYERS, SCHEMES, Layer, candidates

from kiln_nn.kernels.linear import Weight, linear, linear_partials, linear_swiglu
from kiln_nn.kernels.linear.choice_quantised import choose
from kiln_nn.kernels.linear.config import LinearKind, Tiling
from kiln_nn.kernels.linear.quantised import library_linear
from kiln_nn.kernels.quantised import FP8, QuantisedMatrix, Scheme, quantise_rtn
from kiln_nn.kernels.rms_norm import add_rms_norm
from kiln_nn.kernels.swiglu import swiglu

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
FLOPS_PER_S = 780e12
KERNEL_S = 1e-6
MOST_ERROR = {"own": 6e-3, "library": 5e-2, "tinygemm": 3e-2, "bf16": 6e-3}
NUM_WORKERS = 14
HEAD_OUTPUTS = 100_000  # more outputs than any layer but the head, whose results are float32


def _rows_of(layer: Layer, all_rows: Iterable[int]) -> list[int]:
    """The head sees one row of a sequence, not its prompt."""
    return [rows for rows in all_rows if rows <= 256 or layer.outputs < HEAD_OUTPUTS]


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


@cache
def _norm_weight(width: int) -> torch.Tensor:
    return torch.zeros(width, device="cuda", dtype=torch.bfloat16)


def _after_norm(y: torch.Tensor) -> torch.Tensor:
    """The residual's norm over a layer's result, which adds up partial sums."""
    residual = _residual(y.shape[-2], y.shape[-1])
    return add_rms_norm(y, residual, _norm_weight(y.shape[-1]), 1e-6, offset=1.0)[1]


@cache
def _residual(num_rows: int, width: int) -> torch.Tensor:
    return torch.zeros(num_rows, width, device="cuda", dtype=torch.bfloat16)


def _own(kind: LinearKind, x: torch.Tensor, weight: Weight, config: Tiling | None) -> torch.Tensor:
    """One layer by the engine's functions; without a configuration they choose."""
    if weight.shape[0] > HEAD_OUTPUTS:
        return linear(x, weight, config=config, out_dtype=torch.float32)
    if kind is LinearKind.GATED:
        return linear_swiglu(x, weight, config=config)
    if kind is LinearKind.PARTIAL:
        return _after_norm(linear_partials(x, weight, config=config))
    return linear(x, weight, config=config)


def _by_product(
    kind: LinearKind, x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The same around another product."""
    y = product(x)
    if kind is LinearKind.GATED:
        return swiglu(*y.chunk(2, dim=-1))
    return _after_norm(y[None]) if kind is LinearKind.PARTIAL else y


def _library(kind: LinearKind, x: torch.Tensor, matrix: QuantisedMatrix) -> torch.Tensor:
    if matrix.shape[0] > HEAD_OUTPUTS:
        return library_linear(x, matrix, out_dtype=torch.float32)
    return _by_product(kind, x, lambda x: library_linear(x, matrix))


def _tinygemm_weights(matrix: QuantisedMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    nibbles = (matrix.numbers() + 8).to(torch.uint8)
    packed = torch._convert_weight_to_int4pack((nibbles[:, ::2] << 4) | nibbles[:, 1::2], 8)
    scales = matrix.scales.t().contiguous()
    return packed, torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()


def _tinygemm(kind: LinearKind, x: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    packed, scales = weights
    return _by_product(kind, x, lambda x: torch._weight_int4pack_mm(x, packed, 128, scales))


def _reference(kind: LinearKind, x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    y = x.float() @ weight_OI.float().t()
    if kind is LinearKind.GATED:
        gate, up = y.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up
    return y


def _compile(tasks: list[tuple[Layer, int, Scheme, Tiling]]) -> None:
    """In a process of its own: launch each kernel once, which leaves it in Triton's cache on disk."""
    torch.cuda.set_device(0)
    for layer, num_rows, scheme, config in tasks:
        matrix = _empty_matrix(scheme, layer)
        try:
            _own(layer.kind, _draw(num_rows, layer.inputs), matrix, config)
        except Exception as error:  # noqa: BLE001 (the other candidates are still to be compiled)
            print(f"  {scheme} {layer.name} {num_rows} rows, {config}: {type(error).__name__}", flush=True)


@cache
def _empty_matrix(scheme: Scheme, layer: Layer) -> QuantisedMatrix:
    outputs, inputs = layer.outputs, layer.inputs
    if scheme == "fp8":
        bytes_OI = torch.zeros(outputs, inputs, dtype=torch.uint8, device="cuda")
        return QuantisedMatrix(scheme, bytes_OI.view(FP8), torch.ones(outputs, 1, device="cuda"))
    words = torch.zeros(outputs, inputs // 8, dtype=torch.int32, device="cuda")
    scales = torch.ones(outputs, inputs // 128, dtype=torch.bfloat16, device="cuda")
    return QuantisedMatrix(scheme, words, scales)


def _compile_all(
    layers: Iterable[Layer], all_rows: Iterable[int], schemes: Iterable[Scheme], kernel: str
) -> None:
    begun = time.monotonic()
    tasks = [
        (layer, num_rows, scheme, config)
        for layer in layers
        if layer.name != "qkv_proj"  # compiled as in_proj is
        for num_rows in sorted({rows if rows == 1 else max(8, rows) for rows in _rows_of(layer, all_rows)})
        for scheme in schemes
        for config in candidates(scheme, layer, num_rows, kernel)
    ]
    with multiprocessing.get_context("spawn").Pool(NUM_WORKERS) as pool:
        pool.map(_compile, [tasks[start::NUM_WORKERS] for start in range(NUM_WORKERS)], chunksize=1)
    print(f"{len(tasks)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)


@dataclass
class Bench:
    """One layer's weights in every format, and what was measured over them."""

    layer: Layer
    table: ResultTable
    schemes: Iterable[Scheme]
    kernel: str

    def __post_init__(self) -> None:
        layer = self.layer
        self.whole = [_draw(layer.outputs, layer.inputs) for _ in range(layer.count)]
        self.matrices = {scheme: [quantise_rtn(w, scheme) for w in self.whole] for scheme in SCHEMES}
        is_short = self.is_short = self.kernel in ("registers", "specialised")
        self.tinygemm = [] if is_short else [_tinygemm_weights(matrix) for matrix in self.matrices["int4"]]
        self.times_us: dict[tuple[int, str], float] = {}
        self.best: dict[tuple[Scheme, int], Tiling | None] = {}

    def measure(self, num_rows: int) -> None:
        """All implementations at one number of rows."""
        kind, x = self.layer.kind, torch.randn(num_rows, self.layer.inputs, device="cuda").bfloat16()
        self._time(num_rows, x, "bf16", lambda w: _own(kind, x, w, None), self.whole, self.whole[0])
        for scheme in self.schemes:
            matrices = self.matrices[scheme]
            whole = matrices[0].dequantise(torch.float32)
            fastest, chosen = float("inf"), None
            for config in candidates(scheme, self.layer, num_rows, self.kernel):
                name = f"{scheme} {config}"
                run = partial(self._run_own, x, config)
                took = self._time(num_rows, x, name, run, matrices, whole, is_kept=False)
                if self.is_short:
                    print(f"  {self.layer.name} {num_rows} rows, {name}: {took:.2f} us", flush=True)
                if took < fastest:
                    fastest, chosen = took, config
            if chosen is not None:
                run = partial(self._run_own, x, chosen)
                fastest = self._time(num_rows, x, f"{scheme} own", run, matrices, whole, note=str(chosen))
            if self.is_short:
                run, name = partial(self._run_own, x, None), f"{scheme} chosen"
                size = (self.layer.outputs, self.layer.inputs)
                other = choose(scheme, num_rows, *size, kind, is_hopper=True)
            else:
                run, name, other = partial(_library, kind, x), f"{scheme} library", None
            took = self._time(num_rows, x, name, run, matrices, whole)
            self.best[scheme, num_rows] = chosen if fastest <= took else other
        if self.tinygemm and num_rows <= 256:
            whole = self.matrices["int4"][0].dequantise(torch.float32)
            self._time(num_rows, x, "int4 tinygemm", partial(_tinygemm, kind, x), self.tinygemm, whole)

    def _run_own(self, x: torch.Tensor, config: Tiling | None, matrix: QuantisedMatrix) -> torch.Tensor:
        return _own(self.layer.kind, x, matrix, config)

    def _time(
        self,
        num_rows: int,
        x: torch.Tensor,
        name: str,
        run: Callable,
        weights: list,
        whole_OI: torch.Tensor,
        *,
        is_kept: bool = True,
        note: str = "",
    ) -> float:
        """Microseconds a layer; infinite where it does not run or computes something else."""
        try:
            error = relative_error(run(weights[0]), _reference(self.layer.kind, x, whole_OI))
            kind_of_run = name.split()[-1] if name.split()[-1] in MOST_ERROR else "own"
            if error > MOST_ERROR[kind_of_run]:
                print(f"  WRONG: {self.layer.name} {num_rows} rows, {name}: error {error:.2e}", flush=True)
                return float("inf")
            timing = time_calls([partial(run, weight) for weight in weights], 20 if num_rows <= 256 else 5)
        except Exception as problem:  # noqa: BLE001 (the other candidates are still to be timed)
            print(f"  {self.layer.name} {num_rows} rows, {name}: {problem!r:.200}", flush=True)
            torch.cuda.synchronize()
            return float("inf")
        if is_kept:
            self.times_us[num_rows, name] = timing.p50_ms * 1e3
            num_bytes = sum(self._bytes(weight) for weight in weights)
            shape = f"{self.layer.name} x {self.layer.count}, {num_rows} rows"
            self.table.add(shape, timing, self.layer.count, num_bytes, error, f"{name} {note}".strip())
        return timing.p50_ms * 1e3

    @staticmethod
    def _bytes(weight: object) -> int:
        return sum(part.nbytes for part in weight) if isinstance(weight, tuple) else weight.nbytes

    def ideal_us(self, weight: torch.Tensor | QuantisedMatrix, num_rows: int) -> float:
        products = 2 * num_rows * self.layer.outputs * self.layer.inputs / FLOPS_PER_S
        num_kernels = 2 if self.layer.kind is LinearKind.PARTIAL else 1
        reading = weight.nbytes / self.table.copy_bytes_per_s
        return 1e6 * (max(reading, products) + num_kernels * KERNEL_S)

    def show(self, all_rows: Iterable[int]) -> None:
        """The layer's table."""
        columns = ["bf16", "int4 own", "int4 library", "int4 tinygemm", "fp8 own", "fp8 library"]
        if self.is_short:
            columns = ["bf16", "int4 own", "int4 chosen", "fp8 own", "fp8 chosen"]
        print(f"\n{self.layer.name} {self.layer.outputs} x {self.layer.inputs}, us a layer")
        print(f"{'rows':>5}" + "".join(f"{name:>14}" for name in columns) + "   ideal bf16/int4/fp8")
        for num_rows in all_rows:
            times = "".join(f"{self.times_us.get((num_rows, name), float('nan')):14.2f}" for name in columns)
            weights = (self.whole[0], self.matrices["int4"][0], self.matrices["fp8"][0])
            ideal = "/".join(f"{self.ideal_us(weight, num_rows):.1f}" for weight in weights)
            print(f"{num_rows:5}{times}   {ideal}", flush=True)

    def literals(self, scheme: Scheme) -> str:
        """The layer's entry of choice_quantised.py; what follows the last own kernel is left out."""
        entries = {rows: config for (own, rows), config in self.best.items() if own == scheme}
        while entries and entries[max(entries)] is None:
            del entries[max(entries)]
        lines = []
        for rows, config in sorted(entries.items()):
            literal = config and f"{type(config).__name__}{tuple(vars(config).values())}"
            lines.append(f"        {rows}: {literal},")
        size = f'("{scheme}", ({self.layer.outputs}, {self.layer.inputs}))'
        return "\n".join([f"    {size}: {{  # {self.layer.name}", *lines, "    },"])

    def best_us(self, scheme: str, num_rows: int) -> float:
        times = [
            time
            for (rows, name), time in self.times_us.items()
            if rows == num_rows
            and name in (scheme, *(f"{scheme} {path}" for path in ("own", "library", "chosen")))
        ]
        return min(times, default=float("nan"))


def _show_model(benches: list[Bench], all_rows: Iterable[int], schemes: Iterable[Scheme]) -> None:
    print("\nall linear layers of a step but the head, ms, the faster path each")
    for num_rows in all_rows:
        sums = {
            scheme: sum(bench.layer.count * bench.best_us(scheme, num_rows) for bench in benches) / 1e3
            for scheme in ("bf16", *schemes)
        }
        print(f"{num_rows:5} " + "  ".join(f"{scheme} {total:8.3f}" for scheme, total in sums.items()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--layers", nargs="*", default=[layer.name for layer in LAYERS])
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES, default=SCHEMES)
    parser.add_argument("--kernel", choices=("all", "ring", "registers", "specialised"), default="all")
    chosen = parser.parse_args()
    layers = [layer for layer in LAYERS if layer.name in chosen.layers]
    torch.manual_seed(0)
    _compile_all(layers, chosen.rows, chosen.schemes, chosen.kernel)
    table = ResultTable("quantised_linear", prints_rows=False)
    benches = []
    for layer in layers:
        begun = time.monotonic()
        bench = Bench(layer, table, chosen.schemes, chosen.kernel)
        for num_rows in _rows_of(layer, chosen.rows):
            bench.measure(num_rows)
        bench.show(_rows_of(layer, chosen.rows))
        print(f"({time.monotonic() - begun:.0f} s)", flush=True)
        del bench.tinygemm
        benches.append(bench)
    shown = [bench for bench in benches if bench.layer.name != "head"]
    _show_model(shown, chosen.rows, chosen.schemes)
    print("\n_MEASURED = {")
    for scheme in chosen.schemes:
        for bench in benches:
            print(bench.literals(scheme))
    print("}")


if __name__ == "__main__":
    main()
