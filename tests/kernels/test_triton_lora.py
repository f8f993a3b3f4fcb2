"""LoRA over the tables in Triton against its float64 reference, with NaN wherever nothing may be read."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.linear import linear
from kiln_nn.kernels.lora import (
    AdapterUse,
    LoraRows,
    RowsShape,
    TokenGroup,
    lora_add_,
    pack_groups,
)
from kiln_nn.kernels.lora.reference import lora_add_reference_
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

NAN = float("nan")
# Of what is added. float32: sums in another order. bf16: `A x` rounds once before B, 1.7e-3 (the
# interpreter cuts off instead).
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4.5e-3 if INTERPRETED else 2.5e-3}
# Adapter in the tables -> rank; the others are NaN from end to end.
RANKS = {0: 16, 2: 8, 3: 24, 5: 3}


def _kernel():
    from kiln_nn.kernels.lora import triton

    return triton


@starts_interpreter
def test_the_kernel_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that nobody wrote is NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


def group_of(first: int, count: int, *adapters: tuple[int, float]) -> TokenGroup:
    return TokenGroup(
        range(first, first + count), tuple(AdapterUse(index, RANKS[index], s) for index, s in adapters)
    )


class Case:
    """Tables with NaN beyond every adapter's rank, and rows of x and y with NaN between them."""

    def __init__(
        self,
        num_tokens: int,
        num_inputs: int,
        bounds: tuple[int, ...],
        dtype: torch.dtype,
        table_rank: int = 32,
    ) -> None:
        draw = torch.Generator().manual_seed(num_tokens + num_inputs)
        num_modules, num_outputs = len(bounds) - 1, bounds[-1]
        a = torch.full((6, num_modules, table_rank, num_inputs), NAN)
        b = torch.full((6, table_rank, num_outputs), NAN)
        for index, rank in RANKS.items():
            a[index, :, :rank] = torch.randn(num_modules, rank, num_inputs, generator=draw) / num_inputs**0.5
            b[index, :rank] = torch.randn(rank, num_outputs, generator=draw)
        self.bounds = bounds
        self.a_SQI, self.b_SRO = a.flatten(1, 2).to(DEVICE, dtype), b.to(DEVICE, dtype)
        self.x_TI = torch.full((num_tokens, num_inputs + 16), NAN, device=DEVICE, dtype=dtype)[:, :num_inputs]
        self.x_TI.copy_(torch.randn(num_tokens, num_inputs, generator=draw))
        self.y_all = torch.full((num_tokens, num_outputs + 16), NAN, device=DEVICE)
        self.y_all[:, :num_outputs] = torch.randn(num_tokens, num_outputs, generator=draw).to(DEVICE)

    def y(self, dtype: torch.dtype) -> torch.Tensor:
        """A fresh y with a row stride."""
        return self.y_all.to(dtype, copy=True)[:, : self.bounds[-1]]

    def expected(self, y_TO: torch.Tensor, rows: LoraRows) -> torch.Tensor:
        y = y_TO.double()
        lora_add_reference_(
            y, self.x_TI.double(), self.a_SQI.double(), self.b_SRO.double(), rows, self.bounds
        )
        return y

    def check(self, rows: LoraRows, used: set[int], y_dtype: torch.dtype, config=None) -> None:
        before, y = self.y(y_dtype), self.y(y_dtype)
        assert _kernel().supports(y, self.x_TI, self.a_SQI, self.b_SRO, len(self.bounds) - 1)
        _kernel().lora_add_(y, self.x_TI, self.a_SQI, self.b_SRO, rows, self.bounds, config)
        expected = self.expected(before, rows)
        unused = sorted(set(range(len(y))) - used)
        assert torch.equal(y[unused], before[unused])
        added, wanted = y[sorted(used)].double(), expected[sorted(used)]
        tolerance = TOLERANCE[self.x_TI.dtype]
        if y_dtype is torch.float32:
            added, wanted = (values - before[sorted(used)].double() for values in (added, wanted))
        else:
            tolerance = 8e-3 if INTERPRETED else 4e-3  # y rounds too; the interpreter cuts off
        assert relative_error(added, wanted) < tolerance


