"""The multi-token-prediction layer over pages against its packed form, which training runs.

Float32 sums in another order: within 1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from kiln_engine.domain import BatchPlan, RowSampling, SamplingParams, StateCheckpoint, VerifyRow
from kiln_engine.execution.drafting import Drafter, DraftPass
from kiln_engine.execution.draws import uniform_draws
from kiln_engine.execution.sampled_ids import DraftIds
from kiln_engine.execution.sampler import sample
from kiln_engine.model import Linears
from kiln_engine.model.mtp_layer import DraftPlaces, MtpHidden
from tests.support.engine_plans import EngineRig, HandSequence, relative_error, token_ids
from tests.support.engine_serving import KERNEL_SHAPE
from tests.support.packed_mtp import PackedMtp
from tests.support.tiny_models import make_checkpoint

TOLERANCE = 1e-5
TOKENS = token_ids(90, seed=5)
MAX_DRAFTS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtp")
    make_checkpoint(folder, seed=8)
    return folder


def make_rig(folder: Path, hidden: MtpHidden = "normed", **options) -> EngineRig:
    return EngineRig(folder, mtp_hidden=hidden, max_draft_tokens=MAX_DRAFTS, **options)


@torch.inference_mode()
def last_state(rig: EngineRig, sequence: HandSequence, token: int) -> torch.Tensor:
    """The layer's state for the next token, which attends to all entries that passes have written."""
    layer = rig.model.mtp
    assert layer is not None
    device = rig.model.device
    slot = torch.tensor([sequence.state_slot], device=device)
    position = sequence.num_computed
    rig.cover(sequence, position + 1)
    rig.model.pages.update(BatchPlan(0, (rig.decode(sequence, token),)))
    room = torch.tensor([len(sequence.page_ids) * rig.page_tokens], device=device)
    return layer.forward(
        torch.tensor([token], device=device),
        layer.carried.last(slot),
        torch.tensor([position], device=device),
        DraftPlaces(slot, room),
        Linears(rig.model.matrices),
    )


def verify(rig: EngineRig, rows: Sequence[VerifyRow], accepted: Sequence[int]) -> torch.Tensor:
    """Run the rows' pass, and count `accepted` lines of each as its sequence's."""
    plan = BatchPlan(0, verify_rows=tuple(rows))
    with torch.inference_mode():
        rig.model.prepare(plan)
        layout = rig.model.layout(plan)
        logits = rig.model.forward(layout)
        assert layout.verify is not None
        assert rig.model.mtp is not None
        rig.model.mtp.carried.accept(layout.verify.live_slots_R, torch.tensor(accepted))
    return logits


@pytest.mark.parametrize("hidden", ["normed", "residual"])
@pytest.mark.parametrize("splits", [(), (16,), (32, 48), (16, 32, 48)])
def test_entries_of_prompts_are_those_of_the_packed_form(folder, hidden, splits):
    rig, packed = make_rig(folder, hidden), PackedMtp(folder, hidden)
    sequence, other = rig.sequence(), rig.sequence()
    rig.prefill(other, TOKENS[50:70])
    rig.prefill(sequence, TOKENS[:61], splits)
    state = last_state(rig, sequence, TOKENS[61])
    tokens = TOKENS[:62]
    expected = packed.states(tokens, packed.hidden(tokens))[60]
    if hidden == "residual":
        state = rig.model.mtp._norm(state, "mtp.norm")
    assert relative_error(state, expected[None]) < TOLERANCE


def test_entries_of_decode_steps_beside_prompts_are_those_of_the_packed_form(folder):
    rig, packed = make_rig(folder), PackedMtp(folder)
    first, second = rig.sequence(), rig.sequence()
    rig.prefill(first, TOKENS[:13])
    for number in range(20):
        # In another slot from the second page on.
        commit = rig.take_slot() if first.num_computed == 31 else None
        rows = [rig.decode(first, TOKENS[13 + number], commit)]
        chunks = []
        if number in (4, 9):
            start = second.num_computed
            chunks = [rig.chunk(second, TOKENS[40:][start : start + 16])]
        rig.step(rows, chunks)
    for sequence, tokens in ((first, TOKENS[:34]), (second, TOKENS[40:73])):
        state = last_state(rig, sequence, tokens[-1])
        expected = packed.states(tokens, packed.hidden(tokens))[len(tokens) - 2]
        assert relative_error(state, expected[None]) < TOLERANCE


