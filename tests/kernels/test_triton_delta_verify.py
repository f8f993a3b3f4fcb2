"""Several new tokens per row in Triton against the float64 reference, nonsense wherever nothing is kept."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.delta_decode.verify_reference import delta_fold_reference, delta_verify_reference
from tests.support.delta_decode import (
    DeltaShape,
    assert_written_alike,
    converted,
    exact,
    make_rows,
    memory_tensors,
    random_memory,
    random_tokens,
    random_weights,
    stacked,
    tokens_to,
    weights_to,
)
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    SHARED_MEMORY_LIMIT,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

FORMATS = {  # state, everything else
    "float32": (torch.float32, torch.float32),
    "bf16 around float32": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
}
# As in test_triton_delta_decode.py.
BF16 = 4e-3 if INTERPRETED else 2e-3
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: BF16}
RING_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-5}


def _kernel():
    from kiln_nn.kernels.delta_decode import triton_verify

    return triton_verify


def _fold():
    from kiln_nn.kernels.delta_decode import triton_fold

    return triton_fold


@starts_interpreter
def test_the_kernel_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def _run(shape: DeltaShape, rows: tuple, num_new: list[int], formats: str, num_lines: int) -> None:
    """Rows as `make_rows` takes them; lines beyond a row's new tokens are NaN."""
    state_dtype, dtype = FORMATS[formats]
    draw = torch.Generator().manual_seed(num_lines)
    lengths = {row[1]: row[2] for row in rows if row is not None}
    before = converted(random_memory(shape, lengths, draw), state_dtype, dtype, DEVICE)
    weights = weights_to(random_weights(shape, draw), dtype, DEVICE)
    lines = stacked([random_tokens(shape, len(rows), draw) for _ in range(num_lines)])
    tokens = tokens_to(lines, dtype, DEVICE)
    for row, count in enumerate(num_new):
        for tensor in tokens.all():
            tensor[row, count:] = float("nan")
    tolerances = TOLERANCE[state_dtype], RING_TOLERANCE[state_dtype]
    memory, unfolded = (converted(before, state_dtype, dtype, DEVICE) for _ in range(2))
    expected_memory = exact(before)
    _fold().delta_fold(memory.as_layers(), make_rows(*rows, device=DEVICE))
    delta_fold_reference(expected_memory.as_layers(), make_rows(*rows))
    assert_written_alike(before, memory, expected_memory, *tolerances)

    # The new tokens read the states that were written, rounded as they are.
    before, in_float64 = converted(memory, state_dtype, dtype, DEVICE), torch.float64
    expected_memory, counts = exact(before), torch.tensor(num_new, device=DEVICE)
    arguments = make_rows(*rows, device=DEVICE), counts, weights, *tokens.all()
    out = _kernel().delta_verify(memory, *arguments, folds=False)
    expected = delta_verify_reference(
        expected_memory,
        make_rows(*rows),
        counts.cpu(),
        weights_to(weights, in_float64),
        *tokens_to(tokens, in_float64).all(),
        folds=False,
    )
    assert out.dtype == dtype
    for row, count in enumerate(num_new):
        assert out[row, count:].eq(0).all()
    assert relative_error(out, expected) < TOLERANCE[dtype]
    assert_written_alike(before, memory, expected_memory, *tolerances)
    assert torch.equal(_kernel().delta_verify(unfolded, *arguments), out)
    for one, other in zip(memory_tensors(unfolded), memory_tensors(memory), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


# Read, ring, length, slot of a fold: pages not full yet, a shared checkpoint, folds in place and away
# with as many and as few tokens behind the boundary as there can be, padding.
ROWS = ((3, 3, 0, None), (0, 1, 9, None), None, (0, 2, 15, None), (4, 4, 16, 4), (5, 5, 23, 6), (7, 7, 19, 7))
NUM_NEW = [8, 3, 0, 8, 1, 8, 5]


@on_triton
@pytest.mark.parametrize("formats", list(FORMATS))
def test_rows_of_all_kinds(formats):
    _run(DeltaShape(capacity=24), ROWS, NUM_NEW, formats, num_lines=8)


@on_triton
@pytest.mark.parametrize("formats", list(FORMATS))
def test_the_released_head_shape(formats):
    shape = DeltaShape(num_key_heads=1, num_heads=2, key_dim=128, value_dim=128, num_slots=5, capacity=16 + 3)
    _run(shape, ((0, 0, 7, None), (1, 2, 18, 3)), [4, 3], formats, num_lines=4)


@on_triton
@pytest.mark.parametrize(
    ("shape", "num_lines"),
    [
        (DeltaShape(num_key_heads=1, num_heads=3, capacity=19), 4),
        (DeltaShape(num_key_heads=2, num_heads=2, key_dim=32, value_dim=16, conv_width=2, capacity=16), 1),
        (DeltaShape(num_key_heads=1, num_heads=2, conv_width=8, capacity=40, page_tokens=32), 8),
    ],
)
def test_other_shapes(shape, num_lines):
    longest = shape.page_tokens + num_lines - 1
    rows = ((0, 1, longest, 5), (2, 2, shape.page_tokens - 1, None), (3, 4, 1, None))
    _run(shape, rows, [num_lines, num_lines, 1], "float32", num_lines)


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(
    ("is_dependent", "capabilities"), [(False, (86,)), (True, (90,))], ids=["plain", "dependent"]
)
@pytest.mark.parametrize("formats", ["bf16 around float32", "bf16"])
def test_it_compiles_for_every_supported_gpu(monkeypatch, formats, is_dependent, capabilities):
    monkeypatch.setattr(_kernel(), "supports_dependent_launch", lambda device: is_dependent)
    state_dtype, dtype = FORMATS[formats]
    shape = DeltaShape(num_key_heads=16, num_heads=32, key_dim=128, value_dim=128, num_slots=1, capacity=24)
    draw = torch.Generator().manual_seed(7)
    memory = converted(random_memory(shape, {}, draw), state_dtype, dtype)
    weights = weights_to(random_weights(shape, draw), dtype)
    tokens = tokens_to(stacked([random_tokens(shape, 1, draw) for _ in range(8)]), dtype)
    with compiling_instead_of_launching(capabilities) as compiled:
        _kernel().delta_verify(memory, make_rows((0, 0, 0, None)), torch.tensor([8]), weights, *tokens.all())
    names = ("delta_fold_kernel", "verify_keys_kernel", "verify_values_kernel")
    assert [(one.name, one.capability) for one in compiled] == [(n, c) for n in names for c in capabilities]
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[86] for one in compiled)
