"""Times linear layers over quantised weights at the 4B shape against bf16, and finds their best tiles.

    python benchmarks/kernels/quantised_linear.py [--rows 1 64] [--layers down_proj] [--schemes int4]
        [--kernel registers]

For each big layer and number of rows, microseconds a layer in one CUDA graph over all the model's
distinct weights of that layer (with SwiGLU, or with the residual's norm, where the model has them):
`bf16` as the engine computes it today; `own` the best of the candidates below; `library` the product
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
from itertools import product

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.linear import (
    LinearConfig,
    RegisterConfig,
    SpecialisedConfig,
    Weight,
    linear,
    linear_partials,
    linear_swiglu,
)
from kiln_nn.kernels.linear.choice_quantised import WEIGHT_BITS, choose
from kiln_nn.kernels.linear.config import LinearKind, Tiling, weight_rows
from kiln_nn.kernels.linear.quantised import library_linear
from kiln_nn.kernels.quantised import FP8, QuantisedMatrix, Scheme, quantise_rtn
from kiln_nn.kernels.rms_norm import add_rms_norm
from kiln_nn.kernels.swiglu import swiglu

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
SCHEMES: tuple[Scheme, ...] = ("int4", "fp8")
FLOPS_PER_S = 780e12
KERNEL_S = 1e-6
MOST_ERROR = {"own": 6e-3, "library": 5e-2, "tinygemm": 3e-2, "bf16": 6e-3}
NUM_WORKERS = 14
MOST_ROWS_IN_REGISTERS = 32
FEWEST_SPECIALISED_ROWS = 32
MOST_SPECIALISED = 6
MULTIPROCESSORS = 132
# Of layers whose inputs are not split: stripes, groups ahead, registers, and whether weights are staged.
WHOLE_ROWS: dict[Scheme, list[tuple[int, int, int, bool]]] = {
    "int4": [
        (2, 3, 128, False),
        (2, 2, 96, False),
        (1, 3, 96, False),
        (1, 2, 80, False),
        (2, 5, 0, True),
        (2, 3, 96, True),
        (2, 4, 96, True),
        (2, 3, 80, True),
        (1, 5, 0, True),
        (1, 4, 0, True),
        (1, 3, 0, True),
        (1, 3, 64, True),
    ],
    "fp8": [
        (1, 3, 96, False),
        (1, 5, 0, False),
        (2, 2, 0, False),
        (2, 3, 0, False),
        (1, 5, 0, True),
        (1, 4, 0, True),
        (1, 3, 0, True),
        (1, 2, 0, True),
        (2, 4, 0, True),
        (2, 3, 0, True),
        (2, 2, 0, True),
    ],
}
SHARED_MEMORY_BYTES = 227 * 1024
HEAD_OUTPUTS = 100_000  # more outputs than any layer but the head, whose results are float32


@dataclass(frozen=True)
class Layer:
    """One of the model's big linear layers; `outputs` are the weight's rows."""

    name: str
    outputs: int
    inputs: int
    kind: LinearKind
    count: int


LAYERS = (
    Layer("in_proj", 12_288, 2560, LinearKind.PLAIN, 24),
    Layer("qkv_proj", 10_240, 2560, LinearKind.PLAIN, 8),
    Layer("out_proj", 2560, 4096, LinearKind.PARTIAL, 32),
    Layer("gate_up", 18_432, 2560, LinearKind.GATED, 32),
    Layer("down_proj", 2560, 9216, LinearKind.PARTIAL, 32),
    Layer("head", 248_320, 2560, LinearKind.PLAIN, 1),
)


def _candidates(scheme: Scheme, layer: Layer, num_rows: int, kernel: str) -> list[Tiling]:
    """Tiles to try of both kernels, or of the one with a ring or without."""
    found: list[Tiling] = []
    if kernel in ("all", "ring"):
        found += _ring_candidates(scheme, layer, num_rows)
    if kernel in ("all", "registers") and num_rows <= MOST_ROWS_IN_REGISTERS:
        found += _register_candidates(scheme, layer)
    if kernel in ("all", "specialised") and scheme == "int4" and num_rows >= FEWEST_SPECIALISED_ROWS:
        found += _specialised_candidates(layer, num_rows)
    return found


def _specialised_candidates(layer: Layer, num_rows: int) -> list[SpecialisedConfig]:
    """The tiles that should be fastest, by what a block of 128 inputs costs and by how programs fill waves."""
    halves = 2 if layer.kind is LinearKind.GATED else 1
    most = min(256, 1 << (num_rows - 1).bit_length())
    costs: dict[SpecialisedConfig, float] = {}
    shapes = product(sorted({most, most // 2, most // 4}), (2, 3), (1, 3), (64, 48))
    for tokens, groups, num_high, rows in shapes:
        # More sums are more than two groups, or three, have registers for.
        if tokens < 32 or tokens * num_high > {2: 256, 3: 192}[groups]:
            continue
        num_tiles = -(-layer.outputs // (rows * groups * num_high)) * -(-num_rows // tokens)
        for splits in range(1, 9 if layer.kind is LinearKind.PARTIAL else 2):
            config = SpecialisedConfig(tokens, rows // halves, groups, num_high, splits, 8)
            try:
                config = config.fit(layer.inputs, 2, SHARED_MEMORY_BYTES)
            except ValueError:
                continue
            num_blocks = -(-layer.inputs // 128 // splits)
            if num_blocks * (splits - 1) < layer.inputs // 128:
                costs[config] = _cycles(config, rows, num_blocks, num_tiles, num_rows)
    return sorted(costs, key=costs.__getitem__)[:MOST_SPECIALISED]


def _cycles(config: SpecialisedConfig, rows: int, num_blocks: int, num_tiles: int, num_rows: int) -> float:
    """A guess: products, instructions to unpack or bytes at 30 a cycle; each wave's start and end; sums."""
    num_high = config.groups * config.tiles
    num_bytes = num_high * rows * 64 + 256 * config.tokens
    block = max(4 * num_high * config.tokens, 215 * num_high, num_bytes / 30)
    waves = -(-num_tiles * config.splits // MULTIPROCESSORS)
    return waves * (num_blocks * block + 5000) + 3000 * config.splits * num_rows / 256


def _register_candidates(scheme: Scheme, layer: Layer) -> list[RegisterConfig]:
    """Splits and warps that leave none without work, and what so many registers or so much memory hold."""
    num_groups = layer.inputs // 128
    stripe = 8 if layer.kind is LinearKind.GATED else 16
    if layer.kind is not LinearKind.PARTIAL:
        return [
            RegisterConfig(stripe * stripes, 1, 4, ahead, registers, is_staged)
            for stripes, ahead, registers, is_staged in WHOLE_ROWS[scheme]
        ]
    found = []
    for stripes, warps, splits in product((1, 2, 4), (4, 8), range(1, 10)):
        steps, rest = divmod(num_groups, splits * warps)
        num_warps = layer.outputs // (stripe * stripes) * splits * warps
        words = stripes * (8 if scheme == "int4" else 16)  # of a thread, for a group
        if rest or not 2 <= steps <= 6 or not 9 <= num_warps / MULTIPROCESSORS <= 32:
            continue
        if words * steps <= 64:
            found.append(RegisterConfig(stripe * stripes, splits, warps, steps))
        if words * steps * warps * 128 <= 56 * 1024:
            found.append(RegisterConfig(stripe * stripes, splits, warps, steps, is_staged=True))
    return found


def _ring_candidates(scheme: Scheme, layer: Layer, num_rows: int) -> list[LinearConfig]:
    """Tiles to try: rows of a program, warps, inputs of a slot and kilobytes of its ring."""
    if num_rows <= 16:
        inputs = 256 if scheme == "int4" else 128
        shapes = [
            (64, 4, inputs, 72),
            (64, 4, inputs, 108),
            (64, 4, 2 * inputs, 72),
            (64, 4, 2 * inputs, 108),
        ]
        shapes += [(128, 4, inputs, 108), (128, 8, inputs, 108)]
    elif num_rows <= 128:
        shapes = [
            (64, 4, 128, 96),
            (96, 8, 128, 104),
            (96, 8, 128, 190),
            (128, 8, 128, 104),
            (128, 8, 128, 190),
        ]
    else:
        shapes = [(64, 4, 128, 190), (128, 8, 128, 104), (128, 8, 128, 190)]
    # More than 128 tokens want so many sums that four-bit weights are scaled first.
    most = 1 << (num_rows - 1).bit_length()
    tiles = {max(8, min(most, 256)), max(8, min(most, 128))} if num_rows <= 256 else {256}
    found = {}
    for tokens, (rows, warps, inputs, ring_kib) in product(sorted(tiles), shapes):
        outputs = rows // 2 if layer.kind is LinearKind.GATED else rows
        tile_rows = max(16 * warps, weight_rows(outputs, layer.kind))
        if tile_rows * tokens > 128 * 128 * (1 if scheme == "int4" and tokens == 128 else 2):
            continue
        line = inputs * (WEIGHT_BITS[scheme] * tile_rows + 16 * tokens)
        stages = min(12, ring_kib * 1024 * 8 // line)
        if stages < 2:
            continue
        for splits in _splits(layer, outputs, inputs, num_rows):
            config = LinearConfig(tokens, outputs, inputs, splits, warps, stages)
            found[config] = None
    return list(found)


def _rows_of(layer: Layer, all_rows: Iterable[int]) -> list[int]:
    """The head sees one row of a sequence, not its prompt."""
    return [rows for rows in all_rows if rows <= 256 or layer.outputs < HEAD_OUTPUTS]


def _splits(layer: Layer, outputs: int, inputs: int, num_rows: int) -> list[int]:
    if layer.kind is not LinearKind.PARTIAL:
        return [1]
    num_blocks = -(-layer.inputs // inputs)
    shares = (0.5, 1) if num_rows > 128 else (1, 2)
    num_tiles = -(-layer.outputs // outputs) * -(-num_rows // 256)
    wanted = {max(1, round(share * 132 / num_tiles)) for share in shares}
    return sorted({-(-num_blocks // -(-num_blocks // splits)) for splits in wanted})


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
        for config in _candidates(scheme, layer, num_rows, kernel)
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
            for config in _candidates(scheme, self.layer, num_rows, self.kernel):
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
