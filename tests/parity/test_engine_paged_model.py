"""The paged model against transformers' Qwen3.5, float32, through hand-made plans.

Tolerance: both sides compute in float32 and sum in different orders; errors seen are below 1e-5
of a position's logits, the promise is 1e-4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kiln_engine.domain import StateCheckpoint
from kiln_nn.kernels.paged_attention import reference
from tests.support.engine_plans import EngineRig, relative_error, token_ids
from tests.support.tiny_models import SHAPES, hf_model, make_checkpoint

TOLERANCE = 1e-4
PROMPT = token_ids(83)
ANSWER = token_ids(45, seed=1)


@dataclass
class Case:
    folder: Path
    oracle: Any
    prompt_and_answer: torch.Tensor

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """transformers' logits at every position of one document."""
        with torch.no_grad():
            return self.oracle(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module", params=list(SHAPES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    make_checkpoint(folder, seed=3, **SHAPES[request.param])
    oracle = hf_model(folder)
    made = Case(folder, oracle, torch.empty(0))
    made.prompt_and_answer = made.logits(PROMPT + ANSWER)
    return made


@pytest.fixture(scope="module")
def rig(case: Case) -> EngineRig:
    return EngineRig(case.folder)


def test_a_whole_prompt_and_its_answer_match(case: Case, rig: EngineRig):
    sequence = rig.sequence()
    prompt = rig.prefill(sequence, PROMPT)
    answer = rig.decode_all(sequence, ANSWER)  # over three pages, so three commits
    assert relative_error(torch.cat((prompt, answer)), case.prompt_and_answer) < TOLERANCE
    rig.free(sequence)


def test_every_split_into_chunks_matches(case: Case, rig: EngineRig):
    boundaries = range(rig.page_tokens, len(PROMPT), rig.page_tokens)
    expected = case.prompt_and_answer[: len(PROMPT) + 1]
    for count in range(len(boundaries) + 1):
        for splits in itertools.combinations(boundaries, count):
            sequence = rig.sequence()
            prompt = rig.prefill(sequence, PROMPT, splits)
            logits = torch.cat((prompt, rig.decode_all(sequence, ANSWER[:1])))
            assert relative_error(logits, expected) < TOLERANCE, splits
            rig.free(sequence)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 15, 16, 17, 32, 33])
def test_prompts_that_end_anywhere_in_a_page_go_on_right(case: Case, rig: EngineRig, num_tokens: int):
    sequence = rig.sequence()
    tokens = (PROMPT + ANSWER)[: num_tokens + 20]
    logits = torch.cat(
        (rig.prefill(sequence, tokens[:num_tokens]), rig.decode_all(sequence, tokens[num_tokens:]))
    )
    assert relative_error(logits, case.prompt_and_answer[: len(tokens)]) < TOLERANCE
    rig.free(sequence)