def test_entries_of_lines_that_stand_are_those_of_the_packed_form(folder):
    rig, packed = make_rig(folder), PackedMtp(folder)
    first, second = rig.sequence(), rig.sequence()
    for sequence in (first, second):
        rig.prefill(sequence, TOKENS[:14])
    accepted = [(3, 0), (0, 2), (1, 1), (3, 3), (2, 0), (0, 3), (3, 1), (1, 2)]
    for counts in accepted:
        rows = []
        for sequence, count in zip((first, second), counts, strict=True):
            place = sequence.num_computed
            drafts = TOKENS[place + 1 : place + 1 + count] + [7] * (MAX_DRAFTS - count)
            rows.append(rig.verify(sequence, TOKENS[place], drafts, num_accepted=count))
        verify(rig, rows, [1 + count for count in counts])
    for sequence in (first, second):
        tokens = TOKENS[: sequence.num_computed + 1]
        state = last_state(rig, sequence, tokens[-1])
        expected = packed.states(tokens, packed.hidden(tokens))[len(tokens) - 2]
        assert relative_error(state, expected[None]) < TOLERANCE


def test_a_prefix_hit_finds_its_entries_and_takes_the_state_before_it_for_zeros(folder):
    rig, packed = make_rig(folder), PackedMtp(folder)
    first, hit, checkpoint = rig.sequence(), rig.sequence(), rig.take_slot()
    rig.step(chunks=[rig.chunk(first, TOKENS[:40], [StateCheckpoint(32, checkpoint)])])
    hit.num_computed, hit.read_slot, hit.page_ids = 32, checkpoint, first.page_ids[:2]
    rig.step(chunks=[rig.chunk(hit, TOKENS[32:53])])
    tokens = TOKENS[:54]
    carried = packed.hidden(tokens).clone()
    carried[31] = 0
    expected = packed.states(tokens, carried)[52]
    assert relative_error(last_state(rig, hit, tokens[-1]), expected[None]) < TOLERANCE


def draft(rig: EngineRig, sequences, drawn, count: int, samplings, num_tokens=None) -> list[list[int]]:
    """Drafts behind one line each, which drew `drawn`."""
    rows = [
        rig.verify(sequence, TOKENS[sequence.num_computed], (), num_accepted=0, sampling=sampling)
        for sequence, sampling in zip(sequences, samplings, strict=True)
    ]
    plan = BatchPlan(0, verify_rows=tuple(rows))
    draft_ids = DraftIds(rig.states.num_slots, MAX_DRAFTS, torch.device("cpu"))
    with torch.inference_mode():
        rig.model.prepare(plan)
        layout = rig.model.layout(plan)
        rig.model.forward(layout)
        passes = Drafter(rig.model.mtp, rig.model.matrices, rig.adapters, draft_ids, num_tokens).of(
            len(rows) + 1
        )
        passes.send(rows)
        passes.begin(layout.verify, torch.tensor(drawn)[:, None], torch.ones(len(rows), dtype=torch.long))
        for _ in range(count):
            passes.step()
    return [draft_ids.ids_SK[sequence.state_slot].tolist()[:count] for sequence in sequences]


def _sampling(**params) -> RowSampling:
    return RowSampling(SamplingParams(**params), output_index=4)


def test_greedy_drafts_over_the_whole_vocabulary_are_the_packed_forms_likeliest(folder):
    rig, packed = make_rig(folder), PackedMtp(folder)
    sequences = [rig.sequence() for _ in range(3)]
    lengths = (15, 30, 47)
    for sequence, length in zip(sequences, lengths, strict=True):
        rig.prefill(sequence, TOKENS[:length])
    drawn = [11, 12, 13]
    drafts = draft(rig, sequences, drawn, MAX_DRAFTS, [_sampling(temperature=0.0)] * 3)
    for length, token, guessed in zip(lengths, drawn, drafts, strict=True):
        assert guessed == packed.drafts([*TOKENS[: length + 1], token], MAX_DRAFTS)


def test_a_reduced_head_guesses_among_the_lowest_ids(folder):
    rig, packed = make_rig(folder), PackedMtp(folder)
    sequence = rig.sequence()
    rig.prefill(sequence, TOKENS[:20])
    ((guess,),) = draft(rig, [sequence], [5], 1, [_sampling(temperature=0.0)], num_tokens=40)
    tokens = [*TOKENS[:21], 5]
    hidden_TD = packed.hidden(tokens)
    logits = packed.model.logits(packed.states(tokens, hidden_TD)[len(tokens) - 2])
    assert guess == int(logits[:40].argmax())