FUSED = (0, 96, 128, 144, 160)
MIXED = (
    group_of(0, 1, (0, 2.0)),
    group_of(2, 1, (3, -0.5)),
    group_of(3, 1, (0, 1.0)),
    group_of(4, 2, (5, 1.5)),
    group_of(6, 1, (2, 0.25)),
    group_of(7, 1, (0, 1.0), (3, 0.5)),
    group_of(8, 1, (0, 3.0), (3, -2.0)),
    group_of(9, 1, (2, 0.5), (3, 0.5), (5, 0.5)),
)
USED = {0, 2, 3, 4, 5, 6, 7, 8, 9}


@on_triton
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_ranks_and_compositions(dtype, y_dtype):
    case = Case(12, 80, FUSED, dtype)
    case.check(LoraRows.of(MIXED, 16, DEVICE), USED, y_dtype)


@on_triton
@pytest.mark.parametrize("num_tokens", [12, 70])  # 70 is more than the base product's own kernel takes
def test_shrinking_before_the_base_product_changes_nothing(num_tokens):
    kernel, case, rows = (
        _kernel(),
        Case(num_tokens, 80, FUSED, torch.bfloat16),
        LoraRows.of(MIXED, 16, DEVICE),
    )
    tables = (case.a_SQI, case.b_SRO, rows, FUSED)
    config = kernel.choose(rows.shape.tile_tokens, 80, FUSED[-1], 4, rows.shape.num_tiles)
    weight_OI = torch.randn(FUSED[-1], 80, device=DEVICE).to(torch.bfloat16)
    for _ in range(2 if INTERPRETED else 20):  # a read that comes too early finds the last round's sums
        x_TI = torch.randn(num_tokens, 80, device=DEVICE).to(torch.bfloat16)
        wanted = linear(x_TI, weight_OI)
        kernel.lora_add_(wanted, x_TI, *tables, config)
        shrunk = kernel.shrink(x_TI, case.a_SQI, rows, 4, config)
        y_TO = linear(x_TI, weight_OI, shows_producers=True)
        kernel.lora_add_(y_TO, x_TI, *tables, shrunk=shrunk)
        assert torch.equal(y_TO, wanted)


@on_triton
@pytest.mark.parametrize("bounds", [(0, 48), (0, 33, 50), (0, 130, 131, 200)])
def test_modules_of_odd_sizes(bounds):
    case = Case(12, 70, bounds, torch.float32, table_rank=24)
    case.check(LoraRows.of(MIXED, 16, DEVICE), USED, torch.float32)


@on_triton
def test_adapters_that_share_a_tile_stay_apart():
    """Packed into few tiles, where an infinite B is multiplied with the rows of its neighbours."""
    case = Case(12, 80, FUSED, torch.bfloat16)
    case.b_SRO[5, 1] = float("inf")
    case.a_SQI[3, 0] = float("inf")
    shape = RowsShape(16, 1, 4)
    rows = LoraRows.over(torch.from_numpy(pack_groups(MIXED, shape)).to(DEVICE), shape)
    y, before = case.y(torch.float32), case.y(torch.float32)
    _kernel().lora_add_(y, case.x_TI, case.a_SQI, case.b_SRO, rows, FUSED)
    expected = case.expected(before, rows)
    healthy = [0, 3, 6]
    assert relative_error(y[healthy], expected[healthy]) < TOLERANCE[torch.bfloat16]
    assert torch.equal(y[[1, 10, 11]], before[[1, 10, 11]])
    harmed = [2, 4, 5, 7, 8, 9]
    assert not y[harmed].isfinite().all(1).any()


@on_triton
@pytest.mark.parametrize("tile_tokens", [16, 64])
def test_a_prefill_of_many_tokens(tile_tokens):
    groups = (
        group_of(0, 1, (0, 1.0)),
        group_of(1, 1, (3, 1.0)),
        group_of(5, 75, (3, 2.0)),
        group_of(90, 18, (2, 1.0)),
    )
    used = {0, 1, *range(5, 80), *range(90, 108)}
    case = Case(110, 144, FUSED, torch.bfloat16)
    case.check(LoraRows.of(groups, tile_tokens, DEVICE), used, torch.bfloat16)


