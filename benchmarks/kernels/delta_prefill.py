"""Times the DeltaNet prefill at the 4B shape: one layer, 16/32 heads of 128, bf16, 16-token pages.

    python benchmarks/kernels/delta_prefill.py [--tune]

Prediction for one prompt of 8,192 tokens: 268 MB have to be read and written (q|k|v, z, output),
0.06 ms at copy speed; with what the launches hand to each other 1.3 GB, 0.3 ms. The pass is a
chain of 128 tiles on 64 programs, at 0.9 us a tile 0.12 ms. Measured when it was written: convolution
0.12 ms, keys 0.06, inverses 0.02, values 0.07, pass 0.18 (1.4 us a tile), norm 0.05.

Half-lives are log-uniform between 1 and 4,096 tokens. The error is that of all outputs against the
float64 reference on the same inputs. `--tune` tries other configurations and times the launches apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from functools import partial

import torch
from measure import ResultTable, Timing, relative_error, time_calls

from kiln_nn.kernels.delta_decode import DeltaDecodeWeights, DeltaMemory
from kiln_nn.kernels.delta_prefill import ChunkSlots, DeltaChunks, chunk_lists
from kiln_nn.kernels.delta_prefill import triton as kernel
from kiln_nn.kernels.delta_prefill.reference import delta_prefill_reference
from kiln_nn.kernels.gated_delta import DeltaRing

KEY_HEADS, HEADS, WIDTH, CONV_WIDTH, PAGE_TOKENS = 16, 32, 128, 4, 16
CHANNELS = 2 * KEY_HEADS * WIDTH + HEADS * WIDTH
PROMPTS = ((8192,), (2048,) * 4, (64,), (200,), (1024,) * 8, (32768,))
TUNE = (
    {"conv_tokens": 32},
    {"keys_warps": 4},
    {"values_warps": 8},
    {"inverse_form": "tf32"},
    {"inverse_form": "tf32x3"},
    {"pass_blocks": ((32, 4),)},
    {"pass_blocks": ((64, 4),)},
    {"pass_blocks": ((128, 8),)},
)


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _memory(num_slots: int, state_dtype: torch.dtype) -> DeltaMemory:
    return DeltaMemory(
        _draw(num_slots, HEADS, WIDTH, WIDTH, dtype=state_dtype),
        DeltaRing(
            _draw(num_slots, KEY_HEADS, PAGE_TOKENS, WIDTH, dtype=torch.float32),
            _draw(num_slots, HEADS, PAGE_TOKENS, WIDTH, dtype=torch.float32),
            _draw(num_slots, HEADS, PAGE_TOKENS, dtype=torch.float32),
        ),
        _draw(num_slots, CONV_WIDTH - 1 + PAGE_TOKENS, CHANNELS),
    )


def _weights() -> DeltaDecodeWeights:
    half_lives = 4096.0 ** torch.rand(HEADS, device="cuda")
    return DeltaDecodeWeights(
        conv_CW=_draw(CHANNELS, CONV_WIDTH) / 2,
        A_log_H=(math.log(2.0) / half_lives / math.log1p(math.e)).log(),
        dt_bias_H=torch.ones(HEADS, device="cuda"),
        norm_V=torch.ones(WIDTH, device="cuda"),
        norm_eps=1e-6,
    )


@dataclasses.dataclass(frozen=True)
class Inputs:
    """One layer's prompts, each going on from its slot, as slices of one fused projection."""

    lengths: tuple[int, ...]
    memory: DeltaMemory
    chunks: DeltaChunks
    weights: DeltaDecodeWeights
    tokens: tuple[torch.Tensor, ...]

    @classmethod
    def draw(cls, lengths: tuple[int, ...], state_dtype: torch.dtype) -> Inputs:
        num_tokens = sum(lengths)
        chunks = [ChunkSlots(length, slot, slot) for slot, length in enumerate(lengths)]
        lists = chunk_lists(chunks, PAGE_TOKENS)
        projected = _draw(num_tokens, CHANNELS + HEADS * WIDTH + 2 * HEADS)
        mixed, z, b, a = projected.split((CHANNELS, HEADS * WIDTH, HEADS, HEADS), 1)
        return cls(
            lengths,
            _memory(len(lengths), state_dtype),
            DeltaChunks(**{name: torch.tensor(numbers, device="cuda") for name, numbers in lists.items()}),
            _weights(),
            (mixed, a, b, z.view(num_tokens, HEADS, WIDTH)),
        )

    def call(self, config: kernel.PrefillConfig) -> torch.Tensor:
        return kernel.delta_prefill(self.memory, self.chunks, self.weights, *self.tokens, config)

    def error(self, config: kernel.PrefillConfig) -> float:
        """Of all outputs and the states left behind."""
        start, memory, weights = self.memory, self._copy(torch.float64), self.weights
        out = dataclasses.replace(self, memory=self._copy(None)).call(config)
        tensors = (weights.conv_CW, weights.A_log_H, weights.dt_bias_H, weights.norm_V)
        exact = DeltaDecodeWeights(*(x.double() for x in tensors), weights.norm_eps)
        expected = delta_prefill_reference(memory, self.chunks, exact, *(x.double() for x in self.tokens))
        after = dataclasses.replace(self, memory=self._copy(None))
        after.call(config)
        assert not torch.equal(after.memory.state_SHKV, start.state_SHKV)
        of_states = relative_error(after.memory.state_SHKV, memory.state_SHKV)
        return max(relative_error(out, expected), of_states)

    def _copy(self, dtype: torch.dtype | None) -> DeltaMemory:
        def copied(x: torch.Tensor) -> torch.Tensor:
            return x.to(dtype or x.dtype, copy=True)

        ring = DeltaRing(*(copied(x) for x in vars(self.memory.ring).values()))
        return DeltaMemory(copied(self.memory.state_SHKV), ring, copied(self.memory.conv_rows_SQC))

    def num_bytes(self) -> int:
        """What must be read and written, each thing once."""
        per_token = 2 * (CHANNELS + 2 * HEADS * WIDTH + 2 * HEADS)
        state = 2 * HEADS * WIDTH * WIDTH * self.memory.state_SHKV.element_size()
        return sum(self.lengths) * per_token + len(self.lengths) * state


