"""Times decode attention over KV pages at the 4B shape: 8 layers, 16/4 heads of 256, 16-token pages.

    python benchmarks/kernels/paged_decode.py [--tune] [--mixed] [--lines]

Prediction: 32 KiB of KV per context token and row across the layers, and little besides.
Pages are scattered over the pool. Small batches rotate among caches larger than the L2: in a step
the weights between two layers' attention push everything out of it. `--tune` tries other cuts;
`--mixed` adds one long row among short ones; `--lines` rows of which four are one sequence's, the last
sampled token and three drafts, sharing the reading of it and each on its own.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.paged_attention import triton_decode
from kiln_nn.kernels.paged_attention.triton_decode import DecodeConfig, paged_decode_attention

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 8, 16, 4, 256, 16
SCALE = HEAD_DIM**-0.5
LEAST_ROTATED_BYTES = 256 * 2**20
TABLE_TOKENS = 8192  # what the graph's page table could hold
CASES = [(1, 512), (1, 8000), (4, 1024), (16, 1024), (64, 1024), (64, 4096), (256, 1024)]
TUNE_CASES = [(1, 512), (16, 1024), (64, 1024), (256, 1024)]
LINES_CASES = [(1, 1024), (16, 1024), (64, 1024)]
TUNE = [
    DecodeConfig(32, 256, 4, 4, 7),
    DecodeConfig(32, 128, 8, 4, 5),
    DecodeConfig(32, 512, 4, 4, 5),
    DecodeConfig(32, 64, 16, 4, 5),
    DecodeConfig(16, 256, 4, 4, 7),
    DecodeConfig(64, 256, 4, 4, 5),
    DecodeConfig(64, 256, 4, 8, 3),
]


class Inputs:
    """Inputs of one batch for the layers of one step, or of several steps where that is little."""

    def __init__(
        self, lengths: list[int], cache_dtype: torch.dtype, lines: int = 1, *, shares: bool = True
    ) -> None:
        """`lines` successive rows of each sequence, of which the last has its whole length."""
        num_rows = len(lengths) * lines
        self.rows_per_sequence = lines if shares else 1
        pages_of = [-(-length // PAGE_TOKENS) for length in lengths]
        shape = (sum(pages_of), PAGE_TOKENS, KV_HEADS, HEAD_DIM)
        kv_bytes = 2 * LAYERS * sum(lengths) * KV_HEADS * HEAD_DIM * cache_dtype.itemsize
        self.num_layers = LAYERS * -(-LEAST_ROTATED_BYTES // kv_bytes)
        draws = torch.randn(2 * self.num_layers, 1, *shape[1:], device="cuda")

        def cache(index: int) -> torch.Tensor:
            # Every page differs in sign pattern and size; drawing gigabytes would take longer.
            pages = torch.randn(shape[0], 1, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            return (pages * draws[index].bfloat16()).to(cache_dtype)

        self.caches = [(cache(2 * layer), cache(2 * layer + 1)) for layer in range(self.num_layers)]
        self.table = torch.zeros(len(lengths), TABLE_TOKENS // PAGE_TOKENS, dtype=torch.int32)
        ids = torch.randperm(shape[0])
        for row, pages in enumerate(ids.split(pages_of)):
            self.table[row, : len(pages)] = pages.int()
        self.table = self.table.cuda()
        ends = [length - back for length in lengths for back in reversed(range(lines))]
        self.lengths = torch.tensor(ends, dtype=torch.int32).cuda()
        self.rows = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lines).cuda()
        q_and_gate = torch.randn(self.num_layers, num_rows, HEADS, 2, HEAD_DIM, device="cuda").bfloat16()
        self.q = q_and_gate[:, :, :, 0].contiguous()
        self.gate = q_and_gate[:, :, :, 1]
        queries_gates_outputs = 3 * LAYERS * num_rows * HEADS * HEAD_DIM * self.q.element_size()
        self.num_bytes = kv_bytes + queries_gates_outputs

    def call(self, layer: int, config: DecodeConfig | None) -> torch.Tensor:
        arguments = (self.q[layer], *self.caches[layer], self.table, self.lengths, SCALE)
        return paged_decode_attention(
            *arguments,
            gate_RHD=self.gate[layer],
            table_rows_R=self.rows,
            rows_per_sequence=self.rows_per_sequence,
            config=config,
        )

    def error(self, config: DecodeConfig | None) -> float:
        """Against float64, first and last row of the last layer."""
        out, (k_cache, v_cache) = self.call(self.num_layers - 1, config), self.caches[-1]
        worst = 0.0
        for row in {0, len(self.lengths) - 1}:
            length = int(self.lengths[row])
            pages = self.table[self.rows[row], : -(-length // PAGE_TOKENS)].long()
            k, v = (
                cache.view(torch.uint8)[pages].view(cache.dtype).flatten(0, 1)[:length].double()
                for cache in (k_cache, v_cache)
            )
            q = self.q[-1, row].double().view(KV_HEADS, -1, HEAD_DIM)
            shares = (torch.einsum("hgd,thd->hgt", q, k) * SCALE).softmax(-1)
            expected = torch.einsum("hgt,thd->hgd", shares, v).flatten(0, 1)
            expected = expected * torch.sigmoid(self.gate[-1, row].double())
            worst = max(worst, relative_error(out[row], expected))
        return worst


def run(
    table: ResultTable,
    name: str,
    lengths: list[int],
    cache_dtype: torch.dtype,
    configs: list,
    lines: int = 1,
    *,
    shares: bool = True,
) -> None:
    """Measure one batch with each configuration; None is the one the kernel would choose."""
    inputs = Inputs(lengths, cache_dtype, lines, shares=shares)
    num_runs = len(inputs.lengths) // inputs.rows_per_sequence
    for config in configs:
        calls = [partial(inputs.call, layer, config) for layer in range(inputs.num_layers)]
        chosen = config or triton_decode.choose_config(num_runs, KV_HEADS, torch.bfloat16, inputs.q.device)
        cut = (
            f"tile={chosen.tile_tokens} least={chosen.least_part_tokens} parts={chosen.num_parts}"
            f" warps={chosen.num_warps} stages={chosen.num_stages}{'' if config else ' (chosen)'}"
        )
        table.add(name, time_calls(calls), LAYERS, inputs.num_bytes, inputs.error(config), cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="try other cuts at a few shapes")
    parser.add_argument("--mixed", action="store_true", help="add one long row among short ones")
    parser.add_argument("--lines", action="store_true", help="add rows of one sequence, with drafts")
    options = parser.parse_args()
    torch.manual_seed(0)
    table = ResultTable("paged_decode")
    for num_rows, length in CASES:
        name = f"attention, 8 layers, batch {num_rows}, context {length}"
        run(table, name + ", bf16", [length] * num_rows, torch.bfloat16, [None])
    for length in (1024, 4096):
        name = f"attention, 8 layers, batch 64, context {length}, fp8"
        run(table, name, [length] * 64, torch.float8_e4m3fn, [None])
    if options.mixed:
        name = "attention, 8 layers, batch 64, one of 8000 among 512, bf16"
        run(table, name, [8000] + [512] * 63, torch.bfloat16, [None])
    if options.lines:
        for (num_rows, length), lines in product(LINES_CASES, (2, 4)):
            for shares in (True, False):
                name = f"attention, 8 layers, batch {num_rows} of {lines} lines, context {length}, bf16"
                name += "" if shares else ", each alone"
                run(table, name, [length] * num_rows, torch.bfloat16, [None], lines, shares=shares)
    if options.tune:
        for num_rows, length in TUNE_CASES:
            name = f"attention, 8 layers, batch {num_rows}, context {length}, bf16"
            run(table, name, [length] * num_rows, torch.bfloat16, TUNE)


if __name__ == "__main__":
    main()
