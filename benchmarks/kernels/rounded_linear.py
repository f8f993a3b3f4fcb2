"""Times fp8's linear layers with x in E4M3 at the 4B shape, and finds their best tiles.

    python benchmarks/kernels/rounded_linear.py [--rows 16 64] [--layers gate_up] [--unpromoted]

For each big layer and number of rows, microseconds a layer in one CUDA graph over all the model's
distinct weights of that layer (with SwiGLU, or with the residual's norm behind, where the model has them):

- x in bf16: `bf16` weights; fp8 `now`, as choice_quantised.py has it; `rounded x`, the best of the
  candidates below behind a kernel that rounds x.
- x rounded already: `x given`, that candidate; `unpromoted` (of 64 rows), the same with all sums left
  to tensor cores; `library`.
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
from itertools import product

import torch
from measure import ResultTable, relative_error, time_calls
from quantised_candidates import LAYERS, Layer

from kiln_nn.kernels.linear import (
    LinearConfig,
    Weight,
    linear,
    linear_beside,
    linear_partials,
    linear_swiglu,
    reads_rounded,
)
from kiln_nn.kernels.linear.config import LinearKind, weight_rows
from kiln_nn.kernels.linear.quantised import launch, library_linear
from kiln_nn.kernels.quantised import FP8, QuantisedMatrix, Rows, quantise_rtn, round_rows, whole
from kiln_nn.kernels.rms_norm import add_rms_norm, add_rms_norm_rounded
from kiln_nn.kernels.swiglu import swiglu

ROWS = (16, 32, 64, 128, 256)
COLUMNS = ("bf16", "now", "rounded x", "x given", "unpromoted", "library")
NORM_COLUMNS = ("norm bf16", "norm now", "norm rounded", "norm library")
NUM_BESIDE = 64  # in_proj_b and in_proj_a
MOST_ERROR = 8e-3  # against the product of the same rounded rows: a rounding of the result and short sums
MOST_ERROR_OF_ROUNDING = 8e-2
NUM_WORKERS = 14
MULTIPROCESSORS = 132
# Inputs of a slot, and kilobytes of the ring: three programs to a multiprocessor, two, or one.
RINGS = ((128, 72), (128, 108), (256, 108), (256, 200))
UNPROMOTED_ROWS = 64  # the number of rows at which that is tried, for it is compiled alone
NORM_PARTIALS = 4  # that the norm in front adds up
EPS = 1e-6


def candidates(layer: Layer, num_rows: int, *, promotes: bool) -> list[LinearConfig]:
    """Tiles that give every multiprocessor as many as any other, and two more; warps, inputs, rings."""
    found: dict[LinearConfig, None] = {}
    outputs = layer.outputs // 2 if layer.kind is LinearKind.GATED else layer.outputs
    most = 1 << (num_rows - 1).bit_length()
    for tokens in sorted({min(most, 256), min(most, 128)}):
        num_token_tiles = -(-num_rows // tokens)
        if layer.kind is LinearKind.PARTIAL:
            shared = ((64, 1), (64, 2), (80, 1), (80, 2), (128, 1))
            tiles = [(tile, _splits(tile, layer, num_token_tiles, waves)) for tile, waves in shared]
        else:
            tiles = [
                (_balanced(outputs, waves * MULTIPROCESSORS // num_token_tiles), 1) for waves in (1, 2, 3)
            ]
            tiles.append((32 if layer.kind is LinearKind.GATED else 64, 1))
        for (tile, splits), warps, (inputs, ring_kib) in product(tiles, (4, 8), RINGS):
            tile_rows = max(64, weight_rows(tile, layer.kind))
            sums = tile_rows * tokens // (32 * warps)
            stages = min(12, ring_kib * 1024 // (inputs * (tile_rows + tokens)))
            num_blocks = -(-layer.inputs // inputs)
            is_wasteful = 16 * warps > tile_rows or stages * splits > 2 * num_blocks
            if stages < 2 or sums > 128 or is_wasteful:
                continue
            splits = -(-num_blocks // -(-num_blocks // splits))  # none without inputs
            can_promote = promotes and sums <= 64
            found[LinearConfig(tokens, tile, inputs, splits, warps, stages, 8, can_promote)] = None
    return list(found)


def _balanced(outputs: int, num_programs: int) -> int:
    """The smallest tile, of one or two boxes, of which so many programs are enough."""
    return next(tile for tile in range(8, 257, 8) if tile.bit_count() <= 2 and tile * num_programs >= outputs)


def _splits(tile: int, layer: Layer, num_token_tiles: int, waves: int) -> int:
    """Parts of the inputs that make a tile's programs as many as multiprocessors, or twice as many."""
    num_tiles = -(-layer.outputs // tile) * num_token_tiles
    return max(1, waves * MULTIPROCESSORS // num_tiles)


def _after_norm(y: torch.Tensor) -> torch.Tensor:
    """The residual's norm over a layer's result, which adds up partial sums."""
    width = y.shape[-1]
    return add_rms_norm(y, _zeros(y.shape[-2], width), _zeros(width), EPS, offset=1.0)[1]


_ZEROS: dict[tuple[int, ...], torch.Tensor] = {}


def _zeros(*shape: int) -> torch.Tensor:
    if shape not in _ZEROS:
        _ZEROS[shape] = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    return _ZEROS[shape]


def _own(kind: LinearKind, x: Rows, weight: Weight, config: LinearConfig | None = None) -> torch.Tensor:
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


def _normed(parts: torch.Tensor, residual: torch.Tensor, *, is_rounded: bool) -> Rows:
    norm = add_rms_norm_rounded if is_rounded else add_rms_norm
    return norm(parts, residual, _zeros(residual.shape[1]), EPS, offset=1.0)[0]


def _with_beside(
    x: Rows, matrix: QuantisedMatrix, beside_BI: torch.Tensor, config: LinearConfig
) -> torch.Tensor:
    """`linear_beside` with this configuration."""
    y = whole(x).new_empty((x.shape[0], matrix.shape[0] + len(beside_BI)))
    launch(x, matrix, y, config, LinearKind.PLAIN, beside_BI=beside_BI)
    return y


def _bytes(weight: Weight | tuple[Weight, ...]) -> int:
    return sum(part.nbytes for part in weight) if isinstance(weight, tuple) else weight.nbytes


def _compile(tasks: list[tuple[Layer, int, LinearConfig]]) -> None:
    """In a process of its own: launch each kernel once, which leaves it in Triton's cache on disk."""
    torch.cuda.set_device(0)
    for layer, num_rows, config in tasks:
        bytes_OI = torch.zeros(layer.outputs, layer.inputs, dtype=torch.uint8, device="cuda")
        matrix = QuantisedMatrix("fp8", bytes_OI.view(FP8), torch.ones(layer.outputs, 1, device="cuda"))
        x = torch.zeros(num_rows, layer.inputs, device="cuda", dtype=torch.bfloat16)
        try:
            _own(layer.kind, x, matrix, config)
        except Exception as error:  # noqa: BLE001 (the other candidates are still to be compiled)
            print(f"  {layer.name} {num_rows} rows, {config}: {error!r:.200}", flush=True)


def _compile_all(layers: Iterable[Layer], all_rows: Iterable[int], *, promotes: bool) -> None:
    begun = time.monotonic()
    distinct = {
        # What a kernel is compiled for; splits are none of it, and layers of one kind share theirs.
        (layer.kind, min(num_rows, config.tokens), replace(config, splits=1)): (layer, num_rows, config)
        for layer in layers
        for num_rows in all_rows
        for config in candidates(layer, num_rows, promotes=promotes)
    }
    tasks = list(distinct.values())
    with multiprocessing.get_context("spawn").Pool(NUM_WORKERS) as pool:
        pool.map(_compile, [tasks[start::NUM_WORKERS] for start in range(NUM_WORKERS)], chunksize=1)
    print(f"{len(tasks)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)


class Bench:
    """One layer's weights, and what was measured over them."""

    def __init__(self, layer: Layer, table: ResultTable, *, promotes: bool) -> None:
        self.layer, self.table, self.promotes = layer, table, promotes
        num_beside = NUM_BESIDE if layer.name == "in_proj" else 0
        shape = (layer.outputs + num_beside, layer.inputs)
        self.plain = [torch.randn(shape, device="cuda").bfloat16() * 0.02 for _ in range(layer.count)]
        self.matrices = [quantise_rtn(weight[: layer.outputs], "fp8") for weight in self.plain]
        self.pairs = [(m, w[layer.outputs :]) for m, w in zip(self.matrices, self.plain, strict=True)]
        self.times_us: dict[tuple[int, str], float] = {}
        self.best: dict[int, LinearConfig] = {}

    def measure(self, num_rows: int) -> None:
        """All columns at one number of rows."""
        kind, inputs = self.layer.kind, self.layer.inputs
        parts = torch.randn(NORM_PARTIALS, num_rows, inputs, device="cuda") / 2
        residual = torch.zeros(num_rows, inputs, device="cuda", dtype=torch.bfloat16)
        x = whole(_normed(parts, residual, is_rounded=False))
        given, weight = round_rows(x), self.matrices[0].dequantise(torch.float32)
        exact = _reference(kind, x, weight)
        rounded = _reference(kind, given.numbers_TI.float() * given.scales_T1, weight)
        time_it = partial(self._time, num_rows)
        time_it("bf16", partial(_own, kind, x), self.plain, _reference(kind, x, self.plain[0]))
        time_it("now", partial(_own, kind, x), self.matrices, exact, MOST_ERROR_OF_ROUNDING)
        took = {}
        for config in candidates(self.layer, num_rows, promotes=self.promotes):
            run = partial(_own, kind, given, config=config)
            took[config] = time_it(f"{config}", run, self.matrices, rounded, is_kept=False)
        order = sorted(took, key=lambda config: took[config])
        for config in order[:3]:
            print(f"  {self.layer.name} {num_rows} rows {took[config]:.2f} us: {config}", flush=True)
        best = self.best[num_rows] = order[0]
        runs = [("rounded x", x, best), ("x given", given, best)]
        if num_rows == UNPROMOTED_ROWS:
            runs.append(("unpromoted", given, replace(best, promotes=False)))
        for name, rows, config in runs:
            run = partial(_own, kind, rows, config=config)
            time_it(name, run, self.matrices, rounded, note=f"{config}", shows_error=True)
        run = partial(_library, kind, given)
        time_it("library", run, self.matrices, rounded, shows_error=True)
        if kind is not LinearKind.PARTIAL:
            self._measure_with_norm(num_rows, parts, residual, best)

    def _measure_with_norm(
        self, num_rows: int, parts: torch.Tensor, residual: torch.Tensor, best: LinearConfig
    ) -> None:
        """The norm and the layer, with the rows beside it that stay bf16 where it has some."""
        kind, time_it = self.layer.kind, partial(self._time, num_rows)
        is_read = reads_rounded(residual, self.matrices[:1], is_gated=kind is LinearKind.GATED)
        x = whole(_normed(parts, residual, is_rounded=False))
        dequantised = self.matrices[0].dequantise(torch.float32)
        exact = _reference(kind, x, torch.cat([dequantised, self.pairs[0][1].float()]))

        def plain(weight: torch.Tensor) -> torch.Tensor:
            return _own(kind, _normed(parts, residual, is_rounded=False), weight)

        def now(pair: tuple[QuantisedMatrix, torch.Tensor]) -> torch.Tensor:
            x = _normed(parts, residual, is_rounded=is_read)
            return linear_beside(x, pair) if len(pair[1]) else _own(kind, x, pair[0])

        def own(pair: tuple[QuantisedMatrix, torch.Tensor]) -> torch.Tensor:
            x = _normed(parts, residual, is_rounded=True)
            return _with_beside(x, *pair, best) if len(pair[1]) else _own(kind, x, pair[0], best)

        def library(pair: tuple[QuantisedMatrix, torch.Tensor]) -> torch.Tensor:
            x, (matrix, beside) = _normed(parts, residual, is_rounded=True), pair
            if not len(beside):
                return _library(kind, x, matrix)
            y = residual.new_empty(num_rows, len(matrix.values) + len(beside))
            library_linear(x, matrix, out=y[:, : -len(beside)])
            linear(x, beside, out=y[:, -len(beside) :])
            return y

        time_it("norm bf16", plain, self.plain, _reference(kind, x, self.plain[0]))
        for name, run in (("norm now", now), ("norm rounded", own), ("norm library", library)):
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
            self.table.add(shape, timing, self.layer.count, num_bytes, error, f"fp8 {name} {note}".strip())
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
                "rounded": f"LinearConfig{tuple(vars(config).values())}",
                "library": "None",
                "now": "as it is",
            }
            seen = ", ".join(f"{which} {cost:.2f}" for which, cost in costs.items())
            lines.append(f"        {rows}: {shown[winner]},  # {seen}")
        size = f'("fp8", ({self.layer.outputs}, {self.layer.inputs}))'
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
    parser.add_argument("--unpromoted", action="store_true")
    chosen = parser.parse_args()
    layers = [layer for layer in LAYERS if layer.name in chosen.layers]
    torch.manual_seed(0)
    _compile_all(layers, chosen.rows, promotes=not chosen.unpromoted)
    table = ResultTable("rounded_linear", prints_rows=False)
    benches = []
    for layer in layers:
        begun = time.monotonic()
        bench = Bench(layer, table, promotes=not chosen.unpromoted)
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
