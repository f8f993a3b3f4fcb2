"""The decode step's reference against the packed layer, token by token, in float64."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.causal_conv import causal_conv
from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.delta_decode import delta_commit, delta_decode
from kiln_nn.kernels.gated_delta import delta_rule_gates, delta_rule_heads, gated_delta_recurrent
from kiln_nn.kernels.rms_norm import gated_rms_norm
from tests.support.delta_decode import (
    DeltaShape,
    Tokens,
    empty_memory,
    exact,
    layers_stacked,
    make_rows,
    memory_tensors,
    random_memory,
    random_tokens,
    random_weights,
)
from tests.support.delta_inputs import relative_error

SHAPE = DeltaShape(capacity=16 + 3)
FP64_TOLERANCE = 1e-12


def _packed(shape: DeltaShape, weights, tokens: list[Tokens], row: int) -> torch.Tensor:
    """All tokens of one row from its true start, as a prefill computes them."""
    mixed, a, b, z = (torch.stack([token.all()[i][row] for token in tokens]) for i in range(4))
    convolved, _ = causal_conv(mixed, weights.conv_CW, (0, len(tokens)))
    heads = delta_rule_heads(convolved, shape.num_key_heads, shape.key_dim, shape.value_dim)
    gates = delta_rule_gates(a, b, weights.A_log_H, weights.dt_bias_H)
    out, _ = gated_delta_recurrent(*heads, *gates, (0, len(tokens)))
    return gated_rms_norm(out, z, weights.norm_V, weights.norm_eps)


def _decode(shape: DeltaShape, weights, tokens: list[Tokens], moves: bool) -> torch.Tensor:
    """Row r begins r * 5 tokens late; with `moves` every commit goes to the row's other slot."""
    memory, num_rows = empty_memory(shape), tokens[0].mixed_RC.shape[0]
    slots, outputs = [2 * row for row in range(num_rows)], []
    for t, token in enumerate(tokens):
        rows = []
        for row in range(num_rows):
            age = t - 5 * row
            length, target = age % shape.page_tokens, slots[row] ^ 1 if moves else slots[row]
            is_last = length == shape.page_tokens - 1
            rows.append((slots[row], slots[row], length, target if is_last else None) if age >= 0 else None)
            if age >= 0 and is_last:
                slots[row] = target
        outputs.append(delta_decode(memory, make_rows(*rows), weights, *token.all()))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("page_tokens", [16, 2])
def test_decoding_equals_the_packed_layer_across_pages(page_tokens, moves):
    shape = DeltaShape(capacity=page_tokens + 3, page_tokens=page_tokens)
    draw = torch.Generator().manual_seed(3)
    weights = random_weights(shape, draw)
    tokens = [random_tokens(shape, 3, draw) for _ in range(45)]
    out = _decode(shape, weights, tokens, moves)
    for row in range(3):
        expected = _packed(shape, weights, tokens[5 * row :], row)
        assert relative_error(out[row, 5 * row :], expected) < FP64_TOLERANCE
        assert not out[row, : 5 * row].any()


def test_a_shared_checkpoint_is_read_and_left_alone():
    draw = torch.Generator().manual_seed(4)
    memory = exact(random_memory(SHAPE, {1: 15, 2: 1}, draw))
    before = [x.clone() for x in memory_tensors(memory)]
    weights, tokens = random_weights(SHAPE, draw), random_tokens(SHAPE, 2, draw)
    # Both read slot 0; the first commits to a slot of its own.
    delta_decode(memory, make_rows((0, 1, 15, 1), (0, 2, 1, None)), weights, *tokens.all())
    for now, then in zip(memory_tensors(memory), before, strict=True):
        assert torch.equal(now[[0, *range(3, SHAPE.num_slots)]], then[[0, *range(3, SHAPE.num_slots)]])
    assert not torch.equal(memory.state_SHKV[1], before[0][1])
    assert torch.equal(memory.state_SHKV[2], before[0][2])
    # The new tail is the last three rows before the boundary.
    tail = SHAPE.conv_width - 1
    assert torch.equal(memory.conv_rows_SQC[1, :tail], memory.conv_rows_SQC[1, 16 : 16 + tail])


def test_unfitting_shapes_are_refused():
    draw = torch.Generator().manual_seed(5)
    memory, weights = empty_memory(SHAPE), random_weights(SHAPE, draw)
    tokens, rows = random_tokens(SHAPE, 2, draw).all(), make_rows((0, 0, 0, None), None)
    with pytest.raises(ShapeMismatch, match="mixed"):
        delta_decode(memory, rows, weights, tokens[0][:1], *tokens[1:])
    with pytest.raises(ShapeMismatch, match="z has"):
        delta_decode(memory, rows, weights, *tokens[:3], tokens[3][:, :1])
    short = random_weights(DeltaShape(capacity=SHAPE.capacity, conv_width=3), draw)
    with pytest.raises(ShapeMismatch, match="conv_rows"):
        delta_decode(memory, rows, short, *tokens)


def test_committing_after_the_step_equals_committing_in_it():
    draw = torch.Generator().manual_seed(12)
    weights = [random_weights(SHAPE, draw) for _ in range(2)]
    at_once = [exact(random_memory(SHAPE, {1: 15, 2: 15, 3: 4}, draw)) for _ in range(2)]
    layers, tokens = layers_stacked(at_once), random_tokens(SHAPE, 4, draw).all()
    rows = make_rows((1, 1, 15, 1), None, (0, 2, 15, 5), (3, 3, 4, None))
    for index, memory in enumerate(at_once):
        out = delta_decode(memory, rows, weights[index], *tokens)
        later = delta_decode(layers.layer(index), rows, weights[index], *tokens, commits=False)
        assert torch.equal(out, later)
        assert not torch.equal(layers.state_SHKV[index, 1], memory.state_SHKV[1])
    delta_commit(layers, rows)
    for index, memory in enumerate(at_once):
        for now, expected in zip(memory_tensors(layers.layer(index)), memory_tensors(memory), strict=True):
            assert torch.equal(now, expected)