@on_triton
def test_a_buffer_with_room_is_read_as_far_as_it_counts():
    """As in a captured graph: the shape is that of the worst case, the words beyond are nonsense."""
    case = Case(12, 80, FUSED, torch.bfloat16)
    shape = RowsShape.for_any(12, 6)
    buffer = torch.full((shape.num_words,), 2**30, dtype=torch.int32)
    for groups, used in ((MIXED, USED), (MIXED[:1], {0}), ((), set())):
        words = torch.from_numpy(pack_groups(groups, shape))
        buffer[: len(words)] = words
        rows = LoraRows.over(buffer.to(DEVICE), shape)
        before, y = case.y(torch.float32), case.y(torch.float32)
        _kernel().lora_add_(y, case.x_TI, case.a_SQI, case.b_SRO, rows, FUSED)
        unused = sorted(set(range(12)) - used)
        assert torch.equal(y[unused], before[unused])
        if used:
            expected = case.expected(before, rows) - before
            assert (
                relative_error((y - before)[sorted(used)], expected[sorted(used)]) < TOLERANCE[torch.bfloat16]
            )


@on_triton
@pytest.mark.parametrize(("inputs", "blocks_per_piece"), [(32, 1), (32, 2), (32, 5), (64, None), (256, None)])
def test_pieces_of_the_inputs(inputs, blocks_per_piece):
    config = _kernel().LoraConfig(inputs, 32, blocks_per_piece, stages=2)
    case = Case(12, 150, FUSED, torch.float32)
    case.check(LoraRows.of(MIXED, 16, DEVICE), USED, torch.float32, config)


@on_triton
@pytest.mark.parametrize("count", [1, 2])
def test_modules_apart_are_a_slice_of_the_fused_ones(count):
    case = Case(12, 80, FUSED, torch.float32)
    rows = LoraRows.of(MIXED, 16, DEVICE)
    whole, parts = case.y(torch.float32), case.y(torch.float32)
    lora_add_(whole, case.x_TI, case.a_SQI, case.b_SRO, rows, FUSED)
    for module in range(0, len(FUSED) - 1, count):
        start, *ends = FUSED[module : module + count + 1]
        a_SRI = case.a_SQI[:, module * 32 : (module + count) * 32]
        y, b_SRO = parts[:, start : ends[-1]], case.b_SRO[..., start : ends[-1]]
        _kernel().lora_add_(y, case.x_TI, a_SRI, b_SRO, rows, (0, *(end - start for end in ends)))
    assert relative_error(parts, whole) < TOLERANCE[torch.float32]


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize("tile_tokens", [16, 64])
@pytest.mark.parametrize(
    ("num_inputs", "bounds"),
    [(2560, (0, 8192, 12288, 12320, 12352)), (9216, (0, 2560)), (2560, (0, 9216, 18432))],
)
def test_compiles_for_every_gpu(tile_tokens, num_inputs, bounds, monkeypatch):
    kernel = _kernel()
    x, y = (
        torch.empty(64, num_inputs, dtype=torch.bfloat16),
        torch.empty(64, bounds[-1], dtype=torch.bfloat16),
    )
    a = torch.empty(2, (len(bounds) - 1) * 64, num_inputs, dtype=torch.bfloat16)
    b = torch.empty(2, 64, bounds[-1], dtype=torch.bfloat16)
    rows = LoraRows.of([TokenGroup(range(64), (AdapterUse(0, 16, 1.0),))], tile_tokens)
    for is_dependent, capabilities in ((False, (86,)), (True, (90,))):
        monkeypatch.setattr(kernel, "supports_dependent_launch", lambda _, wanted=is_dependent: wanted)
        with compiling_instead_of_launching(capabilities) as compiled:
            kernel.lora_add_(y, x, a, b, rows, bounds)
        assert {one.name for one in compiled} == {
            "shrink_few_kernel" if tile_tokens == 16 else "shrink_many_kernel",
            "expand_kernel",
        }
        for one in compiled:
            assert one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability], one
