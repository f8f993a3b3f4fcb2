"""Times quantised linear layers with x in E4M3 at the 4B shape, and finds their best tiles.

    python benchmarks/kernels/rounded_linear.py [--scheme int4] [--rows 16 64] [--layers gate_up]
        [--unpromoted]

For each big layer and number of rows, microseconds a layer in one CUDA graph over all the model's
distinct weights of that layer (with SwiGLU, or with the residual's norm behind, where the model has them):

- x in bf16: `bf16` weights; fp8, or the scheme named, `now`, as choice_quantised.py has it; `rounded x`, the best of the
  candidates below behind a kernel that rounds x.
- x rounded already: `x given`, that candidate; `unpromoted` (of 64 rows), the same with all sums left
  to tensor cores; `library` (both of fp8 alone).
- `norm ...`: the norm that makes x and the layer, for the layers that have one in front; it rounds x
  where the layer reads it so. in_proj has the rows beside it that stay bf16.

What a layer costs in the model is the last group, or `rounded x` where no norm makes x: the lines for
choice_quantised.py at the end are what is fastest by that. `--unpromoted` tries all candidates so.

Kernels are compiled in parallel before anything is timed; a candidate that does not fit the GPU or
computes something else than the reference is named and left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from measure import ResultTable, relative_error, time_calls
from quantised_candidates import (
    LAYERS,
    SCHEMES,
    Layer,
    rounded_ring_candidates,
    rounded_specialised_candidates,
)

from kiln_nn.kernels.linear import (
    LinearConfig,
    Weight,
    linear,
    linear_beside,
    linear_partials,
    linear_swiglu,
    reads_rounded,
)
from kiln_nn.kernels.linear.config import LinearKind, Tiling
from kiln_nn.kernels.linear.quantised import launch, library_linear
from kiln_nn.kernels.quantised import (
    FP8,
    InputOrder,
    QuantisedMatrix,
    Rows,
    Scheme,
    quantise_rtn,
    round_rows,
    whole,
)
from kiln_nn.kernels.rms_norm import add_rms_norm, add_rms_norm_rounded
from kiln_nn.kernels.swiglu import swiglu

ROWS = (16, 32, 64, 128, 256)
COLUMNS = ("bf16", "now", "rounded x", "x given", "unpromoted", "library")
NORM_COLUMNS = ("norm bf16", "norm now", "norm rounded", "norm library")
NUM_BESIDE = 64  # in_proj_b and in_proj_a
MOST_ERROR = 8e-3  # against the product of the same rounded rows: a rounding of the result and short sums
MOST_ERROR_OF_ROUNDING = 8e-2
NUM_WORKERS = 14
UNPROMOTED_ROWS = 64  # the number of rows at which that is tried, for it is compiled alone
NORM_PARTIALS = 4  # that the norm in front adds up
EPS = 1e-6
ORDERS: dict[Scheme, InputOrder] = {"fp8": "plain", "int4": "words"}


def candidates(scheme: Scheme, layer: Layer, num_rows: int, *, promotes: bool) -> list[Tiling]:
    """Tiles to try."""
    if scheme == "int4":
        return list(rounded_specialised_candidates(layer, num_rows))
    return list(rounded_ring_candidates(layer, num_rows, promotes=promotes))


def _after_norm(y: torch.Tensor) -> torch.Tensor:
    """The residual's norm over a layer's result, which adds up partial sums."""
    width = y.shape[-1]
    return add_rms_norm(y, _zeros(y.shape[-2], width), _zeros(width), EPS, offset=1.0)[1]


_ZEROS: dict[tuple[int, ...], torch.Tensor] = {}


def _zeros(*shape: int) -> torch.Tensor:
    if shape not in _ZEROS:
        _ZEROS[shape] = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    return _ZEROS[shape]


def _own(kind: LinearKind, x: Rows, weight: Weight, config: Tiling | None = None) -> torch.Tensor:
    """One layer by the engine's functions; without a configuration they choose."""
    if kind is LinearKind.GATED:
        return linear_swiglu(x, weight, config=config)
    if kind is LinearKind.PARTIAL:
        return _after_norm(linear_partials(x, weight, config=config))
    return linear(x, weight, config=config)


def _library(kind: LinearKind, x: Rows, matrix: QuantisedMatrix) -> torch.Tensor:
    y = library_linear(x, matrix)
    if kind is LinearKind.GATED:
        return swiglu(*y.chunk(2, dim=-1))
    return _after_norm(y[None]) if kind is LinearKind.PARTIAL else y


