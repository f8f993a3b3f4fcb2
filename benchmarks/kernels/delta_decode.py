"""Times the DeltaNet decode step at the 4B shape: 24 layers, 16/32 heads of 128, 16-token pages.

    python benchmarks/kernels/delta_decode.py [--tune]

A figure is a whole step: every layer's launches, one or two, and one that commits the full pages of all.
"mixed": the rows stand at all places of their pages, one in sixteen commits. "together": the rows
began together, the mean over the sixteen steps of a page. "page full": the last of those
alone, in which every row commits; no median of a run shows it. "2 lines", "4 lines": so many new tokens
per row with drafts among them, the rows at all places a ring may have then; one launch that folds
the full pages of all layers, and every layer's two.

Prediction for bf16 states at batch 256, mixed: 9.2 GB (6.4 GB states, 0.8 GB commits, 1.3 GB rings,
0.6 GB convolution), of which 1.1 GB are written: 2.1 ms at 4.4 TB/s. Batch 64 a quarter of
that and 24 times 2 us for launches that wait for each other.

The steps of a timing take other slots, which keeps the states out of the L2 cache as the weights
between two layers do in an engine's step. Before timing, 200 tokens are decoded and compared with
float64. `--tune` tries other configurations.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.reference import delta_decode_reference
from kiln_nn.kernels.delta_decode.triton import StepConfig, delta_decode
from kiln_nn.kernels.delta_decode.triton_commit import delta_commit
from kiln_nn.kernels.delta_decode.triton_fold import delta_fold
from kiln_nn.kernels.delta_decode.triton_verify import CONFIGS as VERIFY_CONFIGS
from kiln_nn.kernels.delta_decode.triton_verify import VerifyConfig, delta_verify
from kiln_nn.kernels.gated_delta import DeltaRing

LAYERS, KEY_HEADS, HEADS, WIDTH, CONV_WIDTH, PAGE_TOKENS = 24, 16, 32, 128, 4, 16
NUM_LINES = (2, 4)
CHANNELS = 2 * KEY_HEADS * WIDTH + HEADS * WIDTH
NUM_SLOTS = 256
BATCHES = (1, 16, 64, 256)
CHECKED_ROWS, CHECKED_TOKENS = 4, 200
TUNE = {
    torch.bfloat16: [
        StepConfig(True, 64, 3, num_key_warps=2),
        StepConfig(True, 64, 3, num_key_warps=2, most_rows_at_once=64),
        StepConfig(True, 64, 2, num_key_warps=2, max_registers=72, is_dependent=False),
        StepConfig(True, 32, 3, num_key_warps=2, max_registers=64),
        StepConfig(True, 128, 1, num_key_warps=2),
        StepConfig(True, 64, 3, num_key_warps=4),
    ],
    torch.float32: [
        StepConfig(False, 8, 6, num_warps=1, num_key_warps=2, most_rows_at_once=64),
        StepConfig(False, 16, 4, num_key_warps=2),
        StepConfig(False, 8, 6, num_warps=2),
    ],
}

_VERIFY = VERIFY_CONFIGS[torch.bfloat16]
VERIFY_TUNE = {
    torch.bfloat16: [
        replace(_VERIFY, num_stages=3),
        replace(_VERIFY, num_warps=2),
        replace(_VERIFY, num_key_warps=4),
        replace(_VERIFY, dot_form="tf32x3"),
        replace(_VERIFY, most_prefetched_rows=0),
    ],
    torch.float32: [],
}


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _memory(num_slots: int, state_dtype: torch.dtype, *layers: int, num_drafts: int = 0) -> DeltaMemory:
    """Full rings, so that any length may be read; with `layers` as first dimension."""
    slots, capacity = (*layers, num_slots), PAGE_TOKENS + num_drafts
    keys = _draw(*slots, KEY_HEADS, capacity, WIDTH, dtype=torch.float32)
    decays = torch.rand(*slots, HEADS, capacity, device="cuda").neg().cumsum(-1) / 8
    return DeltaMemory(
        _draw(*slots, HEADS, WIDTH, WIDTH, dtype=state_dtype),
        DeltaRing(
            keys.div_(keys.norm(dim=-1, keepdim=True)),
            _draw(*slots, HEADS, capacity, WIDTH, dtype=torch.float32),
            decays,
        ),
        _draw(*slots, CONV_WIDTH - 1 + capacity, CHANNELS),
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
    commits = torch.where(lengths >= PAGE_TOKENS - 1, slots, NO_SLOT)
    return DeltaRows(slots, slots, lengths, commits)


def _tokens(num_rows: int, *lines: int) -> tuple[torch.Tensor, ...]:
    return (
        _draw(num_rows, *lines, CHANNELS),
        _draw(num_rows, *lines, HEADS) / 4,
        _draw(num_rows, *lines, HEADS),
        _draw(num_rows, *lines, HEADS, WIDTH),
    )


def bytes_per_step(
    num_rows: int, state_dtype: torch.dtype, ring_length: float, commit_share: float, num_new: int = 1
) -> int:
    """All layers: what must be read and written, each thing once (a commit reads its state again)."""
    state = HEADS * WIDTH * WIDTH * state_dtype.itemsize
    ring_entry = (KEY_HEADS * WIDTH + HEADS * WIDTH + HEADS) * 4
    ring = ring_entry * (ring_length + num_new + PAGE_TOKENS * commit_share)
    # The window, the tokens and their copies into the ring; on a commit the tail, read and written.
    conv = CHANNELS * 2 * (CONV_WIDTH - 1 + 2 * num_new + 2 * (CONV_WIDTH - 1) * commit_share)
    others = 2 * num_new * (2 * HEADS * WIDTH + 2 * HEADS)
    return int(LAYERS * num_rows * (state * (1 + 2 * commit_share) + ring + conv + others))


def _double(weights: DeltaDecodeWeights) -> DeltaDecodeWeights:
    tensors = (weights.conv_CW, weights.A_log_H, weights.dt_bias_H, weights.norm_V)
    return DeltaDecodeWeights(*(x.double() for x in tensors), weights.norm_eps)


def error_after_decoding(state_dtype: torch.dtype, config: StepConfig | None) -> float:
    """Of the last page of tokens, against float64 from the same start; pages fill in between."""
    layers, weights = _memory(CHECKED_ROWS, state_dtype, 1), _weights()
    memory = layers.layer(0)
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
        out = delta_decode(memory, rows, weights, *tokens, config, commits=False)
        delta_commit(layers, rows)
        reference = delta_decode_reference(exact, rows, exact_weights, *(x.double() for x in tokens))
        if t >= CHECKED_TOKENS - PAGE_TOKENS:
            outputs.append(out)
            expected.append(reference)
    return relative_error(torch.stack(outputs), torch.stack(expected))


class Inputs:
    """Slots of all layers, for every batch."""

    def __init__(self, state_dtype: torch.dtype, num_drafts: int = 0) -> None:
        self.layers = _memory(NUM_SLOTS, state_dtype, LAYERS, num_drafts=num_drafts)
        self.weights = [_weights() for _ in range(LAYERS)]

    def step(
        self, turn: int, num_rows: int, places: torch.Tensor, config: StepConfig | None
    ) -> Callable[[], None]:
        """One token for rows that stand at `places` of their pages."""
        slots = (torch.arange(num_rows) + turn * num_rows) % NUM_SLOTS
        rows, tokens = _rows(slots, places % PAGE_TOKENS), _tokens(num_rows)
        one = partial(delta_decode, config=config, commits=False, reads_early=True)

        def run() -> None:
            for index, weights in enumerate(self.weights):
                one(self.layers.layer(index), rows, weights, *tokens)
            delta_commit(self.layers, rows)

        return run

    def mixed(self, num_rows: int, config: StepConfig | None) -> list[Callable[[], None]]:
        # From sixteen rows on every turn has all places.
        turns = PAGE_TOKENS if num_rows < PAGE_TOKENS else 4
        return [self.step(turn, num_rows, torch.arange(num_rows) + turn, config) for turn in range(turns)]

    def together(self, num_rows: int, config: StepConfig | None) -> list[Callable[[], None]]:
        return [self.step(t, num_rows, torch.full((num_rows,), t), config) for t in range(PAGE_TOKENS)]

    def verify(
        self, turn: int, num_rows: int, num_lines: int, config: VerifyConfig | None
    ) -> Callable[[], None]:
        """The last token and drafts of rows that stand at all places, those of a full page among them."""
        numbers, places = torch.arange(num_rows), PAGE_TOKENS + num_lines - 1
        slots, lengths = (numbers + turn * num_rows) % NUM_SLOTS, (5 * numbers + turn) % places
        rows, tokens = _rows(slots, lengths), _tokens(num_rows, num_lines)
        rows.commit_slots_R[lengths.cuda() < PAGE_TOKENS] = NO_SLOT
        counts = torch.full((num_rows,), num_lines, device="cuda")
        one = partial(delta_verify, config=config, folds=False)

        def run() -> None:
            delta_fold(self.layers, rows)
            for index, weights in enumerate(self.weights):
                one(self.layers.layer(index), rows, counts, weights, *tokens)

        return run

    def lines(self, num_rows: int, num_lines: int, config: VerifyConfig | None) -> list[Callable[[], None]]:
        places = PAGE_TOKENS + num_lines - 1
        turns = places if num_rows < PAGE_TOKENS else 4
        return [self.verify(turn, num_rows, num_lines, config) for turn in range(turns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try other configurations too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = ResultTable("delta_decode")
    half, share = (PAGE_TOKENS - 1) / 2, 1 / PAGE_TOKENS
    for state_dtype, others in TUNE.items():
        inputs, name = Inputs(state_dtype), f"{str(state_dtype).removeprefix('torch.')} state"

        def add(
            kind: str, num_rows: int, steps: list, work: tuple, note: str = "", *, error: float, name=name,
            state_dtype=state_dtype,
        ) -> None:  # fmt: skip
            shape = f"{kind}, batch {num_rows}, {name}"
            num_bytes = bytes_per_step(num_rows, state_dtype, *work)
            table.add(shape, time_calls(steps), 1, num_bytes, error, note)

        for config in [None, *(others if arguments.tune else [])]:
            error = error_after_decoding(state_dtype, config)
            note = str(config or "")
            for num_rows in BATCHES:
                add("mixed", num_rows, inputs.mixed(num_rows, config), (half, share), note, error=error)
            if config is None:
                steps = inputs.together(256, config)
                add("together", 256, steps, (half, share), error=error)
                add("page full", 256, steps[-1:], (PAGE_TOKENS - 1, 1.0), error=error)
        del inputs
        torch.cuda.empty_cache()
        inputs = Inputs(state_dtype, max(NUM_LINES) - 1)
        for num_lines in NUM_LINES:
            places = PAGE_TOKENS + num_lines - 1
            work = ((PAGE_TOKENS - 1) / 2, (num_lines - 1) / places, num_lines)
            for verify in [None, *(VERIFY_TUNE[state_dtype] if arguments.tune else [])]:
                for num_rows in BATCHES:
                    steps, note = inputs.lines(num_rows, num_lines, verify), str(verify or "")
                    add(f"{num_lines} lines", num_rows, steps, work, note, error=float("nan"))
        del inputs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
