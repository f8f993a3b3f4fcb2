"""The prefill's reference against the decode step and itself, in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.delta_decode import delta_decode
from kiln_nn.kernels.delta_prefill import ChunkCapacity, ChunkSlots, delta_prefill
from tests.support.delta_decode import (
    DeltaShape,
    empty_memory,
    exact,
    make_rows,
    memory_tensors,
    random_memory,
    random_weights,
)
from tests.support.delta_inputs import relative_error
from tests.support.delta_prefill import joined, make_chunks, part, random_prompt

SHAPE = DeltaShape(capacity=16 + 3)
FP64_TOLERANCE = 1e-11


def _weights(shape: DeltaShape = SHAPE):
    return random_weights(shape, torch.Generator().manual_seed(1))


def _decoded(memory, weights, tokens, slot: int, first: int = 0) -> torch.Tensor:
    """Tokens one by one in one slot; the first stands `first` tokens into its page."""
    outputs = []
    for t in range(tokens.mixed_RC.shape[0]):
        length = (first + t) % memory.page_tokens
        commit = slot if length == memory.page_tokens - 1 else None
        rows = make_rows((slot, slot, length, commit))
        outputs.append(delta_decode(memory, rows, weights, *part(tokens, t, t + 1).all()))
    return torch.cat(outputs)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_prefill_equals_decoding_and_decoding_goes_on_from_it(num_tokens):
    weights, tokens = _weights(), random_prompt(SHAPE, num_tokens + 20, 2)
    expected = _decoded(empty_memory(SHAPE), weights, tokens, 0)
    memory = exact(random_memory(SHAPE, {}, torch.Generator().manual_seed(3)))
    chunks = make_chunks(ChunkSlots(num_tokens, live_slot=5))
    out = delta_prefill(memory, chunks, weights, *part(tokens, 0, num_tokens).all())
    assert relative_error(out, expected[:num_tokens]) < FP64_TOLERANCE
    rest = _decoded(memory, weights, part(tokens, num_tokens, num_tokens + 20), 5, num_tokens % 16)
    assert relative_error(rest, expected[num_tokens:]) < FP64_TOLERANCE


def test_splits_at_page_boundaries_and_checkpoints_equal_the_whole():
    weights, tokens = _weights(), random_prompt(SHAPE, 90, 4)
    memory = empty_memory(SHAPE)
    whole = make_chunks(ChunkSlots(90, live_slot=0, checkpoints=((16, 2), (48, 3), (80, 4))))
    expected = delta_prefill(memory, whole, weights, *tokens.all())
    split = empty_memory(SHAPE)
    outputs = []
    for start, end, read, live in ((0, 16, -1, 2), (16, 48, 2, 3), (48, 80, 3, 4), (80, 90, 4, 0)):
        chunk = make_chunks(ChunkSlots(end - start, read, live))
        outputs.append(delta_prefill(split, chunk, weights, *part(tokens, start, end).all()))
    assert relative_error(torch.cat(outputs), expected) < FP64_TOLERANCE
    for one, other in zip(memory_tensors(split), memory_tensors(memory), strict=True):
        assert torch.allclose(one, other, atol=1e-11)


@pytest.mark.parametrize("harm", ["wipe", "swap", "tail"])
def test_a_damaged_checkpoint_is_seen(harm):
    weights, prompts = _weights(), [random_prompt(SHAPE, 80, seed) for seed in (5, 6)]
    memory = empty_memory(SHAPE)
    first = make_chunks(*(ChunkSlots(80, live_slot=n, checkpoints=((64, 2 + n),)) for n in (0, 1)))
    expected = delta_prefill(memory, first, weights, *joined(*prompts).all())[64:80]
    again = make_chunks(ChunkSlots(16, 2, 4))

    def error() -> float:
        return relative_error(
            delta_prefill(memory, again, weights, *part(prompts[0], 64, 80).all()), expected
        )

    assert error() < FP64_TOLERANCE
    if harm == "wipe":
        memory.state_SHKV[2] = 0
    elif harm == "swap":
        memory.state_SHKV[[2, 3]] = memory.state_SHKV[[3, 2]]
    else:
        memory.conv_rows_SQC[2, :3] = 0
    assert error() > 0.05


def test_padding_changes_nothing_and_leaves_zeros():
    weights, tokens = _weights(), random_prompt(SHAPE, 64, 7)
    chunks = (ChunkSlots(20, 1, 2), ChunkSlots(17, -1, 3, ((16, 4),)), ChunkSlots(3, 5, 6))
    start = exact(random_memory(SHAPE, {}, torch.Generator().manual_seed(8)))
    expected_memory, memory = exact(start), exact(start)
    expected = delta_prefill(expected_memory, make_chunks(*chunks), weights, *part(tokens, 0, 40).all())
    padded = make_chunks(*chunks, capacity=ChunkCapacity.of(5, 64, 16))
    out = delta_prefill(memory, padded, weights, *tokens.all())
    assert torch.equal(out[:40], expected)
    assert not out[40:].any()
    for one, other in zip(memory_tensors(memory), memory_tensors(expected_memory), strict=True):
        assert torch.equal(one, other)
    nothing = make_chunks(capacity=ChunkCapacity.of(5, 64, 16))
    assert not delta_prefill(memory, nothing, weights, *tokens.all()).any()


def test_lists_that_do_not_fit_are_refused():
    with pytest.raises(ShapeMismatch, match="checkpoint"):
        make_chunks(ChunkSlots(40, -1, 0, ((24, 1),)))
    with pytest.raises(ShapeMismatch, match="checkpoint"):
        make_chunks(ChunkSlots(40, -1, 0, ((48, 1),)))
    with pytest.raises(ShapeMismatch, match="tile_chunks"):
        make_chunks(ChunkSlots(200, -1, 0), capacity=ChunkCapacity(1, 13, 3))
    memory, weights, tokens = empty_memory(SHAPE), _weights(), random_prompt(SHAPE, 4, 9)
    with pytest.raises(ShapeMismatch, match="z has shape"):
        delta_prefill(memory, make_chunks(ChunkSlots(4, -1, 0)), weights, *tokens.all()[:3], tokens.z_RHV[:3])
