"""Times the DeltaNet decode step at the 4B shape: 24 layers, 16/32 heads of 128, 16-token pages.

    python benchmarks/kernels/delta_decode.py [--tune]

Prediction for bf16 states at batch 256: 8.8 GB a step (7.7 GB states, rings and commits, the rest
convolution, z and output), 2.05 ms at copy speed.

A figure is the mean over a page: input sets in each of which every row stands one token later, so
that one row in sixteen commits. Small batches take other slots in each set, which keeps
the states out of the L2 cache as the weights between two layers do in a step. Before timing, 200
tokens are decoded and compared with float64. `--tune` tries other configurations.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.reference import delta_decode_reference
from kiln_nn.kernels.delta_decode.triton import CONFIGS, StepConfig, delta_decode
from kiln_nn.kernels.gated_delta import DeltaRing

LAYERS, KEY_HEADS, HEADS, WIDTH, CONV_WIDTH, PAGE_TOKENS = 24, 16, 32, 128, 4, 16
CHANNELS = 2 * KEY_HEADS * WIDTH + HEADS * WIDTH
NUM_SLOTS = 256
BATCHES = (1, 16, 64, 256)
CHECKED_ROWS, CHECKED_TOKENS = 4, 200
TUNE = {
    torch.bfloat16: [
        StepConfig("wide", "bf16x3", 64, 3, 32, is_dependent=False),
        StepConfig("tall", "bf16x3", 64, 3, 32),
        StepConfig("wide", "bf16x3", 32, 3, 32, num_warps=2),
    ],
    torch.float32: [
        StepConfig("fma", "tf32x3", 16, 4, 16, is_dependent=False),
        StepConfig("fma", "tf32x3", 16, 4, 16, num_warps=2),
    ],
}


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _memory(num_slots: int, state_dtype: torch.dtype) -> DeltaMemory:
    """Full rings, so that any length may be read."""
    keys = _draw(num_slots, KEY_HEADS, PAGE_TOKENS, WIDTH, dtype=torch.float32)
    decays = torch.rand(num_slots, HEADS, PAGE_TOKENS, device="cuda").neg().cumsum(-1) / 8
    return DeltaMemory(
        _draw(num_slots, HEADS, WIDTH, WIDTH, dtype=state_dtype),
        DeltaRing(
            keys / keys.norm(dim=-1, keepdim=True),
            _draw(num_slots, HEADS, PAGE_TOKENS, WIDTH, dtype=torch.float32),
            decays,
        ),
        _draw(num_slots, CONV_WIDTH - 1 + PAGE_TOKENS, CHANNELS),
    )


def _weights() -> DeltaDecodeWeights:
    """Half-lives log-uniform between 1 and 4,096 tokens."""
    half_lives = 4096.0 ** torch.rand(HEADS, device="cuda")
    return DeltaDecodeWeights(
        conv_CW=_draw(CHANNELS, CONV_WIDTH) / 2,
        A_log_H=(math.log(2.0) / half_lives / math.log1p(math.e)).log(),
        dt_bias_H=torch.ones(HEADS, device="cuda"),
        norm_V=torch.ones(WIDTH, device="cuda"),
        norm_eps=1e-6,
    )


def _rows(slots: torch.Tensor, lengths: torch.Tensor) -> DeltaRows:
    slots, lengths = slots.cuda(), lengths.cuda()
    commits = torch.where(lengths == PAGE_TOKENS - 1, slots, NO_SLOT)
    return DeltaRows(slots, slots, lengths, commits)


def _tokens(num_rows: int) -> tuple[torch.Tensor, ...]:
    return (
        _draw(num_rows, CHANNELS),
        _draw(num_rows, HEADS) / 4,
        _draw(num_rows, HEADS),
        _draw(num_rows, HEADS, WIDTH),
    )


def bytes_per_step(num_rows: int, state_dtype: torch.dtype) -> int:
    """Mean over a page, all layers: what must be read and written, each thing once."""
    state = HEADS * WIDTH * WIDTH * state_dtype.itemsize
    ring_entry = (KEY_HEADS * WIDTH + HEADS * WIDTH + HEADS) * 4
    ring = ring_entry * ((PAGE_TOKENS - 1) / 2 + 1)
    # The window, the token and its copy into the ring; on a commit the tail.
    conv = CHANNELS * 2 * (CONV_WIDTH + 1 + (CONV_WIDTH - 1) / PAGE_TOKENS)
    others = 2 * 2 * HEADS * WIDTH + 2 * 2 * HEADS
    return int(LAYERS * num_rows * (state * (1 + 1 / PAGE_TOKENS) + ring + conv + others))


def _double(weights: DeltaDecodeWeights) -> DeltaDecodeWeights:
    tensors = (weights.conv_CW, weights.A_log_H, weights.dt_bias_H, weights.norm_V)
    return DeltaDecodeWeights(*(x.double() for x in tensors), weights.norm_eps)


def error_after_decoding(state_dtype: torch.dtype, config: StepConfig) -> float:
    """Of the last page of tokens, against float64 from the same start; pages fill in between."""
    memory, weights = _memory(CHECKED_ROWS, state_dtype), _weights()
    ring = memory.ring
    exact = DeltaMemory(
        memory.state_SHKV.double(),
        DeltaRing(ring.k_RhPK.double(), ring.u_RHPV.double(), ring.log_decay_RHP.double()),
        memory.conv_rows_SQC.double(),
    )
    slots, ages, outputs, expected = torch.arange(CHECKED_ROWS), torch.arange(CHECKED_ROWS) * 3, [], []
    exact_weights = _double(weights)
    for t in range(CHECKED_TOKENS):
        rows, (*tokens, z) = _rows(slots, (ages + t) % PAGE_TOKENS), _tokens(CHECKED_ROWS)
        tokens.append(z.float())  # whose format the output takes: float32 leaves the state's error
        out = delta_decode(memory, rows, weights, *tokens, config)
        reference = delta_decode_reference(exact, rows, exact_weights, *(x.double() for x in tokens))
        if t >= CHECKED_TOKENS - PAGE_TOKENS:
            outputs.append(out)
            expected.append(reference)
    return relative_error(torch.stack(outputs), torch.stack(expected))


class Inputs:
    """Slots of all layers, for every batch."""

    def __init__(self, state_dtype: torch.dtype) -> None:
        self.layers = [(_memory(NUM_SLOTS, state_dtype), _weights()) for _ in range(LAYERS)]

    def calls(self, num_rows: int, config: StepConfig) -> list[partial]:
        calls = []
        # From sixteen rows on every turn has all lengths.
        for turn in range(PAGE_TOKENS if num_rows < PAGE_TOKENS else 4):
            numbers = torch.arange(num_rows)
            rows = _rows((numbers + turn * num_rows) % NUM_SLOTS, (numbers + turn) % PAGE_TOKENS)
            tokens = _tokens(num_rows)
            calls += [
                partial(delta_decode, memory, rows, weights, *tokens, config)
                for memory, weights in self.layers
            ]
        return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try other configurations too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = ResultTable("delta_decode")
    for state_dtype, chosen in CONFIGS.items():
        inputs = Inputs(state_dtype)
        for config in [chosen, *(TUNE[state_dtype] if arguments.tune else [])]:
            error = error_after_decoding(state_dtype, config)
            batches = BATCHES if config is chosen else (1, 256)
            for num_rows in batches:
                timing = time_calls(inputs.calls(num_rows, config))
                shape = f"batch {num_rows}, {str(state_dtype).removeprefix('torch.')} state"
                num_bytes = bytes_per_step(num_rows, state_dtype)
                note = "" if config is chosen else str(config)
                table.add(shape, timing, LAYERS, num_bytes, error, note)
        del inputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
