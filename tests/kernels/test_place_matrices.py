"""Matrices of one block, each taken to its place: against torch's copies."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.place_matrices import TILE_ITEMS, Placement, PlacementTable, place_matrices_
from kiln_nn.kernels.place_matrices.reference import place_matrices_reference_
from tests.support.triton_kernels import (
    CAPABILITIES,
    DEVICE,
    compiling_instead_of_launching,
    needs_triton,
    on_triton,
    only_outside_interpreter,
    run_under_interpreter,
    starts_interpreter,
)

SLOTS, SLOT, BEFORE = 3, 1, 7


class Case:
    """A small and a large A, a B whose target is transposed, and one that has no source."""

    def __init__(self, source: torch.dtype, target: torch.dtype) -> None:
        shapes = [(4, 10), (2, TILE_ITEMS + 17), (300, 3), (5, 6)]
        tables = [torch.full((SLOTS, rows + 2, columns), 9.0) for rows, columns in shapes]
        tables[2] = torch.full((SLOTS, 5, 320), 9.0)
        self.tables = [table.to(DEVICE, target) for table in tables]
        targets = [table[:, : shape[0]] for table, shape in zip(self.tables, shapes, strict=True)]
        targets[2] = self.tables[2][:, :3, 10:310].transpose(1, 2)
        items, placements = BEFORE, []
        for (rows, columns), one in zip(shapes, targets, strict=True):
            placements.append(Placement(items if one is not targets[3] else None, one))
            items += rows * columns
        generator = torch.Generator().manual_seed(1)
        self.block = torch.randn(items - BEFORE, generator=generator).to(DEVICE, source)
        self.placements = placements
        self.has_non_finite = torch.zeros(1, dtype=torch.int32, device=DEVICE)


def expected(source: torch.dtype, target: torch.dtype) -> Case:
    case = Case(source, target)
    place_matrices_reference_(case.placements, case.block, BEFORE, SLOT, case.has_non_finite)
    return case


@needs_triton
@on_triton
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_every_matrix_goes_to_its_place_and_nowhere_else(source: torch.dtype, target: torch.dtype):
    from kiln_nn.kernels.place_matrices import triton

    case, wanted = Case(source, target), expected(source, target)
    table = PlacementTable(case.placements, torch.device(DEVICE))
    for start, end in ((0, 2), (2, 4)):  # as a file comes in pieces
        triton.place_matrices_(table, start, end, case.block, BEFORE, SLOT, case.has_non_finite)
    # The interpreter cuts bfloat16 off instead of rounding it; elsewhere the bits are torch's.
    tolerance = 2**-7 if DEVICE == "cpu" and target is torch.bfloat16 else 0.0
    for got, one in zip(case.tables, wanted.tables, strict=True):
        torch.testing.assert_close(got, one, rtol=tolerance, atol=0)
    assert not case.has_non_finite.item()


@needs_triton
@on_triton
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_what_is_not_finite_in_the_targets_format_is_told(value: float):
    from kiln_nn.kernels.place_matrices import triton

    case = Case(torch.float32, torch.float16)
    case.block[50] = value
    table = PlacementTable(case.placements, torch.device(DEVICE))
    triton.place_matrices_(table, 0, 4, case.block, BEFORE, SLOT, case.has_non_finite)
    assert case.has_non_finite.item()


def test_the_reference_serves_what_is_not_on_a_gpu():
    case, wanted = Case(torch.float32, torch.bfloat16), expected(torch.float32, torch.bfloat16)
    case.block = case.block.cpu()
    table = PlacementTable(case.placements, torch.device(DEVICE))
    place_matrices_(table, 0, 4, case.block.to(DEVICE), BEFORE, SLOT, case.has_non_finite)
    for got, one in zip(case.tables, wanted.tables, strict=True):
        assert torch.equal(got, one)


@starts_interpreter
def test_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@needs_triton
@only_outside_interpreter
def test_the_kernel_compiles_for_every_supported_gpu():
    from kiln_nn.kernels.place_matrices import triton

    case = Case(torch.float32, torch.bfloat16)
    table = PlacementTable(case.placements, torch.device(DEVICE))
    with compiling_instead_of_launching() as compiled:
        triton.place_matrices_(table, 0, 4, case.block, BEFORE, SLOT, case.has_non_finite)
    assert {one.capability for one in compiled} == set(CAPABILITIES)
