"""How documents are cut into steps and laid out in micro-batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kiln_trainer.data.packing import first_fit, pack, plan_steps
from kiln_trainer.recipes.errors import DocumentTooLong
from kiln_trainer.recipes.grpo import prepare_grpo
from kiln_trainer.recipes.options import RunOptions
from kiln_trainer.recipes.sft import prepare_sft
from tests.support.training import grpo_spec, rollout, sft_request

lengths_lists = st.lists(st.integers(1, 64), min_size=1, max_size=40)


@given(lengths_lists, st.integers(64, 128))
def test_first_fit_places_each_document_once_and_overfills_nothing(lengths, capacity):
    batches = first_fit(range(len(lengths)), lengths, capacity)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in batch) <= capacity for batch in batches)


@given(lengths_lists)
def test_first_fit_leaves_at_most_one_batch_half_empty(lengths):
    batches = first_fit(range(len(lengths)), lengths, 64)
    half_empty = [batch for batch in batches if 2 * sum(lengths[index] for index in batch) <= 64]
    assert len(half_empty) <= 1


@given(lengths_lists, st.integers(1, 4), st.integers(0, 5), st.integers(0, 2**64 - 1))
def test_every_epoch_visits_every_document_once_in_steps_of_the_wanted_size(
    lengths, epochs, accumulation, seed
):
    options = RunOptions(epochs=epochs, batch_tokens=64, gradient_accumulation=accumulation, seed=seed)
    steps = plan_steps(lengths, options)
    assert steps == plan_steps(lengths, options)
    visits = Counter(index for step in steps for index in step.documents)
    assert visits == dict.fromkeys(range(len(lengths)), epochs)
    if accumulation:
        assert all(len(step.micro_batches) <= accumulation for step in steps)
    else:
        assert len(steps) == epochs
    done = 0  # no step reaches across the end of an epoch
    for step in steps:
        assert done % len(lengths) + len(step.documents) <= len(lengths)
        done += len(step.documents)


def test_seed_and_epoch_decide_the_order():
    def orders(seed: int) -> list[tuple[int, ...]]:
        return [step.documents for step in plan_steps([1] * 30, RunOptions(epochs=2, seed=seed))]

    first, second = orders(seed=1)
    assert first != second
    assert orders(seed=2)[0] != first


def test_a_document_longer_than_a_micro_batch_is_refused_by_its_number():
    with pytest.raises(DocumentTooLong, match="document 1 has 65 tokens") as caught:
        plan_steps([3, 65], RunOptions(batch_tokens=64))
    assert caught.value.code == "document_too_long"
    assert caught.value.hint


def test_rows_are_the_positions_before_their_targets():
    documents = prepare_sft(sft_request([[10, 11, 12, 13], [20, 21, 22]], num_prompt=2).sft).documents
    batch = pack(documents)
    # The last token of each document predicts nothing and is left out.
    assert batch.token_ids_T.tolist() == [10, 11, 12, 20, 21]
    assert batch.cu_seqlens == (0, 3, 5)
    assert batch.rows_S.tolist() == [1, 2, 4]
    assert batch.targets_S.tolist() == [12, 13, 22]
    assert batch.document_S.tolist() == [0, 0, 1]
    assert batch.ce_weight_S.tolist() == [1, 1, 1]


def test_packing_keeps_each_rollouts_streams_with_its_own_tokens():
    group = [
        rollout([1, 2], [3, 4], 1.0, behaviour_logprobs=[-0.5, -0.25], temperature=0.5),
        rollout([1], [5], 0.0),
    ]
    documents = prepare_grpo(grpo_spec([group], scale_rewards="none")).documents
    batch = pack(documents, old_logprobs=[torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])])
    assert batch.token_ids_T.tolist() == [1, 2, 3, 1]
    assert batch.targets_S.tolist() == [3, 4, 5]
    assert batch.advantage_S.tolist() == [0.5, 0.5, -0.5]
    assert batch.temperature_S.tolist() == [0.5, 0.5, 1.0]
    assert batch.old_logprob_S.tolist() == [-1, -2, -3]
    assert batch.sampler_logprob_S[:2].tolist() == [-0.5, -0.25]
    assert batch.sampler_logprob_S[2].isnan()
    assert batch.reference_logprob_S.isnan().all()


@given(st.lists(st.integers(2, 12), min_size=1, max_size=6), st.integers(1, 3))
def test_every_target_follows_its_row_in_its_own_document(lengths, num_prompt):
    examples = [
        [100 * number + i for i in range(max(length, num_prompt + 1))]
        for number, length in enumerate(lengths)
    ]
    batch = pack(prepare_sft(sft_request(examples, num_prompt).sft).documents)
    assert (batch.token_ids_T[batch.rows_S] + 1).tolist() == batch.targets_S.tolist()
    assert (batch.targets_S // 100).tolist() == batch.document_S.tolist()
