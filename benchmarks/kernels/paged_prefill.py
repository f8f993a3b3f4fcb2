"""Times attention of prompt chunks over KV pages at the 4B shape: 8 layers, 16/4 heads of 256.

    python benchmarks/kernels/paged_prefill.py [--tune]

Prediction: long prompts are bound by arithmetic, 4 * heads * width flops for each token and key it
sees; 500 of the 780 TFLOP/s that large bf16 products reach. Few tokens behind a long past and
drafts are bound by reading the past's keys and values once. Pages are scattered over the pool.
`--tune` tries other cuts.
"""

from __future__ import annotations

import argparse
import random
from functools import partial

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.paged_attention import AttentionChunks, choose_tile_tokens, chunk_tiles
from kiln_nn.kernels.paged_attention.triton_prefill import PrefillConfig, paged_chunk_attention

LAYERS, HEADS, KV_HEADS, HEAD_DIM, PAGE_TOKENS = 8, 16, 4, 256, 16
SCALE = HEAD_DIM**-0.5
LEAST_ROTATED_BYTES = 256 * 2**20
MOST_SETS = 16
CHECKED_TOKENS = 24
# Name, chunks as (new tokens, context), format of the cache.
CASES: list[tuple[str, list[tuple[int, int]], torch.dtype]] = [
    ("prompt of 8192", [(8192, 8192)], torch.bfloat16),
    ("prompt of 32768", [(32768, 32768)], torch.bfloat16),
    ("8 prompts of 1024", [(1024, 1024)] * 8, torch.bfloat16),
    ("prompt of 8192, fp8", [(8192, 8192)], torch.float8_e4m3fn),
    ("64 new behind 4096", [(64, 4160)], torch.bfloat16),
    ("64 x 16 new", [(16, 16)] * 64, torch.bfloat16),
    ("256 new", [(256, 256)], torch.bfloat16),
    ("64 x 4 drafts behind 1024", [(4, 1028)] * 64, torch.bfloat16),
    ("64 x 8 drafts behind 1024", [(8, 1032)] * 64, torch.bfloat16),
    ("64 x 4 drafts behind 4096", [(4, 4100)] * 64, torch.bfloat16),
    ("64 x 4 drafts behind 4096, fp8", [(4, 4100)] * 64, torch.float8_e4m3fn),
]