def test_a_draft_is_drawn_with_the_random_number_of_its_token(folder):
    rig, packed = make_rig(folder), PackedMtp(folder)
    sequence = rig.sequence()
    rig.prefill(sequence, TOKENS[:20])
    params = SamplingParams(temperature=1.3, top_p=0.9, seed=123)
    row = RowSampling(params, output_index=4)
    ((guess,),) = draft(rig, [sequence], [5], 1, [row])
    tokens = [*TOKENS[:21], 5]
    logits = packed.model.logits(packed.states(tokens, packed.hidden(tokens))[len(tokens) - 2])
    token = sample(logits[None].float(), [RowSampling(params, output_index=5)]).wait()[0].token_id
    assert guess == token


def test_the_second_draft_behind_accepted_lines_has_the_number_of_its_place(folder):
    """Where the layer is taken out of it, drafts are the plain inverse of their random numbers."""
    rig = make_rig(folder)
    with torch.inference_mode():
        rig.model.matrices.head_VD = torch.zeros_like(rig.model.matrices.head_VD)
    sequence = rig.sequence()
    rig.prefill(sequence, TOKENS[:20])
    row = RowSampling(SamplingParams(temperature=1.0, seed=77), output_index=9)
    verified = rig.verify(sequence, TOKENS[20], TOKENS[21:24], num_accepted=2, sampling=row)
    plan = BatchPlan(0, verify_rows=(verified,))
    draft_ids = DraftIds(rig.states.num_slots, MAX_DRAFTS, torch.device("cpu"))
    with torch.inference_mode():
        rig.model.prepare(plan)
        layout = rig.model.layout(plan)
        rig.model.forward(layout)
        passes: DraftPass = Drafter(rig.model.mtp, rig.model.matrices, rig.adapters, draft_ids, None).of(1)
        passes.send([verified])
        # Three lines stand, the third drew token number 11 of the answer: the drafts are 12 to 14.
        passes.begin(layout.verify, torch.tensor([[1, 2, 3, 4]]), torch.tensor([3]))
        for _ in range(MAX_DRAFTS):
            passes.step()
    vocab_size = rig.config.vocab_size
    expected = (uniform_draws([77] * 3, [12, 13, 14]) * vocab_size).astype(int).tolist()
    assert draft_ids.ids_SK[sequence.state_slot].tolist() == expected


def test_a_row_whose_pages_are_full_writes_into_nobody_elses(folder):
    rig = make_rig(folder)
    sequence = rig.sequence()
    rig.prefill(sequence, TOKENS[:14])
    rig.cover(sequence, 16)
    row = rig.verify(sequence, TOKENS[14], (), num_accepted=0)
    # As if there were no more pages than the first.
    row = VerifyRow(**{**{f: getattr(row, f) for f in row.__slots__}, "page_ids": row.page_ids[:1]})
    plan = BatchPlan(0, verify_rows=(row,))
    draft_ids = DraftIds(rig.states.num_slots, MAX_DRAFTS, torch.device("cpu"))
    with torch.inference_mode():
        rig.model.prepare(plan)
        layout = rig.model.layout(plan)
        rig.model.forward(layout)
        before = [cache.clone() for cache in rig.kv.layer(rig.config.num_full_layers)]
        passes = Drafter(rig.model.mtp, rig.model.matrices, rig.adapters, draft_ids, None).of(1)
        passes.send([row])
        passes.begin(layout.verify, torch.tensor([[1]]), torch.tensor([1]))
        for _ in range(MAX_DRAFTS):
            passes.step()
    for cache, old in zip(rig.kv.layer(rig.config.num_full_layers), before, strict=True):
        changed = (cache != old).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == [row.page_ids[0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_entries_on_a_gpu_are_those_of_the_packed_form(tmp_path, dtype, tolerance):
    """bfloat16: some tens of roundings of 0.4 % on the way. The shape is one that the kernels take."""
    make_checkpoint(tmp_path, seed=8, **KERNEL_SHAPE)
    rig, packed = make_rig(tmp_path, device="cuda", dtype=dtype), PackedMtp(tmp_path)
    sequence = rig.sequence()
    rig.prefill(sequence, TOKENS[:40], (16,))
    for token in TOKENS[40:60]:
        rig.step([rig.decode(sequence, token)])
    state = last_state(rig, sequence, TOKENS[60])
    expected = packed.states(TOKENS[:61], packed.hidden(TOKENS[:61]))[59]
    assert relative_error(state.float().cpu(), expected[None]) < tolerance
