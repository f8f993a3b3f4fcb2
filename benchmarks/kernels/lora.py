"""Times LoRA at the 4B shape: every linear layer of a step's 32 layers, each with tables of its own.

    python benchmarks/kernels/lora.py

A step reads A and B of the adapters in it once and adds to the outputs of four fused linear layers
in each decoder layer. Prediction at batch 64 with 8 adapters of rank 16: 0.53 GB of tables and 0.37 GB
of x and y, 0.21 ms at copy speed, against 256 launches: at 2.5 µs from the end of one to the end
of the next, 0.64 ms. So the launches decide, and "added to the linear layers" counts: the time of the
linear layers with adapters, in the engine's order, less that without.

Errors are those of what is added, against float64.
"""

from __future__ import annotations

from functools import partial

import torch
from measure import ResultTable, Timing, relative_error, time_calls

from kiln_nn.kernels.linear import linear
from kiln_nn.kernels.lora import (
    PREFILL_TILE_TOKENS,
    AdapterUse,
    LoraRows,
    RowsShape,
    TokenGroup,
    lora_add_,
    lora_shrink,
    pack_groups,
)
from kiln_nn.kernels.lora.reference import lora_add_reference_

NUM_LAYERS, HIDDEN, INTERMEDIATE, MIXED = 32, 2560, 9216, 4096
# Inputs, ends of the modules' outputs.
IN_PROJ = (HIDDEN, (0, 8192, 12288, 12320, 12352))
QKV_PROJ = (HIDDEN, (0, 8192, 9216, 10240))
OUT_PROJ = (MIXED, (0, HIDDEN))
GATE_UP = (HIDDEN, (0, INTERMEDIATE, 2 * INTERMEDIATE))
DOWN = (INTERMEDIATE, (0, HIDDEN))
LINEARS = [
    linear
    for layer in range(NUM_LAYERS)
    for linear in (QKV_PROJ if layer % 4 == 3 else IN_PROJ, OUT_PROJ, GATE_UP, DOWN)
]
SCALE = 2.0


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Adapters:
    """A and B of every linear layer."""

    def __init__(self, num_adapters: int, rank: int, table_rank: int) -> None:
        self.num_adapters, self.rank = num_adapters, rank
        self.tables = [
            (
                _draw(num_adapters, (len(bounds) - 1) * table_rank, inputs) / inputs**0.5,
                _draw(num_adapters, table_rank, bounds[-1]),
            )
            for inputs, bounds in LINEARS
        ]

    def groups(self, num_tokens: int) -> list[TokenGroup]:
        """Tokens dealt over the adapters in turn."""
        return [
            TokenGroup(range(index, num_tokens, self.num_adapters), (AdapterUse(index, self.rank, SCALE),))
            for index in range(self.num_adapters)
        ]

    def decode_rows(self, num_tokens: int) -> LoraRows:
        """As a CUDA graph has them, with room for any mixture."""
        shape = RowsShape.for_any(num_tokens, self.num_adapters)
        buffer = torch.zeros(shape.num_words, dtype=torch.int32)
        words = torch.from_numpy(pack_groups(self.groups(num_tokens), shape))
        buffer[: len(words)] = words
        return LoraRows.over(buffer.cuda(), shape)

    def prefill_rows(self, num_tokens: int) -> LoraRows:
        return LoraRows.of(self.groups(num_tokens), PREFILL_TILE_TOKENS, "cuda")

    def num_bytes(self, num_tokens: int) -> int:
        """Tables, x once, y once in and once out."""
        used = min(num_tokens, self.num_adapters)
        total = 0
        for inputs, bounds in LINEARS:
            total += used * self.rank * ((len(bounds) - 1) * inputs + bounds[-1])
            total += num_tokens * (inputs + 2 * bounds[-1])
        return 2 * total

    def error(self, rows: LoraRows, num_tokens: int) -> float:
        """Largest over one layer of each kind."""
        errors = []
        for (inputs, bounds), (a, b) in list(zip(LINEARS, self.tables, strict=True))[8:16]:
            x, y = _draw(num_tokens, inputs), torch.zeros(num_tokens, bounds[-1], device="cuda")
            exact = y.double()
            lora_add_reference_(exact, x.double(), a.double(), b.double(), rows, bounds)
            lora_add_(y, x, a, b, rows, bounds)
            errors.append(relative_error(y, exact))
        return max(errors)


def lora_calls(adapters: Adapters, rows: LoraRows, num_tokens: int) -> list[partial]:
    return [
        partial(lora_add_, _draw(num_tokens, bounds[-1]), _draw(num_tokens, inputs), a, b, rows, bounds)
        for (inputs, bounds), (a, b) in zip(LINEARS, adapters.tables, strict=True)
    ]


def linear_calls(calls: list[partial]) -> list[partial]:
    """The base model's product that belongs to each of the calls, into the same y."""
    products = []
    for call in calls:
        y_TO, x_TI = call.args[:2]
        products.append(partial(linear, x_TI, _draw(y_TO.shape[1], x_TI.shape[1]), out=y_TO))
    return products


def adapted(product: partial, call: partial) -> None:
    """A linear layer as the engine runs it: the adapters' first half, the base product, their second."""
    _, x_TI, a_SQI, _, rows, bounds = call.args
    shrunk = lora_shrink(x_TI, a_SQI, rows, bounds)
    product(shows_producers=True)
    call(shrunk=shrunk)


def measure(table: ResultTable, name: str, adapters: Adapters, rows: LoraRows, num_tokens: int) -> None:
    error, num_bytes = adapters.error(rows, num_tokens), adapters.num_bytes(num_tokens)
    calls = lora_calls(adapters, rows, num_tokens)
    table.add(f"{name}, by itself", time_calls(calls), len(LINEARS), num_bytes, error)
    products = linear_calls(calls)
    without = time_calls(products)
    both = time_calls([partial(adapted, *pair) for pair in zip(products, calls, strict=True)])
    added = Timing(*(b - w for b, w in zip(vars(both).values(), vars(without).values(), strict=True)))
    note = f"linear layers alone {without.p50_ms * len(LINEARS):.3f} ms"
    table.add(f"{name}, added to the linear layers", added, len(LINEARS), num_bytes, error, note)


def main() -> None:
    torch.manual_seed(0)
    table = ResultTable("lora")
    for num_adapters, rank, table_rank, batches in (
        (8, 16, 16, (1, 64, 256)),
        (8, 16, 64, (64,)),
        (8, 64, 64, (64,)),
        (1, 16, 16, (64,)),
    ):
        adapters = Adapters(num_adapters, rank, table_rank)
        kind = f"{num_adapters} adapters of rank {rank} in tables of {table_rank}"
        for num_tokens in batches:
            measure(
                table, f"batch {num_tokens}, {kind}", adapters, adapters.decode_rows(num_tokens), num_tokens
            )
        if num_adapters == 8 and table_rank == 16:
            measure(table, f"prefill of 2048, {kind}", adapters, adapters.prefill_rows(2048), 2048)
        del adapters
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
