"""The least a step must cost: its bytes at the rate of a copy, its arithmetic at the rate of a matmul.

The linear layers cost the larger of the two; what sequences remember is read beside them.
A decode step reads every weight once, the keys and values of each sequence's context, and each
sequence's recurrent state with the part of its ring that is in use; every sixteenth step it writes
the state back. Caches, activations and logits are left out: they are what an engine could save.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from kiln_nn.config import ModelConfig
from kiln_nn.weights.names import EMBEDDING, expected_tensors

_PAGE_TOKENS = 16


@dataclass(frozen=True)
class Yardsticks:
    """What this device does with a large copy (bytes read and written) and a large matrix product."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float

    @classmethod
    def measure(cls, device: str) -> Yardsticks:
        measured = cls(_copy_rate(device), _matmul_rate(device))
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # the engine plans with what is free
        return measured


def _copy_rate(device: str) -> float:
    source = torch.empty(2**31 if device.startswith("cuda") else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_s(lambda: target.copy_(source), device)


def _matmul_rate(device: str) -> float:
    width, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (256, torch.float32)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return 2 * width**3 / _median_s(lambda: left @ right, device)


def _median_s(call: Callable[[], object], device: str) -> float:
    """Median seconds of some calls, each waited for."""
    times = []
    for _ in range(12):
        _synchronize(device)
        started_s = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass(frozen=True)
class StepCost:
    """Bytes and floating-point operations that a piece of work cannot do without.

    `memory_bytes` are those of keys, values and states.
    """

    weight_bytes: float
    memory_bytes: float
    num_flops: float

    @property
    def num_bytes(self) -> float:
        return self.weight_bytes + self.memory_bytes

    def floor_s(self, yardsticks: Yardsticks) -> float:
        products_s = max(
            self.weight_bytes / yardsticks.copy_bytes_per_s, self.num_flops / yardsticks.matmul_flops_per_s
        )
        return products_s + self.memory_bytes / yardsticks.copy_bytes_per_s


@dataclass(frozen=True)
class ModelCosts:
    """A model's sizes as its costs depend on them; `*_itemsize` are bytes of one stored number."""

    config: ModelConfig
    weight_bytes: int
    kv_itemsize: int
    state_itemsize: int
    ring_itemsize: int = 4
    activation_itemsize: int = 2

    @cached_property
    def num_weights(self) -> int:
        """Numbers that take part in a token's products: all but the rows of the embedding not looked up."""
        specs = expected_tensors(self.config, include_mtp=False)
        skipped = () if self.config.tie_word_embeddings else (EMBEDDING,)
        return sum(math.prod(spec.shape) for name, spec in specs.items() if name not in skipped)

    @property
    def kv_bytes_per_token(self) -> int:
        config = self.config
        return 2 * config.num_full_layers * config.num_kv_heads * config.head_dim * self.kv_itemsize

    @property
    def state_bytes(self) -> int:
        """Committed recurrent states of one sequence."""
        config = self.config
        numbers = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
        return config.num_linear_layers * numbers * self.state_itemsize

    @property
    def ring_bytes_per_token(self) -> int:
        """Of one ring entry: key, corrected value and log-decay."""
        config = self.config
        numbers = config.linear_num_key_heads * config.linear_key_head_dim
        numbers += config.linear_num_value_heads * (config.linear_value_head_dim + 1)
        return config.num_linear_layers * numbers * self.ring_itemsize

    @property
    def conv_bytes(self) -> int:
        """The rows before a token that its convolution reads."""
        config = self.config
        rows = config.linear_conv_kernel_dim - 1
        return config.num_linear_layers * rows * config.conv_dim * self.activation_itemsize

    def decode_step(self, batch: int, context_tokens: float) -> StepCost:
        """One token for each of `batch` sequences with that many tokens before it, averaged over a page."""
        memory = self.state_bytes * (1 + 1 / _PAGE_TOKENS) + self.conv_bytes
        memory += self.ring_bytes_per_token * (_PAGE_TOKENS - 1) / 2
        per_sequence = memory + self.kv_bytes_per_token * context_tokens
        flops = 2 * self.num_weights * batch + batch * self._attention_flops(context_tokens)
        return StepCost(self.weight_bytes, batch * per_sequence, flops)

    def prefill(self, num_tokens: int, num_cached_tokens: int = 0) -> StepCost:
        """`num_tokens` new tokens of one prompt; the head counts for the last of them only."""
        head = self.config.vocab_size * self.config.hidden_size
        flops = 2 * (self.num_weights - head) * num_tokens + 2 * head
        mean_context = num_cached_tokens + num_tokens / 2
        flops += num_tokens * self._attention_flops(mean_context)
        memory_bytes = self.kv_bytes_per_token * (2 * num_tokens + num_cached_tokens)
        return StepCost(self.weight_bytes, memory_bytes, flops)

    def _attention_flops(self, context_tokens: float) -> float:
        """Scores and their sum over values, for one token."""
        config = self.config
        return 4 * config.num_full_layers * config.num_attention_heads * config.head_dim * context_tokens