def _reference(kind: LinearKind, x: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    y = x.float() @ weight_OI.float().t()
    if kind is LinearKind.GATED:
        gate, up = y.chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up
    return y


def _normed(parts: torch.Tensor, residual: torch.Tensor, order: InputOrder | None) -> Rows:
    """Normed rows, rounded too if there is an order for that."""
    args = (parts, residual, _zeros(residual.shape[1]), EPS)
    if order is None:
        return add_rms_norm(*args, offset=1.0)[0]
    return add_rms_norm_rounded(*args, offset=1.0, order=order)[0]


def _with_beside(x: Rows, matrix: QuantisedMatrix, beside_BI: torch.Tensor, config: Tiling) -> torch.Tensor:
    """`linear_beside` with this configuration."""
    y = whole(x).new_empty((x.shape[0], matrix.shape[0] + len(beside_BI)))
    launch(x, matrix, y, config, LinearKind.PLAIN, beside_BI=beside_BI)
    return y


def _bytes(weight: Weight | tuple[Weight, ...]) -> int:
    return sum(part.nbytes for part in weight) if isinstance(weight, tuple) else weight.nbytes


def _empty_matrix(scheme: Scheme, layer: Layer) -> QuantisedMatrix:
    num_bytes = layer.inputs // (2 if scheme == "int4" else 1)
    bytes_OI = torch.zeros(layer.outputs, num_bytes, dtype=torch.uint8, device="cuda")
    if scheme == "fp8":
        return QuantisedMatrix(scheme, bytes_OI.view(FP8), torch.ones(layer.outputs, 1, device="cuda"))
    scales = torch.ones(layer.outputs, layer.inputs // 128, device="cuda", dtype=torch.bfloat16)
    return QuantisedMatrix(scheme, bytes_OI.view(torch.int32), scales)


def _compile(scheme: Scheme, tasks: list[tuple[Layer, int, Tiling]]) -> None:
    """In a process of its own: launch each kernel once, which leaves it in Triton's cache on disk."""
    torch.cuda.set_device(0)
    for layer, num_rows, config in tasks:
        matrix = _empty_matrix(scheme, layer)
        x = torch.zeros(num_rows, layer.inputs, device="cuda", dtype=torch.bfloat16)
        try:
            _own(layer.kind, x, matrix, config)
        except Exception as error:  # noqa: BLE001 (the other candidates are still to be compiled)
            print(f"  {layer.name} {num_rows} rows, {config}: {error!r:.200}", flush=True)


def _compile_all(scheme: Scheme, layers: Iterable[Layer], all_rows: Iterable[int], *, promotes: bool) -> None:
    begun = time.monotonic()
    distinct = {
        # What a kernel is compiled for; splits are none of it, and layers of one kind share theirs.
        (layer.kind, min(num_rows, config.tokens), replace(config, splits=1)): (layer, num_rows, config)
        for layer in layers
        for num_rows in all_rows
        for config in candidates(scheme, layer, num_rows, promotes=promotes)
    }
    tasks = list(distinct.values())
    with multiprocessing.get_context("spawn").Pool(NUM_WORKERS) as pool:
        pool.map(
            partial(_compile, scheme),
            [tasks[start::NUM_WORKERS] for start in range(NUM_WORKERS)],
            chunksize=1,
        )
    print(f"{len(tasks)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)


class Bench:
    """One layer's weights, and what was measured over them."""

    def __init__(self, scheme: Scheme, layer: Layer, table: ResultTable, *, promotes: bool) -> None:
        self.scheme, self.layer, self.table, self.promotes = scheme, layer, table, promotes
        num_beside = NUM_BESIDE if layer.name == "in_proj" else 0
        shape = (layer.outputs + num_beside, layer.inputs)
        self.plain = [torch.randn(shape, device="cuda").bfloat16() * 0.02 for _ in range(layer.count)]
        self.matrices = [quantise_rtn(weight[: layer.outputs], scheme) for weight in self.plain]
        self.pairs = [(m, w[layer.outputs :]) for m, w in zip(self.matrices, self.plain, strict=True)]
        self.times_us: dict[tuple[int, str], float] = {}
        self.best: dict[int, Tiling] = {}

    def measure(self, num_rows: int) -> None:
        """All columns at one number of rows."""
        kind, inputs = self.layer.kind, self.layer.inputs
        parts = torch.randn(NORM_PARTIALS, num_rows, inputs, device="cuda") / 2
        residual = torch.zeros(num_rows, inputs, device="cuda", dtype=torch.bfloat16)
        x = whole(_normed(parts, residual, None))
        given, weight = round_rows(x), self.matrices[0].dequantise(torch.float32)
        exact = _reference(kind, x, weight)
        rounded = _reference(kind, given.dequantise(), weight)
        given = round_rows(x, ORDERS[self.scheme])
        time_it = partial(self._time, num_rows)
        time_it("bf16", partial(_own, kind, x), self.plain, _reference(kind, x, self.plain[0]))
        time_it("now", partial(_own, kind, x), self.matrices, exact, MOST_ERROR_OF_ROUNDING)
        took = {}
        for config in candidates(self.scheme, self.layer, num_rows, promotes=self.promotes):
            run = partial(_own, kind, given, config=config)
            took[config] = time_it(f"{config}", run, self.matrices, rounded, is_kept=False)
        order = sorted(took, key=lambda config: took[config])
        for config in order[:6]:
            print(f"  {self.layer.name} {num_rows} rows {took[config]:.2f} us: {config}", flush=True)
        best = self.best[num_rows] = order[0]
        runs: list[tuple[str, Rows, Tiling]] = [("rounded x", x, best), ("x given", given, best)]
        if num_rows == UNPROMOTED_ROWS and isinstance(best, LinearConfig):
            runs.append(("unpromoted", given, replace(best, promotes=False)))
        for name, rows, config in runs:
            run = partial(_own, kind, rows, config=config)
            time_it(name, run, self.matrices, rounded, note=f"{config}", shows_error=True)
        if self.scheme == "fp8":
            run = partial(_library, kind, given)
            time_it("library", run, self.matrices, rounded, shows_error=True)
        if kind is not LinearKind.PARTIAL:
            self._measure_with_norm(num_rows, parts, residual, best)

    def _measure_with_norm(
        self, num_rows: int, parts: torch.Tensor, residual: torch.Tensor, best: Tiling
    ) -> None:
        """The norm and the layer, with the rows beside it that stay bf16 where it has some."""
        kind, time_it = self.layer.kind, partial(self._time, num_rows)
        order = reads_rounded(residual, self.matrices[:1], is_gated=kind is LinearKind.GATED)
        x = whole(_normed(parts, residual, None))
        dequantised = self.matrices[0].dequantise(torch.float32)
        exact = _reference(kind, x, torch.cat([dequantised, self.pairs[0][1].float()]))

        def plain(weight: torch.Tensor) -> torch.Tensor:
            return _own(kind, _normed(parts, residual, None), weight)

        def now(pair: tuple[QuantisedMatrix, torch.Tensor]) -> torch.Tensor:
            x = _normed(parts, residual, order)
            return linear_beside(x, pair) if len(pair[1]) else _own(kind, x, pair[0])

        def own(pair: tuple[QuantisedMatrix, torch.Tensor]) -> torch.Tensor:
            x = _normed(parts, residual, ORDERS[self.scheme])
            return _with_beside(x, *pair, best) if len(pair[1]) else _own(kind, x, pair[0], best)

        def library(pair: tuple[QuantisedMatrix, torch.Tensor]) -> torch.Tensor:
            x, (matrix, beside) = _normed(parts, residual, "plain"), pair
            if not len(beside):
                return _library(kind, x, matrix)
            y = residual.new_empty(num_rows, len(matrix.values) + len(beside))
            library_linear(x, matrix, out=y[:, : -len(beside)])
            linear(x, beside, out=y[:, -len(beside) :])
            return y

        time_it("norm bf16", plain, self.plain, _reference(kind, x, self.plain[0]))
        runs = {"norm now": now, "norm rounded": own}
        if self.scheme == "fp8":
            runs["norm library"] = library
        for name, run in runs.items():
            time_it(name, run, self.pairs, exact, MOST_ERROR_OF_ROUNDING)

    def _time(
        self,
        num_rows: int,
        name: str,
        run: Callable,
        weights: list,
        expected: torch.Tensor,
        most_error: float = MOST_ERROR,
        *,
        is_kept: bool = True,
        shows_error: bool = False,
        note: str = "",
    ) -> float:
        """Microseconds a layer; infinite where it does not run or computes something else."""
        try:
            error = relative_error(run(weights[0]), expected)
            if error > most_error:
                print(f"  WRONG: {self.layer.name} {num_rows} rows, {name}: error {error:.2e}", flush=True)
                return float("inf")
            timing = time_calls([partial(run, weight) for weight in weights], 20)
        except Exception as problem:  # noqa: BLE001 (the other candidates are still to be timed)
            print(f"  {self.layer.name} {num_rows} rows, {name}: {problem!r:.200}", flush=True)
            torch.cuda.synchronize()
            return float("inf")
        if shows_error:
            print(f"  {self.layer.name} {num_rows} rows, {name}: error {error:.1e}", flush=True)
        if is_kept:
            self.times_us[num_rows, name] = timing.p50_ms * 1e3
            num_bytes = sum(_bytes(weight) for weight in weights)
            shape = f"{self.layer.name} x {self.layer.count}, {num_rows} rows"
            self.table.add(
                shape, timing, self.layer.count, num_bytes, error, f"{self.scheme} {name} {note}".strip()
            )
        return timing.p50_ms * 1e3

    def time_us(self, num_rows: int, name: str) -> float:
        return self.times_us.get((num_rows, name), float("inf"))

    def cost_us(self, num_rows: int, which: str) -> float:
        """Of `bf16`, `now`, `rounded` or `library` in the model."""
        if self.layer.kind is not LinearKind.PARTIAL:
            return self.time_us(num_rows, f"norm {which}")
        return self.time_us(num_rows, "rounded x" if which == "rounded" else which)

    def show(self, all_rows: Iterable[int]) -> None:
        """The layer's table."""
        columns = (*COLUMNS, *NORM_COLUMNS)
        print(f"\n{self.layer.name} {self.layer.outputs} x {self.layer.inputs}, us a layer")
        print(f"{'rows':>5}" + "".join(f"{name:>14}" for name in columns) + "   bytes at copy speed")
        reading = self.matrices[0].nbytes / self.table.copy_bytes_per_s * 1e6
        for num_rows in all_rows:
            times = "".join(f"{self.time_us(num_rows, name):14.2f}" for name in columns)
            print(f"{num_rows:5}{times}   {reading:.1f}", flush=True)

    def literals(self) -> str:
        """Lines for the layer's entry of choice_quantised.py: where E4M3 is faster than what is there."""
        lines = []
        for rows, config in sorted(self.best.items()):
            costs = {which: self.cost_us(rows, which) for which in ("now", "rounded", "library")}
            winner = min(costs, key=lambda which: costs[which])
            shown = {
                "rounded": f"{type(config).__name__}{tuple(vars(config).values())}",
                "library": "None",
                "now": "as it is",
            }
            seen = ", ".join(f"{which} {cost:.2f}" for which, cost in costs.items())
            lines.append(f"        {rows}: {shown[winner]},  # {seen}")
        size = f'("{self.scheme}", ({self.layer.outputs}, {self.layer.inputs}))'
        return "\n".join([f"    {size}: {{  # {self.layer.name}", *lines, "    },"])


def _show_model(benches: list[Bench], all_rows: Iterable[int]) -> None:
    print("\nall linear layers of a step but the head, ms; norms in front of three of them included")
    for num_rows in all_rows:
        total = {"bf16": 0.0, "now": 0.0, "best": 0.0}
        for bench in benches:
            costs = [bench.cost_us(num_rows, which) for which in ("now", "rounded", "library")]
            total["bf16"] += bench.layer.count * bench.cost_us(num_rows, "bf16") / 1e3
            total["now"] += bench.layer.count * costs[0] / 1e3
            total["best"] += bench.layer.count * min(costs) / 1e3
        print(f"{num_rows:5} " + "  ".join(f"{name} {ms:8.3f}" for name, ms in total.items()))


def main() -> None:
    names = [layer.name for layer in LAYERS if layer.name != "head"]
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--layers", nargs="*", choices=names, default=names)
    parser.add_argument("--scheme", choices=SCHEMES, default="fp8")
    parser.add_argument("--unpromoted", action="store_true")
    chosen = parser.parse_args()
    layers = [layer for layer in LAYERS if layer.name in chosen.layers]
    torch.manual_seed(0)
    _compile_all(chosen.scheme, layers, chosen.rows, promotes=not chosen.unpromoted)
    table = ResultTable("rounded_linear", prints_rows=False)
    benches = []
    for layer in layers:
        begun = time.monotonic()
        bench = Bench(chosen.scheme, layer, table, promotes=not chosen.unpromoted)
        for num_rows in chosen.rows:
            bench.measure(num_rows)
        bench.show(chosen.rows)
        print(f"({time.monotonic() - begun:.0f} s)", flush=True)
        benches.append(bench)
    _show_model(benches, chosen.rows)
    print("\nfor _MEASURED:")
    for bench in benches:
        print(bench.literals())


if __name__ == "__main__":
    main()
