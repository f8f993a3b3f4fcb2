"""How lines are drawn and drafts accepted: the same tokens, one by one and in lines, whatever is guessed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from kiln_engine.domain import RowSampling, SamplingParams, VerifyRow
from kiln_engine.domain.output_rules import Allowance
from kiln_engine.execution.sampled_ids import DraftIds
from kiln_engine.execution.sampler import sample
from kiln_engine.execution.verifying import line_samplings, needs_drafts_on_host
from kiln_nn.kernels.draft_rows import accept_lines

VOCAB_SIZE = 6
NUM_SEEDS = 3000


def make_row(*drafts: int, on_device: bool = False, **params: object) -> VerifyRow:
    sampling = RowSampling(SamplingParams(**params), output_index=4, output_token_ids=(1, 2))  # type: ignore[arg-type]
    return VerifyRow(
        sequence_id=1,
        token_id=2,
        draft_token_ids=None if on_device else drafts,
        num_drafts=len(drafts),
        position=5,
        page_ids=(0,),
        state_read_slot=0,
        state_slot=0,
        state_fold_slot=None,
        adapter_slots=(),
        samplings=tuple(replace(sampling, output_index=4 + line) for line in range(1 + len(drafts))),
    )


def test_a_row_stands_as_far_as_its_lines_drew_the_drafts():
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]])
    drawn = torch.tensor([[1, 2, 3, 9], [1, 9, 3, 9], [9, 2, 3, 9], [1, 2, 3, 9]])
    # The last row has three lines: what stands in its fourth is no draft.
    accepted = accept_lines(tokens, drawn, torch.tensor([4, 4, 4, 3]))
    assert accepted.tolist() == [4, 2, 1, 3]


def test_every_line_has_the_drafts_before_it_in_its_history():
    lines = line_samplings([make_row(7, 8, presence_penalty=0.5), make_row()], [(7, 8), ()], num_lines=4)
    assert [line.output_token_ids for line in lines[:3]] == [(1, 2), (1, 2, 7), (1, 2, 7, 8)]
    assert [line.output_index for line in lines[:3]] == [4, 5, 6]
    assert lines[4].output_index == 4
    # What fills up rows draws greedily, and asks for nothing.
    assert [line.params.temperature for line in (lines[3], *lines[5:])] == [0.0] * 4


class Counting:
    """Allows each token once it has been preceded by the one before it, and none after 9."""

    def __init__(self, last: int) -> None:
        self.last = last

    @property
    def allowance(self) -> Allowance:
        return Allowance(only=self.last + 1)

    def after(self, token_id: int) -> Counting | None:
        return Counting(token_id) if token_id == self.last + 1 else None


def test_rules_follow_the_drafts_until_one_breaks_them():
    row = make_row(3, 4, 6, 7)
    samplings = tuple(replace(each, constraint=Counting(2)) for each in row.samplings)
    lines = line_samplings([replace(row, samplings=samplings)], [(3, 4, 6, 7)], num_lines=5)
    allowed = [line.constraint.allowance.only if line.constraint else None for line in lines]
    assert allowed == [3, 4, 5, None, None]


def test_rules_may_begin_behind_the_first_line():
    row = make_row(3, 4)
    rules = Counting(2)
    samplings = (row.samplings[0], *(replace(each, constraint=rules) for each in row.samplings[1:]))
    lines = line_samplings([replace(row, samplings=samplings)], [(3, 4)], num_lines=3)
    assert lines[0].constraint is None
    assert [line.constraint.allowance.only for line in lines[1:] if line.constraint] == [4, 5]


def test_the_host_needs_drafts_that_penalties_and_rules_look_at():
    assert not needs_drafts_on_host(make_row(1, 2, on_device=True))
    assert not needs_drafts_on_host(make_row(1, 2, presence_penalty=1.0))
    assert not needs_drafts_on_host(make_row(on_device=True, presence_penalty=1.0))
    assert needs_drafts_on_host(make_row(1, on_device=True, presence_penalty=1.0))


def test_drafts_of_the_device_fill_only_the_places_left_open():
    drafts = DraftIds(num_slots=3, max_draft_tokens=3, device=torch.device("cpu"))
    drafts.ids_SK[1] = torch.tensor([5, 6, 7])
    tokens = torch.tensor([[9, -1, -1], [8, 4, 3], [0, 0, 0]])
    drafts.feed_lines_(tokens, torch.tensor([1, 2, -1]))
    assert tokens.tolist() == [[9, 5, 6], [8, 4, 3], [0, 0, 0]]
    assert drafts.read([1]) == [[5, 6, 7]]


# What each token's successor is drawn from.
LOGITS = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)) * 1.5


def speculate(kind: str, temperature: float, num_tokens: int) -> list[tuple[int, ...]]:
    """Answers of many seeds to the prompt token 0, with three drafts a step from another distribution.

    `coupled` drafts are drawn with the same random numbers as the answers, `free` ones with their own.
    """
    params = [SamplingParams(temperature=temperature, seed=seed) for seed in range(NUM_SEEDS)]
    guessing = LOGITS + 0.7 * torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(4))
    answers: list[list[int]] = [[] for _ in params]
    num_guessed = num_right = 0
    while any(len(answer) < num_tokens for answer in answers):
        lines = [[answer[-1] if answer else 0 for answer in answers]]
        for place in range(3):
            shift = 0 if kind == "coupled" else NUM_SEEDS
            rows = [
                RowSampling(replace(each, seed=each.seed + shift), len(answer) + place)
                for each, answer in zip(params, answers, strict=True)
            ]
            lines.append([drawn.token_id for drawn in sample(guessing[lines[-1]], rows).wait()])
        tokens_RN = torch.tensor(lines).T
        rows = [
            RowSampling(each, len(answer) + line)
            for each, answer in zip(params, answers, strict=True)
            for line in range(4)
        ]
        drawn_RN = sample(LOGITS[tokens_RN.flatten()], rows).token_ids_R.view(-1, 4)
        accepted = accept_lines(tokens_RN, drawn_RN, torch.full((NUM_SEEDS,), 4)).tolist()
        num_guessed += 3 * NUM_SEEDS
        num_right += sum(accepted) - NUM_SEEDS
        for answer, drawn, count in zip(answers, drawn_RN.tolist(), accepted, strict=True):
            answer += drawn[:count]
    assert 0.1 < num_right / num_guessed < 0.9
    return [tuple(answer[:num_tokens]) for answer in answers]


@pytest.mark.parametrize("kind", ["coupled", "free"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_answers_are_distributed_as_without_drafts(kind: str, temperature: float):
    """Chi-square of all pairs of the first two tokens: 35 degrees of freedom, 66.6 at one in a thousand."""
    probabilities = (LOGITS / temperature).softmax(-1)
    answers = speculate(kind, temperature, 2)
    statistic = 0.0
    for first in range(VOCAB_SIZE):
        for second in range(VOCAB_SIZE):
            expected = float(probabilities[0, first] * probabilities[first, second]) * NUM_SEEDS
            statistic += (answers.count((first, second)) - expected) ** 2 / expected
    assert statistic < 66.6


def test_answers_are_those_without_drafts_seed_by_seed():
    answers = speculate("coupled", 1.0, 4)
    for seed in random.Random(0).sample(range(NUM_SEEDS), 50):
        token, plain = 0, []
        for index in range(4):
            row = RowSampling(SamplingParams(seed=seed), index)
            token = sample(LOGITS[None, token].clone(), [row]).wait()[0].token_id
            plain.append(token)
        assert answers[seed] == tuple(plain)
