"""Embeddings and hidden states side by side: the kernel beside plain torch."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.joined_inputs import IN_PASS, NOT_KEPT, CarriedLines, joined_inputs, reference
from tests.support.triton_kernels import (
    CAPABILITIES,
    DEVICE,
    INTERPRETED,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    poison_new_memory,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

EPS = 1e-6
# One rounding to the output's format; the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3 if INTERPRETED else 2.5e-3}


def _kernel():
    from kiln_nn.kernels.joined_inputs import triton

    return triton


def _case(num_tokens: int, width: int, dtype: torch.dtype = torch.float32, device: str = DEVICE):
    generator = torch.Generator().manual_seed(num_tokens)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    token_ids = torch.randint(20, (num_tokens,), generator=generator).to(device)
    return draw(20, width), token_ids, draw(num_tokens, width), 0.1 * draw(width), 0.1 * draw(width)


def _carried(slots: list[int], width: int, dtype: torch.dtype = torch.float32, device: str = DEVICE):
    generator = torch.Generator().manual_seed(7)
    lines = torch.randn(6, 4, width, generator=generator).to(device, dtype)
    line = torch.tensor([3, 0, 1, 2, 0, 0], device=device)
    return CarriedLines(lines, line, torch.tensor(slots, device=device))


@starts_interpreter
def test_the_kernel_in_the_interpreter():
    run_under_interpreter(__file__)


def test_a_token_before_is_found_in_the_pass_among_what_was_kept_or_nowhere():
    _, _, hidden, _, _ = _case(4, 8, device="cpu")
    carried = _carried([NOT_KEPT, IN_PASS, 2, 0], 8, device="cpu")
    before = reference.hidden_before(carried, hidden)
    assert not before[0].any()
    assert torch.equal(before[1], hidden[0])
    assert torch.equal(before[2], carried.lines_SND[2, 1])
    assert torch.equal(before[3], carried.lines_SND[0, 3])


@on_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (3, 200), (9, 2560)])
def test_the_kernel_joins_what_the_reference_joins(num_tokens, width, dtype, monkeypatch):
    poison_new_memory(monkeypatch)
    case = _case(num_tokens, width, dtype)
    found = [IN_PASS, 5, NOT_KEPT, 0, IN_PASS, IN_PASS, 3, 2, IN_PASS][:num_tokens]
    for carried in (None, _carried(found, width, dtype)):
        assert _kernel().takes(*case, carried)
        ours = _kernel().joined_inputs(*case, EPS, carried=carried)
        expected = reference.joined_inputs(*case, EPS, carried=carried)
        assert relative_error(ours, expected) < TOLERANCE[dtype]


@on_triton
def test_rows_of_a_larger_buffer_are_read_where_they_lie():
    embedding, token_ids, hidden, *norms = _case(3, 96)
    wide = torch.full((3, 130), float("nan"), device=DEVICE)
    wide[:, :96] = hidden
    args = (embedding, token_ids, wide[:, :96], *norms)
    assert _kernel().takes(*args, None)
    expected = reference.joined_inputs(embedding, token_ids, hidden, *norms, EPS)
    assert relative_error(_kernel().joined_inputs(*args, EPS), expected) < 1e-6


def test_other_shapes_are_refused():
    embedding, token_ids, hidden, *norms = _case(3, 16, device="cpu")
    with pytest.raises(ShapeMismatch):
        joined_inputs(embedding, token_ids[:2], hidden, *norms, EPS)
    with pytest.raises(ShapeMismatch):
        joined_inputs(embedding, token_ids, hidden, *norms, EPS, carried=_carried([0, 1], 16, device="cpu"))


@only_outside_interpreter
@needs_triton
def test_it_compiles_for_every_supported_gpu():
    with compiling_instead_of_launching() as compiled:
        for dtype in TOLERANCE:
            case = _case(2, 2560, dtype, "cpu")
            _kernel().joined_inputs(*case, EPS)
            _kernel().joined_inputs(*case, EPS, carried=_carried([0, IN_PASS], 2560, dtype, "cpu"))
    assert len(compiled) == 2 * 2 * len(CAPABILITIES)