def time_apart(inputs: Inputs, config: kernel.PrefillConfig) -> dict[str, Timing]:
    """The parts by themselves, all but the norm."""
    memory, chunks, weights, (mixed, a, b, z) = inputs.memory, inputs.chunks, inputs.weights, inputs.tokens
    tiles = kernel._tiles(memory, mixed.shape[0] // 64 + chunks.num_chunks, mixed.dtype)
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    launches = {
        "convolution": partial(kernel._launch_conv, memory, chunks, weights, mixed, tiles, config),
        "tiles": partial(kernel._launch_tiles, memory, chunks, weights, a, b, tiles, config),
        "pass": partial(kernel._launch_pass, memory, chunks, weights, mixed, tiles, out, config),
    }
    return {name: time_calls([launch]) for name, launch in launches.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try other configurations too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = ResultTable("delta_prefill")
    chosen = kernel.CONFIGS[torch.bfloat16, True]
    for lengths in PROMPTS:
        inputs = Inputs.draw(lengths, torch.bfloat16)
        shape = f"{len(lengths)} x {lengths[0]} tokens, bfloat16 state"
        timing = time_calls([partial(inputs.call, chosen)])
        error = inputs.error(chosen) if sum(lengths) <= 8192 else math.nan
        table.add(shape, timing, 1, inputs.num_bytes(), error)
    for change in TUNE if arguments.tune else ():
        config = dataclasses.replace(chosen, **change)
        for lengths in PROMPTS[:2]:
            inputs = Inputs.draw(lengths, torch.bfloat16)
            apart = {name: f"{timing.p50_ms:.4f}" for name, timing in time_apart(inputs, config).items()}
            print(f"{change} {len(lengths)} x {lengths[0]}: {apart}, error {inputs.error(config):.2e}")


if __name__ == "__main__":
    main()