class Inputs:
    """Chunks of several sequences; several sets of tensors where one would stay in the L2 cache."""

    def __init__(self, chunks: list[tuple[int, int]], cache_dtype: torch.dtype) -> None:
        self.new, self.contexts = [new for new, _ in chunks], [context for _, context in chunks]
        pages_of = [-(-context // PAGE_TOKENS) for context in self.contexts]
        set_bytes = 2 * sum(self.contexts) * KV_HEADS * HEAD_DIM * cache_dtype.itemsize
        self.num_sets = min(MOST_SETS, -(-LEAST_ROTATED_BYTES // set_bytes))
        shape = (sum(pages_of), PAGE_TOKENS, KV_HEADS, HEAD_DIM)

        def cache() -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(cache_dtype)

        self.caches = [(cache(), cache()) for _ in range(self.num_sets)]
        table = torch.zeros(len(chunks), max(pages_of), dtype=torch.int32)
        for row, pages in enumerate(torch.randperm(shape[0]).split(pages_of)):
            table[row, : len(pages)] = pages.int()
        self.table = table.cuda()
        self.rows = torch.arange(len(chunks), device="cuda", dtype=torch.int32)
        q_and_gate = torch.randn(sum(self.new), HEADS, 2, HEAD_DIM, device="cuda").bfloat16()
        self.q, self.gate = q_and_gate[:, :, 0].contiguous(), q_and_gate[:, :, 1]
        self.bounds = [0]
        for new in self.new:
            self.bounds.append(self.bounds[-1] + new)
        # A token at position p sees p + 1 keys.
        num_scores = sum(new * context - new * (new - 1) // 2 for new, context in chunks)
        self.flops = 4 * LAYERS * HEADS * HEAD_DIM * num_scores
        self.num_bytes = LAYERS * (set_bytes + 3 * self.q.nbytes)

    def chunks(self, tile_tokens: int) -> AttentionChunks:
        tiles = chunk_tiles(self.new, self.contexts, tile_tokens)
        lists = (self.bounds, self.contexts, *tiles)
        return AttentionChunks(
            *(torch.tensor(x, device="cuda", dtype=torch.int32) for x in lists), tile_tokens
        )

    def call(self, index: int, chunks: AttentionChunks, config: PrefillConfig | None) -> torch.Tensor:
        return paged_chunk_attention(
            self.q,
            *self.caches[index],
            self.table,
            chunks,
            SCALE,
            gate_THD=self.gate,
            table_rows_N=self.rows,
            config=config,
        )

    def error(self, chunks: AttentionChunks, config: PrefillConfig | None) -> float:
        """Of some tokens of the first set against float64, the first and last of a chunk among them."""
        out, worst = self.call(0, chunks, config), 0.0
        chosen = {(0, 0), (len(self.new) - 1, self.new[-1] - 1)}
        while len(chosen) < min(CHECKED_TOKENS, sum(self.new)):
            chunk = random.randrange(len(self.new))
            chosen.add((chunk, random.randrange(self.new[chunk])))
        for chunk, token in chosen:
            length = self.contexts[chunk] - self.new[chunk] + token + 1
            pages = self.table[chunk, : -(-length // PAGE_TOKENS)].long()
            k, v = (
                cache.view(torch.uint8)[pages].view(cache.dtype).flatten(0, 1)[:length].double()
                for cache in self.caches[0]
            )
            row = self.bounds[chunk] + token
            q = self.q[row].double().view(KV_HEADS, -1, HEAD_DIM)
            shares = (torch.einsum("hgd,thd->hgt", q, k) * SCALE).softmax(-1)
            expected = torch.einsum("hgt,thd->hgd", shares, v).flatten(0, 1)
            worst = max(worst, relative_error(out[row], expected * torch.sigmoid(self.gate[row].double())))
        return worst


def run(
    table: ResultTable, name: str, inputs: Inputs, tile_tokens: int, config: PrefillConfig | None
) -> None:
    """Measure one case with one cut; None is the one the kernel would choose."""
    chunks = inputs.chunks(tile_tokens)
    error = inputs.error(chunks, config)
    timing = time_calls([partial(inputs.call, index, chunks, config) for index in range(inputs.num_sets)])
    tflops = inputs.flops / (timing.p50_ms * LAYERS) / 1e9
    note = f"{tflops:.0f} TFLOP/s, tiles of {tile_tokens}, {config or 'chosen'}"
    table.add(f"chunks, 8 layers, {name}", timing, LAYERS, inputs.num_bytes, error, note)


def tuned(tile_tokens: int) -> list[PrefillConfig]:
    """Cuts worth trying for tiles of so many tokens."""
    if tile_tokens == 32:
        return [PrefillConfig(64, 1, 8, 3), PrefillConfig(64, 1, 8, 2), PrefillConfig(32, 1, 8, 5)]
    if tile_tokens == 16:
        return [
            PrefillConfig(keys, parts, 4, stages)
            for keys, stages in ((64, 2), (32, 3), (64, 3))
            for parts in (1, 4, 8, 16)
        ]
    return [
        PrefillConfig(keys, parts, 4, stages)
        for keys, stages in ((32, 5), (64, 5), (32, 7))
        for parts in (4, 8)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="try other cuts")
    options = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    table = ResultTable("paged_prefill")
    for name, chunks, cache_dtype in CASES:
        inputs = Inputs(chunks, cache_dtype)
        tile_tokens = choose_tile_tokens(inputs.new)
        run(table, name, inputs, tile_tokens, None)
        for config in tuned(tile_tokens) if options.tune else ():
            run(table, name, inputs, tile_tokens, config)


if __name__ == "__main__":
    main()
