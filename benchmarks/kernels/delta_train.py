"""Times the gated delta rule of training at the 4B shape: one layer, 16/32 heads of 128, bf16.

    python benchmarks/kernels/delta_train.py [--tune]

Prediction for 2 x 16,384 tokens: forward reads and writes 0.8 GB that must be and 1.4 GB that it keeps,
0.5 ms at copy speed; its pass is a chain of 256 tiles, at 2 us a tile 0.5 ms. Backward moves about
4 GB, 1 ms, and carries a chain of the same length, 0.6 ms.

Half-lives are log-uniform between 1 and 4,096 tokens. The error is the largest of outputs and
gradients, against the float32 kernels on the same inputs. `--tune` tries other configurations, one
change at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from functools import partial
from itertools import accumulate

import torch
from measure import ResultTable, relative_error, time_calls

from kiln_nn.kernels.delta_train import triton as kernel

KEY_HEADS, HEADS, WIDTH = 16, 32, 128
BATCHES = ((16384,) * 2, (1536,) * 16, (2048,) * 4)
TUNE = (
    {"pass_stages": 2},
    {"back_stages": 3},
    {"pass_block_v": 128, "pass_warps": 8, "pass_stages": 2, "back_stages": 1},
    {"outputs_warps": 8},
    {"keys_warps": 2},
    {"grads_block_v": 32},
    {"grads_block_v": 128},
    {"query_warps": 8},
    {"key_warps": 4},
)


class Inputs:
    """One layer's documents, and a gradient of its outputs."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        num_tokens = sum(lengths)
        self.bounds = (0, *accumulate(lengths))

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(num_tokens, *shape, device="cuda")

        def unit(x: torch.Tensor) -> torch.Tensor:
            return x / x.norm(dim=-1, keepdim=True)

        half_lives = 4096.0 ** torch.rand(HEADS, device="cuda")
        self.arguments = (
            (unit(draw(KEY_HEADS, WIDTH)) * WIDTH**-0.5).bfloat16(),
            unit(draw(KEY_HEADS, WIDTH)).bfloat16(),
            draw(HEADS, WIDTH).bfloat16(),
            -math.log(2.0) / half_lives * (0.5 + torch.rand(num_tokens, HEADS, device="cuda")),
            draw(HEADS).sigmoid(),
        )
        self.out_grad = draw(HEADS, WIDTH).bfloat16()

    def forward(self, config: kernel.TrainConfig) -> object:
        return kernel.delta_forward(self.arguments, self.bounds, config)

    def results(self, config: kernel.TrainConfig, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        arguments = (*(x.to(dtype) for x in self.arguments[:3]), *self.arguments[3:])
        out, kept = kernel.delta_forward(arguments, self.bounds, config)
        grad = self.out_grad.to(dtype)
        return out, *kernel.delta_backward(arguments, self.bounds, kept, grad, config)

    def error(self, config: kernel.TrainConfig) -> float:
        exact = self.results(kernel.CONFIGS[torch.float32, True], torch.float32)
        return max(map(relative_error, self.results(config, torch.bfloat16), exact))

    def num_bytes(self) -> tuple[int, int]:
        """What forward and backward must read and write, each thing once."""
        inputs = sum(x.nbytes for x in self.arguments)
        return inputs + self.out_grad.nbytes, 2 * inputs + self.out_grad.nbytes


def measure(table: ResultTable, inputs: Inputs, config: kernel.TrainConfig, shape: str, note: str) -> None:
    _, kept = kernel.delta_forward(inputs.arguments, inputs.bounds, config)
    backward = partial(kernel.delta_backward, inputs.arguments, inputs.bounds, kept, inputs.out_grad, config)
    calls = {"forward": partial(inputs.forward, config), "backward": backward}
    error = inputs.error(config)
    for (name, call), num_bytes in zip(calls.items(), inputs.num_bytes(), strict=True):
        table.add(f"{name}, {shape}", time_calls([call]), 1, num_bytes, error, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="try other configurations too")
    options = parser.parse_args()
    torch.manual_seed(0)
    table = ResultTable("delta_train")
    chosen = kernel.CONFIGS[torch.bfloat16, True]
    for lengths in BATCHES:
        inputs = Inputs(lengths)
        shape = f"{len(lengths)} x {lengths[0]} tokens"
        measure(table, inputs, chosen, shape, "chosen")
        for change in TUNE if options.tune and lengths == BATCHES[0] else ():
            note = " ".join(f"{name}={value}" for name, value in change.items())
            measure(table, inputs, dataclasses.replace(chosen, **change), shape, note)


if __name__ == "__main__":
    main()