@pytest.mark.parametrize("most_gathered", [1, 80, reference.MOST_GATHERED_TOKENS])
def test_rows_in_one_batch_match_each_alone(
    case: Case, rig: EngineRig, monkeypatch: pytest.MonkeyPatch, most_gathered: int
):
    """Prompts and answers of different lengths, joining while others decode and leaving again.

    However many of them attention reads at once.
    """
    monkeypatch.setattr(reference, "MOST_GATHERED_TOKENS", most_gathered)
    documents = [token_ids(length, seed=10 + length) for length in (5, 16, 31, 48, 70, 20)]
    lengths = [3, 16, 30, 33, 50, 1]
    sequences = [rig.sequence() for _ in documents]
    logits: list[list[torch.Tensor]] = [[] for _ in documents]
    for round_number in range(40):
        joining = [i for i in range(len(documents)) if i // 2 == round_number]  # two a step
        decoding = [
            i
            for i in range(2 * round_number)
            if i < len(documents) and sequences[i].num_computed < len(documents[i])
        ]
        if not joining and not decoding:
            break
        results = rig.step(
            [rig.decode(sequences[i], documents[i][sequences[i].num_computed]) for i in decoding],
            [rig.chunk(sequences[i], documents[i][: lengths[i]]) for i in joining],
        )
        for i, result in zip([*decoding, *joining], results, strict=True):
            logits[i].append(result)
    for document, parts, sequence in zip(documents, logits, sequences, strict=True):
        assert relative_error(torch.cat(parts), case.logits(document)) < TOLERANCE
        rig.free(sequence)


def test_a_hit_goes_on_from_a_shared_checkpoint(case: Case, rig: EngineRig):
    """Two sequences read one checkpoint, part ways, and commit to slots of their own."""
    first, checkpoint = rig.sequence(), rig.take_slot()
    chunk = rig.chunk(first, PROMPT, [StateCheckpoint(48, checkpoint)])
    rig.step(chunks=[chunk])
    branches = [PROMPT[48:] + ANSWER, token_ids(60, seed=5)]
    sequences = []
    for _ in branches:
        sequence = rig.sequence()
        sequence.num_computed, sequence.read_slot = 48, checkpoint
        sequence.page_ids = first.page_ids[:3]
        sequences.append(sequence)
    logits = [[], []]
    # The first prefills past a page and commits in its own slot; the second brings less than a page.
    results = rig.step(
        chunks=[rig.chunk(sequences[0], branches[0][:20]), rig.chunk(sequences[1], branches[1][:7])]
    )
    for into, result in zip(logits, results, strict=True):
        into.append(result)
    for step in range(40):
        results = rig.step(
            [
                rig.decode(sequences[0], branches[0][20 + step]),
                rig.decode(sequences[1], branches[1][7 + step]),
            ]
        )
        for into, result in zip(logits, results, strict=True):
            into.append(result)
    for branch, parts in zip(branches, logits, strict=True):
        actual = torch.cat(parts)
        expected = case.logits(PROMPT[:48] + branch)[48 : 48 + len(actual)]
        assert relative_error(actual, expected) < TOLERANCE


def test_a_decode_row_may_read_a_checkpoint_and_commit_elsewhere(case: Case, rig: EngineRig):
    """The row's committed state stays where it is as a checkpoint; the next one goes to a new slot."""
    sequence = rig.sequence()
    parts = [rig.prefill(sequence, PROMPT[:20])]
    kept: list[int] = []
    for token in PROMPT[20:]:
        completes_page = (sequence.num_computed + 1) % rig.page_tokens == 0
        commit_slot = rig.take_slot() if completes_page else None
        before = sequence.state_slot
        parts.append(rig.step([rig.decode(sequence, token, commit_slot)])[0])
        if sequence.state_slot != before:
            kept.append(before)
    assert len(kept) == 4
    assert relative_error(torch.cat(parts), case.prompt_and_answer[: len(PROMPT)]) < TOLERANCE
    # The slot left behind at 64 tokens still holds the state of that boundary.
    resumed = rig.sequence()
    resumed.num_computed, resumed.read_slot, resumed.page_ids = 64, kept[-1], sequence.page_ids[:4]
    again = rig.prefill(resumed, PROMPT[64:])
    assert relative_error(again, case.prompt_and_answer[64 : len(PROMPT)]) < TOLERANCE


def test_a_preempted_sequence_resumes_by_recomputing(case: Case, rig: EngineRig):
    sequence = rig.sequence()
    rig.prefill(sequence, PROMPT)
    rig.decode_all(sequence, ANSWER[:13])
    rig.free(sequence)  # its pages and slot go to the next one, dirty
    other = rig.sequence()
    rig.prefill(other, token_ids(60, seed=8))
    resumed = rig.sequence()
    logits = torch.cat(
        (rig.prefill(resumed, PROMPT + ANSWER[:13], [32]), rig.decode_all(resumed, ANSWER[13:]))
    )
    assert relative_error(logits, case.prompt_and_answer) < TOLERANCE


@pytest.mark.parametrize("harm", ["wipe", "swap", "tail"])
def test_a_damaged_checkpoint_does_not_pass_unseen(case: Case, harm: str):
    """The comparison can fail: without its state, or with another's, a hit is far off."""
    rig = EngineRig(case.folder)
    harms: dict[str, Callable[[int, int], None]] = {"wipe": _wipe, "swap": _swap, "tail": _wipe_tail}
    writers, slots = [rig.sequence(), rig.sequence()], [rig.take_slot(), rig.take_slot()]
    for writer, slot, tokens in zip(writers, slots, (PROMPT, token_ids(83, seed=9)), strict=True):
        rig.step(chunks=[rig.chunk(writer, tokens, [StateCheckpoint(64, slot)])])

    def error_of_a_hit() -> float:
        sequence = rig.sequence()
        sequence.num_computed, sequence.read_slot = 64, slots[0]
        sequence.page_ids = writers[0].page_ids[:4]
        logits = rig.prefill(sequence, PROMPT[64:])
        return relative_error(logits, case.prompt_and_answer[64 : len(PROMPT)])

    assert error_of_a_hit() < TOLERANCE
    for index in range(rig.config.num_linear_layers):
        harms[harm](rig, index, slots)
    assert error_of_a_hit() > 1e-2


def _wipe(rig: EngineRig, index: int, slots: list[int]) -> None:
    rig.states.layer(index).state_SHKV[slots[0]] = 0


def _swap(rig: EngineRig, index: int, slots: list[int]) -> None:
    states = rig.states.layer(index).state_SHKV
    states[slots] = states[slots[::-1]]


def _wipe_tail(rig: EngineRig, index: int, slots: list[int]) -> None:
    first = slots[0] * rig.states.conv_rows_per_slot
    rig.states.layer(index).conv_rows_C[first : first + rig.states.num_tail_rows] = 0


def test_what_an_earlier_owner_left_behind_does_not_matter(case: Case):
    """NaN in every page and slot (an adapter can produce them) reaches no later sequence."""
    rig = EngineRig(case.folder)
    for index in range(rig.config.num_full_layers):
        for cache in rig.kv.layer(index):
            cache.fill_(torch.nan)
    for index in range(rig.config.num_linear_layers):
        layer = rig.states.layer(index)
        for tensor in (layer.state_SHKV, layer.conv_rows_C, *vars(layer.ring).values()):
            tensor.fill_(torch.nan)
    sequence = rig.sequence()
    logits = rig.prefill(sequence, PROMPT[:37])
    parts = [logits]
    for token in (PROMPT + ANSWER)[37:]:
        parts.append(
            rig.step([rig.decode(sequence, token, rig.take_slot() if len(parts) == 11 else None)])[0]
        )
    assert relative_error(torch.cat(parts), case.prompt_and_answer) < TOLERANCE


@pytest.mark.parametrize(("page_tokens", "max_draft_tokens"), [(8, 0), (16, 5), (32, 3)])
def test_other_page_sizes_and_longer_rings_match(case: Case, page_tokens: int, max_draft_tokens: int):
    rig = EngineRig(case.folder, page_tokens=page_tokens, max_draft_tokens=max_draft_tokens)
    sequence = rig.sequence()
    logits = torch.cat((rig.prefill(sequence, PROMPT, [32, 64]), rig.decode_all(sequence, ANSWER)))
    assert relative_error(logits, case.prompt_and_answer) < TOLERANCE
