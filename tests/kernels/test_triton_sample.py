"""The sampler's kernels against a float64 oracle that sorts: easy rows, adversarial ones, edits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.sample import draw_tokens, reference, settings
from tests.support.sampling_cases import RULES, Rule, check_draw, logits_by_shape, tables
from tests.support.triton_kernels import (
    CAPABILITIES,
    DEVICE,
    INTERPRETED,
    SHARED_MEMORY_LIMIT,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    poison_new_memory,
    run_under_interpreter,
    starts_interpreter,
)

# Sums of float32 weights, some of them near 1e-7 of the total.
TOLERANCE = 2e-6
VOCAB = 5000 if INTERPRETED else 248_320
SHAPES = list(logits_by_shape(2048, 0))


def _kernels():
    from kiln_nn.kernels.sample import triton

    return triton


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture
def poisoned(monkeypatch):
    poison_new_memory(monkeypatch)
    if INTERPRETED:  # where sorting a thousand candidates takes a second
        monkeypatch.setattr(_kernels(), "FEW_CANDIDATES", 64)
        monkeypatch.setattr(_kernels(), "MOST_CANDIDATES", 128)


def _uniforms(count: int, seed: int) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def _draw_with(implementation, logits_RV, rows_RF, edits_EF):
    tokens_R = torch.full(rows_RF.shape[:1], -1, device=rows_RF.device)
    drawn_RF = rows_RF.new_full((len(rows_RF), settings.NUM_DRAWN_FIELDS), torch.nan)
    implementation.draw_tokens(logits_RV, rows_RF, edits_EF, tokens_R, drawn_RF)
    return tokens_R, drawn_RF


def _draw(logits_RV: torch.Tensor, rules: list[Rule]) -> list[list[float]]:
    """Draw with the kernels; the logits must come back as they were."""
    logits, before = logits_RV.to(DEVICE, copy=True), logits_RV
    tokens, drawn = _draw_with(_kernels(), logits, *tables(rules, DEVICE))
    assert torch.equal(logits, before.to(DEVICE))
    assert tokens.tolist() == drawn[:, settings.DRAWN_TOKEN].long().tolist()
    return drawn.tolist()


@on_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_every_rule_on_every_shape_of_row(shape, poisoned):
    seed = SHAPES.index(shape)
    logits = logits_by_shape(VOCAB, seed)[shape].to(DEVICE)
    names = list(RULES)[seed % 4 :: 4] if INTERPRETED else list(RULES)
    uniforms = _uniforms(len(names), seed)
    rules = [replace(RULES[name], uniform=u) for name, u in zip(names, uniforms, strict=True)]
    rows = _draw(logits.expand(len(rules), -1).contiguous(), rules)
    for name, rule, drawn in zip(names, rules, rows, strict=True):
        try:
            check_draw(drawn, logits, rule, TOLERANCE)
        except AssertionError as failure:
            raise AssertionError(f"{name} on {shape}: drawn {drawn}, {failure}") from failure


@on_triton
@pytest.mark.parametrize("vocab_size", [1, 63, 65, 300, 2048, 2049])
def test_odd_vocabularies(vocab_size, poisoned):
    rules = [Rule(), Rule(top_k=5, uniform=0.99), Rule(top_p=0.9, uniform=0.0), Rule(temperature=0)]
    logits = logits_by_shape(vocab_size, 3)["flat"] if vocab_size >= 600 else torch.randn(vocab_size)
    for drawn, rule in zip(_draw(logits.expand(4, -1).contiguous(), rules), rules, strict=True):
        check_draw(drawn, logits, rule, TOLERANCE)


@on_triton
def test_the_draws_of_the_reference(poisoned):
    """The same token for the same uniform number, but for numbers at a border between two."""
    num_rows = len(RULES) if INTERPRETED else 256
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_rows, VOCAB, generator=generator) * (torch.rand(num_rows, 1) * 4 + 1)
    names = list(RULES)
    rules = [
        replace(RULES[names[row % len(names)]], uniform=uniform)
        for row, uniform in enumerate(_uniforms(num_rows, 6))
    ]
    ours = _draw(logits, rules)
    theirs = _draw_with(reference, logits.to(DEVICE), *tables(rules, DEVICE))[0].tolist()
    different = [
        row for row, (drawn, token) in enumerate(zip(ours, theirs, strict=True)) if drawn[0] != token
    ]
    assert len(different) <= num_rows // 64
    for row in different:
        check_draw(ours[row], logits[row], rules[row], TOLERANCE)


@on_triton
def test_edits_change_what_is_drawn_and_not_what_is_reported(poisoned):
    generator = torch.Generator().manual_seed(7)
    num_rows = 6
    logits = torch.randn(num_rows, VOCAB, generator=generator) * 3
    best = logits.topk(40, dim=-1).indices
    ban = float("-inf")
    rules = [
        Rule(temperature=0, edits=tuple((int(t), 0.0, 1.0, ban) for t in best[0, :39])),
        Rule(),
        Rule(uniform=0.3, edits=tuple((int(t), 0.0, 1.7, -0.2) for t in torch.randperm(VOCAB)[:300])),
        Rule(top_k=10, uniform=0.8, edits=((VOCAB - 1, 100.0, 1.0, 0.0), (0, 99.5, 1.3, -0.1))),
        Rule(top_p=0.9, uniform=0.1, edits=tuple((int(t), 0.0, 1.0, ban) for t in best[4])),
        Rule(top_p=0.9, temperature=3.0, edits=tuple((int(t), -2.0, 1.2, 0.0) for t in best[5])),
    ]
    drawn = _draw(logits, rules)
    assert int(drawn[0][0]) == int(best[0, 39])
    for row, rule in enumerate(rules):
        check_draw(drawn[row], logits[row], rule, TOLERANCE)


@on_triton
def test_a_row_of_nans_harms_no_other(poisoned):
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(8))
    rules = [Rule(), Rule(), Rule(top_p=0.9), Rule(top_p=0.9), Rule(temperature=0), Rule(top_k=50)]
    clean = _draw(logits, rules)
    for row in (1, 3, 4, 5):
        logits[row] = torch.nan
    logits[3, : VOCAB // 2] = 1.0
    before = logits.clone()
    _, drawn = _draw_with(_kernels(), logits.to(DEVICE), *tables(rules, DEVICE))
    drawn = drawn.cpu()
    assert torch.equal(before.isnan(), logits.isnan())
    for row in (0, 2):
        assert drawn[row].tolist() == clean[row]
    for row in (1, 3, 4, 5):
        assert drawn[row, settings.LOGPROB].isnan()
        assert 0 <= int(drawn[row, settings.DRAWN_TOKEN]) < VOCAB


@on_triton
@pytest.mark.skipif(
    INTERPRETED, reason="as few draws as it can do say nothing; each one's place is checked above"
)
def test_frequencies_of_many_draws(poisoned):
    count = 4000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    rules = [Rule(top_p=0.85, uniform=uniform) for uniform in _uniforms(count, 9)]
    tokens = [int(row[0]) for row in _draw(logits.expand(count, -1).contiguous(), rules)]
    for token, share in enumerate([4 / 9, 3 / 9, 2 / 9, 0]):
        # Four standard deviations of a binomial count.
        assert abs(tokens.count(token) - count * share) <= 4 * (count * share * (1 - share)) ** 0.5


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="graphs are the GPU's")
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_a_captured_graph_follows_its_tables(num_rows):
    generator = torch.Generator(DEVICE).manual_seed(10)
    logits = torch.empty(num_rows, VOCAB, device=DEVICE)
    rows, edits = tables([Rule()] * num_rows, DEVICE)
    edits = torch.zeros(600, settings.NUM_EDIT_FIELDS, dtype=torch.float64, device=DEVICE)
    logits.normal_()
    draw_tokens(logits, rows, edits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, drawn = draw_tokens(logits, rows, edits)
    names = list(RULES)
    for turn in range(6):
        fresh = torch.randn(num_rows, VOCAB, generator=generator, device=DEVICE) * (1 + turn)
        rules = [
            replace(RULES[names[(row + turn) % len(names)]], uniform=uniform, edits=((turn, 5.0, 1.1, -0.5),))
            for row, uniform in enumerate(_uniforms(num_rows, turn))
        ]
        new_rows, new_edits = tables(rules)
        logits.copy_(fresh)
        rows.copy_(new_rows)
        edits[: len(new_edits)].copy_(new_edits)
        drawn.fill_(torch.nan)
        graph.replay()
        for row in range(0, num_rows, 1 + num_rows // 20):
            check_draw(drawn[row].tolist(), fresh[row], rules[row], TOLERANCE)


def test_wrong_tables_are_refused():
    rows, edits = tables([Rule()])
    with pytest.raises(ShapeMismatch):
        draw_tokens(torch.zeros(2, 5), rows, edits)
    with pytest.raises(ShapeMismatch):
        draw_tokens(torch.zeros(1, 5), rows, edits[:, :3])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_on_every_shape_of_row(shape):
    logits = logits_by_shape(3000, 1)[shape]
    rules = [
        replace(rule, uniform=uniform)
        for rule, uniform in zip(RULES.values(), _uniforms(len(RULES), 2), strict=True)
    ]
    _, drawn = _draw_with(reference, logits.expand(len(rules), -1).contiguous(), *tables(rules))
    for rule, row in zip(rules, drawn.tolist(), strict=True):
        check_draw(row, logits, rule, TOLERANCE)


@only_outside_interpreter
@needs_triton
def test_they_compile_for_every_supported_gpu():
    # One chunk, as the tests' small models have; the published vocabulary, alone and in a batch.
    shapes = [(5, 300), (1, 248_320), (256, 248_320)]
    with compiling_instead_of_launching() as compiled:
        for num_rows, vocab_size in shapes:
            _draw_with(
                _kernels(),
                torch.zeros(num_rows, vocab_size),
                torch.zeros(num_rows, settings.NUM_ROW_FIELDS, dtype=torch.float64),
                torch.zeros(64, settings.NUM_EDIT_FIELDS, dtype=torch.float64),
            )
    assert len(compiled) == 4 * len(shapes) * len(CAPABILITIES)
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] for one in compiled)
