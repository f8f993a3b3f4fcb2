"""How far a state in bfloat16 drifts from float64 over thousands of tokens."""

from __future__ import annotations

import math

import pytest
import torch

from kiln_nn.kernels.gated_delta import (
    DeltaRing,
    gated_delta_recurrent,
    gated_delta_ring_commit,
    gated_delta_ring_step,
    ring_mask,
)
from tests.support.delta_inputs import DeltaInputs, relative_error

NUM_TOKENS, PAGE_TOKENS = 4096, 16
# One row and head for each; the last forgets less than a quarter of its first token.
HALF_LIVES = (14.0, 120.0, 1000.0, 10_000.0)
WIDTH = 32


def _inputs() -> DeltaInputs:
    """One head per half-life, all reading and writing the same keys."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    heads = len(HALF_LIVES)
    q, k = normal(2, NUM_TOKENS, heads, WIDTH)
    jitter = torch.rand(NUM_TOKENS, heads, generator=draw, dtype=torch.float64) + 0.5
    return DeltaInputs(
        q / q.norm(dim=-1, keepdim=True) * WIDTH**-0.5,
        k / k.norm(dim=-1, keepdim=True),
        normal(NUM_TOKENS, heads, WIDTH),
        -math.log(2.0) / torch.tensor(HALF_LIVES, dtype=torch.float64) * jitter,
        torch.sigmoid(normal(NUM_TOKENS, heads)),
    )


def _decoded(inputs: DeltaInputs, state_dtype: torch.dtype, page_tokens: int) -> torch.Tensor:
    """Outputs of decoding in float32 with states kept in `state_dtype`."""
    heads = len(HALF_LIVES)
    state = torch.zeros(1, heads, WIDTH, WIDTH, dtype=state_dtype)
    ring = DeltaRing(
        torch.zeros(1, heads, page_tokens, WIDTH),
        torch.zeros(1, heads, page_tokens, WIDTH),
        torch.zeros(1, heads, page_tokens),
    )
    lengths = [torch.tensor([n]) for n in range(page_tokens + 1)]
    masks = [ring_mask(length, page_tokens) for length in lengths]
    outputs = []
    tokens = [x[:, None].float() for x in inputs.tensors()]
    for t in range(NUM_TOKENS):
        place, token = t % page_tokens, [x[t] for x in tokens]
        step = gated_delta_ring_step(state, ring, masks[place], *token)
        ring.append_(lengths[place], token[1], step)
        outputs.append(step.out_RHV[0])
        if place == page_tokens - 1:
            state = gated_delta_ring_commit(state, ring, lengths[page_tokens]).to(state_dtype)
    return torch.stack(outputs)


def _errors(outputs: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Per head, over the last 512 tokens."""
    return [relative_error(outputs[-512:, head], expected[-512:, head]) for head in range(len(HALF_LIVES))]


@pytest.fixture(scope="module")
def run() -> tuple[DeltaInputs, torch.Tensor]:
    inputs = _inputs()
    expected, _ = gated_delta_recurrent(*inputs.tensors(), (0, NUM_TOKENS))
    return inputs, expected


def test_a_bf16_state_committed_once_a_page_does_not_drift(run):
    inputs, expected = run
    errors = _errors(_decoded(inputs, torch.bfloat16, PAGE_TOKENS), expected)
    # Rounding is 2^-9 at most, 1e-3 rms, and repeats while the memory lasts.
    assert max(errors) < 6e-3, errors


def test_a_float32_state_keeps_its_precision(run):
    inputs, expected = run
    errors = _errors(_decoded(inputs, torch.float32, PAGE_TOKENS), expected)
    assert max(errors) < 3e-6, errors


def test_rounding_every_token_would_drift_further(run):
    inputs, expected = run
    paged = _errors(_decoded(inputs, torch.bfloat16, PAGE_TOKENS), expected)
    in_place = _errors(_decoded(inputs, torch.bfloat16, 1), expected)
    assert all(rarely < often / 2 for rarely, often in zip(paged, in_place, strict=True))
