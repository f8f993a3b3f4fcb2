"""Forbidding tokens by bits: the reference by hand, the kernel against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.token_mask import mask_tokens_, num_words, reference
from tests.support.triton_kernels import (
    CAPABILITIES,
    DEVICE,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    poison_new_memory,
    run_under_interpreter,
    starts_interpreter,
)


def _kernel():
    from kiln_nn.kernels.token_mask import triton

    return triton


def _random_case(num_rows: int, vocab_size: int, rows: list[int]):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator)
    shape = (len(rows), num_words(vocab_size))
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)
    return logits, torch.tensor(rows), bits


def test_a_token_whose_bit_is_not_set_is_forbidden():
    logits = torch.zeros(3, 40)
    bits = torch.tensor([[0b101, 1], [-1, -1]], dtype=torch.int32)
    log_totals = mask_tokens_(logits, torch.tensor([2, 0]), bits)
    assert log_totals.tolist() == pytest.approx([math.log(40)] * 2)
    assert logits[2].isfinite().nonzero()[:, 0].tolist() == [0, 2, 32]
    assert torch.equal(logits[:2], torch.zeros(2, 40))


def test_too_few_words_are_refused():
    with pytest.raises(ShapeMismatch):
        mask_tokens_(torch.zeros(1, 33), torch.tensor([0]), torch.zeros(1, 1, dtype=torch.int32))
    with pytest.raises(ShapeMismatch):
        mask_tokens_(torch.zeros(2, 32), torch.tensor([0, 1]), torch.zeros(1, 1, dtype=torch.int32))


@starts_interpreter
def test_the_kernel_in_the_interpreter():
    run_under_interpreter(__file__)


@on_triton
@pytest.mark.parametrize(
    ("num_rows", "vocab_size", "rows"),
    [(1, 1, [0]), (4, 300, [3, 1]), (3, 4096, [0, 1, 2]), (2, 4097, [1]), (5, 10_000, [4, 0])],
)
def test_the_kernel_forbids_what_the_reference_forbids(num_rows, vocab_size, rows):
    logits, rows_M, bits_MW = _random_case(num_rows, vocab_size, rows)
    ours = logits.to(DEVICE, copy=True)
    assert _kernel().takes(ours, rows_M.to(DEVICE), bits_MW.to(DEVICE))
    log_totals = _kernel().mask_tokens_(ours, rows_M.to(DEVICE), bits_MW.to(DEVICE))
    expected = reference.mask_tokens_(logits, rows_M, bits_MW)
    assert torch.equal(ours.cpu(), logits)
    # Float32 sums of up to 10,000 terms in another order.
    torch.testing.assert_close(log_totals.cpu(), expected, rtol=0, atol=1e-5)


@on_triton
def test_forbidden_blocks_and_rows_that_are_not_numbers(monkeypatch):
    poison_new_memory(monkeypatch)
    logits, rows_M, bits_MW = _random_case(3, 9000, [0, 1, 2])
    logits[0, :5000] = -math.inf
    logits[1] = math.nan
    logits[2] = -math.inf
    log_totals = (
        _kernel().mask_tokens_(logits.to(DEVICE, copy=True), rows_M.to(DEVICE), bits_MW.to(DEVICE)).cpu()
    )
    assert float(log_totals[0]) == pytest.approx(float(logits[0, 5000:].logsumexp(0)), abs=1e-5)
    assert math.isnan(log_totals[1])
    assert float(log_totals[2]) == -math.inf


@on_triton
def test_rows_of_a_larger_buffer():
    logits, rows_M, bits_MW = _random_case(6, 500, [2, 5])
    buffer = torch.zeros(6, 700)
    buffer[:, :500] = logits
    buffer = buffer.to(DEVICE)
    _kernel().mask_tokens_(buffer[:, :500], rows_M.to(DEVICE), bits_MW.to(DEVICE))
    reference.mask_tokens_(logits, rows_M, bits_MW)
    assert torch.equal(buffer[:, :500].cpu(), logits)
    assert not buffer[:, 500:].any()


@only_outside_interpreter
@needs_triton
def test_it_compiles_for_every_supported_gpu():
    with compiling_instead_of_launching() as compiled:
        for vocab_size in (300, 248_320):
            logits, rows_M, bits_MW = _random_case(2, vocab_size, [1])
            _kernel().mask_tokens_(logits, rows_M, bits_MW)
    assert len(compiled) == 2 * 2 * len(CAPABILITIES)
