"""The sampler at fixed places: what a graph holds draws what the simple entry draws."""

from __future__ import annotations

import math

import pytest
import torch

from kiln_engine.domain import RowSampling, SamplingParams
from kiln_engine.execution.draws import uniform_draw
from kiln_engine.execution.logit_edits import logit_edits, most_logit_edits
from kiln_engine.execution.sampled_ids import SampledIds
from kiln_engine.execution.sampler import Sampler, sample
from kiln_engine.execution.sampling_tables import exact_tables
from kiln_nn.kernels.sample import settings

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
VOCAB = 3000
SETTINGS: list[dict] = [
    {},
    {"temperature": 0.0},
    {"top_k": 20, "top_p": 0.95},
    {"logit_bias": {5: 3.0, 7: -100.0}},
    {"min_p": 0.1, "temperature": 0.7},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1},
    {"top_p": 0.8, "temperature": 2.0},
]


def rows_of_step(count: int, step: int) -> list[RowSampling]:
    rows = []
    for index in range(count):
        params = SamplingParams(seed=index * 7, **SETTINGS[(index + step) % len(SETTINGS)])
        history = params.needs_history
        rows.append(
            RowSampling(
                params,
                step,
                (1, 2, 3, 3) if history else (),
                (4, 4, 2) if history else (),
                frozenset({9}) if index % 5 == 0 else frozenset(),
            )
        )
    return rows


def logits_of_step(count: int, step: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(count, VOCAB, generator=generator) * 3).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("count", "capacity"), [(1, None), (7, 7), (5, 8), (12, 16)])
def test_steps_at_fixed_places_draw_what_the_simple_entry_draws(count, capacity, device):
    sampler = Sampler(16, VOCAB, torch.device(device))
    for step in range(3):
        rows = rows_of_step(count, step)
        assert not sampler.needs_eager(rows)
        logits = torch.full((capacity or count, VOCAB), 1.0, device=device)
        logits[:count] = logits_of_step(count, step, device)
        ids = sampler.launch(logits, sampler.prepare(rows, capacity))
        drawn = sampler.pending(rows).wait()
        expected = sample(logits[:count], rows).wait()
        assert drawn == expected
        assert ids[:count].tolist() == [row.token_id for row in expected]
        assert all(0 <= token < VOCAB for token in ids.tolist())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_with_steps_one_ahead_draws_what_the_simple_entry_draws():
    device = torch.device("cuda")
    sampler, ids = Sampler(16, VOCAB, device), SampledIds(20, device)
    logits = torch.zeros(16, VOCAB, device=device)
    slots = torch.full((16,), -1, device=device)
    tables = sampler.prepare([], 16)
    sampler.launch(logits, tables)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.keep_rows(slots, sampler.launch(logits, tables))
    launched = []
    for step in range(6):
        rows, fresh = rows_of_step(11, step), logits_of_step(11, step, "cuda")
        slots[:11].copy_(torch.arange(11) + step)
        assert sampler.prepare(rows, 16).rows_RF.data_ptr() == tables.rows_RF.data_ptr()
        logits[:11].copy_(fresh)
        graph.replay()
        launched.append((sampler.pending(rows), fresh, rows))
    for pending, fresh, rows in launched:
        assert pending.wait() == sample(fresh, rows).wait()
    known = torch.full((12,), -1, device=device)
    ids.feed_rows_(known, torch.tensor([*range(5, 16), -1], device=device))
    assert known[:11].tolist() == [row.token_id for row in launched[-1][0].wait()]


def test_top_logprobs_and_long_histories_go_around_the_graph():
    sampler = Sampler(4, VOCAB, torch.device("cpu"), max_edits=10)
    penalised = SamplingParams(repetition_penalty=1.1)
    assert sampler.needs_eager([RowSampling(SamplingParams(num_top_logprobs=1), 0)])
    assert sampler.needs_eager([RowSampling(SamplingParams(), 0)] * 5)
    assert sampler.needs_eager([RowSampling(penalised, 0, tuple(range(11)))])
    # Many tokens, few different ones.
    assert not sampler.needs_eager([RowSampling(penalised, 0, (1, 2) * 20, (3,) * 9)])
    assert not sampler.needs_eager([RowSampling(SamplingParams(), 0)] * 4)


def test_edits_name_each_token_once_with_all_that_changes_it():
    params = SamplingParams(
        logit_bias={8: 1.5, 2: -1.0},
        repetition_penalty=1.2,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    row = RowSampling(params, 0, (2, 3), (3, 3, 5), frozenset({5, 7}))
    assert logit_edits(row) == [
        (2, -1.0, 1.2, 0.0),
        (3, 0.0, 1.2, -1.0),
        (5, 0.0, 1.2, -math.inf),
        (7, 0.0, 1.0, -math.inf),
        (8, 1.5, 1.0, 0.0),
    ]
    assert most_logit_edits(row) >= 5
    assert most_logit_edits(RowSampling(SamplingParams(), 0)) == 0


def test_tables_say_where_each_rows_edits_lie():
    rows = [
        RowSampling(SamplingParams(), 4, banned_token_ids=frozenset({3, 1})),
        RowSampling(SamplingParams(temperature=0.0), 0),
        RowSampling(SamplingParams(seed=9, logit_bias={6: 1.0}, top_k=2), 1),
    ]
    tables = exact_tables(rows, torch.device("cpu"))
    spans = tables.rows_RF[:, [settings.FIRST_EDIT, settings.END_EDIT]].tolist()
    assert spans == [[0, 2], [0, 0], [2, 3]]
    assert tables.edits_EF[:, [settings.ROW, settings.TOKEN]].tolist() == [[0, 1], [0, 3], [2, 6]]
    assert tables.rows_RF[2, settings.UNIFORM] == uniform_draw(9, 1)
    assert tables.edits_EF.data_ptr() % 16 == 0  # three rows of seven numbers lie in front
    padded = Sampler(8, VOCAB, torch.device("cpu")).prepare(rows, 5).rows_RF
    assert padded[4].tolist() == [0.0, 0.0, 0.0, 1.0, -math.inf, 3.0, 3.0]


def test_padding_rows_keep_their_tokens_to_themselves():
    ids = SampledIds(3, torch.device("cpu"))
    ids.keep_rows(torch.tensor([2, -1, 0, -1]), torch.tensor([20, 7, 10, 8]))
    tokens = torch.tensor([-1, -1, 5, -1, -1])
    ids.feed_rows_(tokens, torch.tensor([0, 1, 2, 2, -1]))
    assert tokens[:4].tolist() == [10, 0, 5, 20]
