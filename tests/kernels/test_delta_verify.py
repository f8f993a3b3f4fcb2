"""Several new tokens in one step against one step for each, in float64."""

from __future__ import annotations

import random

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.delta_decode import NO_SLOT, DeltaRows, delta_decode, delta_verify
from tests.support.delta_decode import (
    DeltaShape,
    Tokens,
    empty_memory,
    make_rows,
    memory_tensors,
    random_memory,
    random_tokens,
    random_weights,
    stacked,
)
from tests.support.delta_inputs import relative_error

SHAPE = DeltaShape(capacity=16 + 4)
MOST_NEW = 5
NUM_TOKENS = 70
FP64_TOLERANCE = 1e-12


def _one_by_one(shape: DeltaShape, weights, tokens: list[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of single steps of one row, and its states after each page."""
    memory, outputs, states = empty_memory(shape), [], []
    for t, token in enumerate(tokens):
        length = t % shape.page_tokens
        is_last = length == shape.page_tokens - 1
        rows = make_rows((0, 0, length, 0 if is_last else None))
        outputs.append(delta_decode(memory, rows, weights, *token.all())[0])
        if is_last:
            states.append(memory.state_SHKV[0].clone())
    return torch.stack(outputs), torch.stack(states)


class Speculating:
    """One row that is fed true tokens with drafts behind them, of which a prefix is true."""

    def __init__(self, shape: DeltaShape, weights, tokens: list[Tokens], moves: bool) -> None:
        self.shape, self.weights, self.tokens, self.moves = shape, weights, tokens, moves
        self.memory, self.draw = empty_memory(shape), torch.Generator().manual_seed(17)
        self.slot = self.length = self.position = 0
        self.outputs: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []

    def step(self, num_new: int, num_accepted: int) -> None:
        wrong = [random_tokens(self.shape, 1, self.draw) for _ in range(MOST_NEW - num_accepted)]
        lines = self.tokens[self.position : self.position + num_accepted] + wrong
        is_full = self.length >= self.shape.page_tokens
        target = self.slot ^ 1 if self.moves else self.slot
        rows = make_rows((self.slot, self.slot, self.length, target if is_full else None))
        out = delta_verify(self.memory, rows, torch.tensor([num_new]), self.weights, *stacked(lines).all())
        assert out[0, num_new:].eq(0).all()
        self.outputs += list(out[0, :num_accepted])
        if is_full:
            self.slot, self.length = target, self.length - self.shape.page_tokens
            self.states.append(self.memory.state_SHKV[target].clone())
        self.position += num_accepted
        self.length += num_accepted

    def run(self, choices) -> None:
        while self.position < len(self.tokens):
            num_new, num_accepted = choices()
            self.step(num_new, min(num_accepted, len(self.tokens) - self.position))


def _setup(seed: int = 0) -> tuple:
    draw = torch.Generator().manual_seed(seed)
    weights = random_weights(SHAPE, draw)
    return SHAPE, weights, [random_tokens(SHAPE, 1, draw) for _ in range(NUM_TOKENS)]


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize(("num_new", "num_accepted"), [(n, m) for n in range(1, 6) for m in range(1, n + 1)])
def test_accepting_some_equals_that_many_single_steps(num_new, num_accepted, moves):
    shape, weights, tokens = _setup()
    expected, states = _one_by_one(shape, weights, tokens)
    row = Speculating(shape, weights, tokens, moves)
    row.run(lambda: (num_new, num_accepted))
    assert relative_error(torch.stack(row.outputs), expected) < FP64_TOLERANCE
    assert relative_error(torch.stack(row.states), states[: len(row.states)]) < FP64_TOLERANCE
    assert len(row.states) >= 3


@pytest.mark.parametrize("seed", range(4))
def test_any_mixture_of_drafts_and_acceptances(seed):
    shape, weights, tokens = _setup(seed)
    expected, _ = _one_by_one(shape, weights, tokens)
    choose, row = random.Random(seed), Speculating(shape, weights, tokens, moves=bool(seed % 2))

    def choices() -> tuple[int, int]:
        num_new = choose.randint(1, MOST_NEW)
        return num_new, choose.randint(1, num_new)

    row.run(choices)
    assert relative_error(torch.stack(row.outputs), expected) < FP64_TOLERANCE


def test_the_comparison_sees_a_forgotten_fold():
    shape, weights, tokens = _setup()
    expected, _ = _one_by_one(shape, weights, tokens)
    row = Speculating(shape, weights, tokens, moves=True)
    while row.position < 16:
        row.step(4, 4)
    row.memory.state_SHKV[0] = 0
    row.step(4, 4)
    before = row.memory.state_SHKV[1].clone()
    row.memory.state_SHKV[1] = 0
    row.step(4, 4)
    assert before.abs().max() > 0
    assert relative_error(torch.stack(row.outputs[20:]), expected[20:24]) > 0.01


def test_single_steps_go_on_after_drafts():
    shape, weights, tokens = _setup()
    expected, _ = _one_by_one(shape, weights, tokens)
    row = Speculating(shape, weights, tokens, moves=False)
    while row.position < 18:
        row.step(3, 3)
    # Two tokens past the boundary, which the next step folds.
    row.step(1, 1)
    assert row.length == 3
    for t in range(row.position, 40):
        is_last = row.length == 15
        rows = make_rows((row.slot, row.slot, row.length, row.slot if is_last else None))
        row.outputs.append(delta_decode(row.memory, rows, weights, *tokens[t].all())[0])
        row.length = (row.length + 1) % 16
    assert relative_error(torch.stack(row.outputs), expected[:40]) < FP64_TOLERANCE


def test_a_fold_into_another_slot_leaves_the_old_one_and_its_neighbours():
    draw = torch.Generator().manual_seed(4)
    memory = random_memory(SHAPE, {1: 18, 2: 3}, draw)
    for tensor in memory_tensors(memory):
        tensor.nan_to_num_(7.0)
    before = [x.clone() for x in memory_tensors(memory)]
    weights = random_weights(SHAPE, draw)
    lines = stacked([random_tokens(SHAPE, 2, draw) for _ in range(2)])
    delta_verify(
        memory, make_rows((1, 1, 18, 3), (0, 2, 3, None)), torch.tensor([2, 1]), weights, *lines.all()
    )
    for was, now in zip(before, memory_tensors(memory), strict=True):
        for slot in (0, 1, 4, 5, 6, 7):
            assert torch.equal(was[slot], now[slot])
    assert torch.equal(memory.state_SHKV[2], before[0][2])
    # Two moved, two new; the tail is that of the boundary.
    assert memory.ring.u_RHPV[3, :, :4].ne(7.0).all()
    assert memory.ring.u_RHPV[3, :, 4:].eq(7.0).all()
    assert torch.equal(memory.conv_rows_SQC[3, :5], before[4][1, 16:21])
    assert memory.ring.u_RHPV[2, :, :4].ne(7.0).all()
    assert memory.ring.u_RHPV[2, :, 4:].eq(7.0).all()


def test_more_new_tokens_than_the_ring_holds_are_refused():
    draw = torch.Generator().manual_seed(5)
    memory, weights = empty_memory(SHAPE), random_weights(SHAPE, draw)
    rows = DeltaRows(*(torch.tensor([NO_SLOT]) for _ in range(4)))
    lines = stacked([random_tokens(SHAPE, 1, draw) for _ in range(6)])
    with pytest.raises(ShapeMismatch, match="1 to 5"):
        delta_verify(memory, rows, torch.tensor([6]), weights, *lines.all())
