"""Times all layers of a decode step of few tokens, one behind the other: what a layer takes among others.

    python benchmarks/kernels/one_token.py [--rows 1 8] [--context 600] [--state float32]

The 4B shape over four-bit weights: 24 DeltaNet layers and 8 of attention, each with weights and memory of
its own, in one CUDA graph, without embedding, head and drawing. Kernels timed alone do not show how much
of them overlaps, nor whom those that start early keep waiting. A line is a way to run the DeltaNet's step:
the time of all layers, that of one, and how far the hidden state is from that of the first way.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from measure import relative_error, time_calls

from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaDecodeWeights, DeltaMemory, DeltaRows
from kiln_nn.kernels.delta_decode.triton import choose, delta_decode
from kiln_nn.kernels.gated_delta import DeltaRing
from kiln_nn.kernels.linear import linear, linear_beside, linear_partials, linear_swiglu
from kiln_nn.kernels.paged_attention import paged_decode_attention
from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write
from kiln_nn.kernels.quantised import QuantisedMatrix
from kiln_nn.kernels.rms_norm import add_rms_norm, rms_norm

HIDDEN, FED, LAYERS, EPS = 2560, 9216, 32, 1e-6
KEY_HEADS, VALUE_HEADS, WIDTH, PAGE = 16, 32, 128, 16
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 256
CHANNELS = 2 * KEY_HEADS * WIDTH + VALUE_HEADS * WIDTH

STATES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def _draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def _matrix(outputs: int, inputs: int) -> QuantisedMatrix:
    """Random nibbles, scaled so that outputs are about as large as inputs."""
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    words = torch.randint(low, high, (outputs, inputs // 8), dtype=torch.int32, device="cuda")
    scales = (0.5 + torch.rand(outputs, inputs // 128, device="cuda")) / (4.6 * math.sqrt(inputs))
    return QuantisedMatrix("int4", words, scales.bfloat16())


@dataclass(frozen=True)
class Layer:
    """Weights and memory of one layer."""

    mixer_in: QuantisedMatrix
    beside: torch.Tensor | None
    mixer_out: QuantisedMatrix
    gate_up: QuantisedMatrix
    down: QuantisedMatrix
    norms: tuple[torch.Tensor, torch.Tensor]
    delta: tuple[DeltaMemory, DeltaDecodeWeights] | None
    caches: tuple[torch.Tensor, torch.Tensor] | None


def _layer(index: int, rows: int, num_pages: int, state_dtype: torch.dtype) -> Layer:
    is_delta = index % 4 != 3
    norms = (_draw(HIDDEN) / 10, _draw(HIDDEN) / 10)
    shared = (_matrix(HIDDEN, 4096), _matrix(2 * FED, HIDDEN), _matrix(HIDDEN, FED), norms)
    if not is_delta:
        k_cache, v_cache = (_draw(num_pages, PAGE, KV_HEADS, HEAD_DIM) for _ in range(2))
        return Layer(_matrix(10_240, HIDDEN), None, *shared, None, (k_cache, v_cache))
    half_lives = 4096.0 ** torch.rand(VALUE_HEADS, device="cuda")
    keys = _draw(rows, KEY_HEADS, PAGE, WIDTH, dtype=torch.float32)
    memory = DeltaMemory(
        _draw(rows, VALUE_HEADS, WIDTH, WIDTH, dtype=state_dtype),
        DeltaRing(
            keys.div_(keys.norm(dim=-1, keepdim=True)),
            _draw(rows, VALUE_HEADS, PAGE, WIDTH, dtype=torch.float32),
            torch.rand(rows, VALUE_HEADS, PAGE, device="cuda").neg().cumsum(-1) / 8,
        ),
        _draw(rows, 3 + PAGE, CHANNELS),
    )
    weights = DeltaDecodeWeights(
        conv_CW=_draw(CHANNELS, 4) / 2,
        A_log_H=(math.log(2.0) / half_lives / math.log1p(math.e)).log(),
        dt_bias_H=torch.ones(VALUE_HEADS, device="cuda"),
        norm_V=torch.ones(WIDTH, device="cuda"),
        norm_eps=EPS,
    )
    beside = _draw(2 * VALUE_HEADS, HIDDEN) / math.sqrt(HIDDEN)
    return Layer(_matrix(12_288, HIDDEN), beside, *shared, (memory, weights), None)


class Step:
    """A step's layers and where its rows stand."""

    def __init__(self, rows: int, context: int, state_dtype: torch.dtype) -> None:
        num_pages = rows * -(-context // PAGE)
        self.layers = [_layer(index, rows, num_pages, state_dtype) for index in range(LAYERS)]
        self.x_TD = _draw(rows, HIDDEN)
        slots, lengths = torch.arange(rows, device="cuda"), torch.arange(rows, device="cuda") % 8 + 4
        self.rows = DeltaRows(slots, slots, lengths, torch.full_like(slots, NO_SLOT))
        self.positions = torch.full_like(slots, context - 1)
        self.contexts = torch.full_like(slots, context)
        pages = torch.arange(num_pages, device="cuda", dtype=torch.int32).view(rows, -1)
        # As wide as the engine's, which decides in how many parts contexts are cut.
        self.pages = torch.zeros(rows, 262_144 // PAGE, dtype=torch.int32, device="cuda")
        self.pages[:, : pages.shape[1]] = pages
        self.token_slots = pages[:, -1].long() * PAGE + (context - 1) % PAGE
        self.frequencies = 1.0 / (1e7 ** (torch.arange(32, device="cuda") / 32))
        self.head_norms = (_draw(HEAD_DIM) / 10, _draw(HEAD_DIM) / 10)

    def run(self, delta: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The hidden states after all layers; `delta` is the DeltaNet's step."""
        residual = self.x_TD.clone()
        x = rms_norm(residual, self.layers[0].norms[0], EPS, offset=1.0)
        for index, layer in enumerate(self.layers):
            mixed = self._delta(layer, x, delta) if layer.delta else self._attention(layer, x)
            mixed = linear_partials(mixed, layer.mixer_out)
            x, residual = add_rms_norm(mixed, residual, layer.norms[1], EPS, offset=1.0)
            fed = linear_partials(linear_swiglu(x, layer.gate_up), layer.down)
            following = self.layers[(index + 1) % LAYERS]
            x, residual = add_rms_norm(fed, residual, following.norms[0], EPS, offset=1.0)
        return x

    def _delta(self, layer: Layer, x: torch.Tensor, delta: Callable[..., torch.Tensor]) -> torch.Tensor:
        assert layer.delta is not None
        assert layer.beside is not None
        memory, weights = layer.delta
        projected = linear_beside(x, (layer.mixer_in, layer.beside))
        sizes = (CHANNELS, VALUE_HEADS * WIDTH, VALUE_HEADS, VALUE_HEADS)
        mixed, z, b, a = projected.split(sizes, dim=1)
        z = z.view(-1, VALUE_HEADS, WIDTH)
        return delta(memory, self.rows, weights, mixed, a, b, z, commits=False, reads_early=True).flatten(1)

    def _attention(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        assert layer.caches is not None
        qkv = linear(x, layer.mixer_in)
        q_and_gate, k, v = qkv.split((2 * HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM), dim=1)
        q, gate = q_and_gate.view(-1, HEADS, 2, HEAD_DIM).unbind(2)
        k, v = k.view(-1, KV_HEADS, HEAD_DIM), v.view(-1, KV_HEADS, HEAD_DIM)
        places = (self.positions, self.frequencies, self.token_slots)
        q = qk_norm_rope_write(q, k, v, *self.head_norms, EPS, *places, *layer.caches)
        scale = HEAD_DIM**-0.5
        return paged_decode_attention(
            q,
            *layer.caches,
            self.pages,
            self.contexts,
            scale,
            gate_RHD=gate,
            table_rows_R=self.rows.ring_slots_R,
        ).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--context", type=int, default=600)
    parser.add_argument("--state", choices=list(STATES), default="bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    for rows in options.rows:
        step, expected = Step(rows, options.context, STATES[options.state]), None
        chosen = choose(rows, STATES[options.state], PAGE)
        for name, most in (("two launches", 0), ("at once", rows)):
            delta = partial(delta_decode, config=replace(chosen, most_rows_at_once=most))
            x = step.run(delta).clone()
            expected = x if expected is None else expected
            took_ms = time_calls([partial(step.run, delta)]).p50_ms
            error = relative_error(x, expected)
            each_us = took_ms * 1e3 / LAYERS
            print(
                f"{rows:3} rows, {name:12s} {took_ms:.4f} ms, {each_us:.2f} us a layer, {error:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
