"""Paged decode attention in Triton against a softmax in float64, with nonsense behind every context."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.paged_attention import paged_decode_attention, reference
from tests.support.rounded_groups import check_groups
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
    relative_error,
    run_under_interpreter,
    starts_interpreter,
)

# float32: sums in another order. bf16, fp16: roundings of the softmax's weights and of the output;
# the interpreter cuts bf16 off instead of rounding it.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3 if INTERPRETED else 4e-3}


def _kernel():
    from kiln_nn.kernels.paged_attention import triton_decode

    return triton_decode


class _Case:
    """Rows of given context lengths in shuffled pages; whatever lies behind a context is NaN."""

    def __init__(self, lengths, heads, kv_heads, head_dim, page_tokens=16, dtype=torch.float32) -> None:
        draw = torch.Generator().manual_seed(sum(lengths) + heads)
        self.lengths = torch.tensor(lengths, device=DEVICE)
        self.q = torch.randn(len(lengths), heads, head_dim, generator=draw).to(DEVICE, dtype)
        self.gate = torch.randn(len(lengths), heads, 2, head_dim, generator=draw).to(DEVICE, dtype)[:, :, 1]
        pages_of = [-(-length // page_tokens) for length in lengths]
        free = torch.randperm(sum(pages_of) + 2, generator=draw).tolist()
        self.table = torch.full((len(lengths), max(pages_of) + 1), free.pop())
        shape = (len(free) + 1, page_tokens, kv_heads, head_dim)
        self.k, self.v = (torch.full(shape, float("nan")) for _ in range(2))
        self.rows = []
        for row, length in enumerate(lengths):
            pages = torch.tensor([free.pop() for _ in range(pages_of[row])], dtype=torch.long)
            self.table[row, : len(pages)] = pages
            places = torch.arange(length)
            slots = (pages[places // page_tokens], places % page_tokens)
            for cache in (self.k, self.v):
                cache[slots] = torch.randn(length, kv_heads, head_dim, generator=draw)
            self.rows.append(slots)
        self.table = self.table.to(DEVICE)
        self.k, self.v = self.k.to(DEVICE, dtype), self.v.to(DEVICE, dtype)

    def arguments(self):
        return self.q, self.k, self.v, self.table, self.lengths, self.q.shape[2] ** -0.5

    def expected(self, gated: bool) -> torch.Tensor:
        q, gate = self.q.double().cpu(), self.gate.double().cpu()
        group = self.q.shape[1] // self.k.shape[2]
        out = torch.zeros_like(q)
        for row, slots in enumerate(self.rows):
            if len(slots[0]):
                k, v = (x.double().cpu()[slots].repeat_interleave(group, 1) for x in (self.k, self.v))
                scores = torch.einsum("hd,thd->ht", q[row], k) * q.shape[2] ** -0.5
                out[row] = torch.einsum("ht,thd->hd", scores.softmax(1), v)
        return out * torch.sigmoid(gate) if gated else out


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


@on_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_all_lengths_at_the_released_head_shape(dtype, gated):
    case = _Case((1, 15, 16, 17, 0, 65, 130, 300), 16, 4, 256, dtype=dtype)
    gate = case.gate if gated else None
    out = _kernel().paged_decode_attention(*case.arguments(), gate_RHD=gate)
    assert out.dtype == dtype
    assert relative_error(out, case.expected(gated)) < TOLERANCE[dtype]


@on_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_tokens"),
    [(8, 2, 256, 16), (24, 4, 256, 16), (4, 2, 64, 8), (3, 3, 128, 64), (16, 1, 64, 32), (5, 1, 64, 1)],
)
def test_other_shapes(heads, kv_heads, head_dim, page_tokens):
    case = _Case((3, 70), heads, kv_heads, head_dim, page_tokens)
    out = _kernel().paged_decode_attention(*case.arguments(), gate_RHD=case.gate)
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.float32]


@on_triton
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("least_part_tokens", [16, 64])
def test_any_number_of_parts_gives_the_same(num_parts, least_part_tokens):
    kernel, case = _kernel(), _Case((1, 64, 65, 0, 200, 97), 4, 2, 64)
    config = kernel.DecodeConfig(16, least_part_tokens, num_parts, num_warps=4, num_stages=1)
    out = kernel.paged_decode_attention(*case.arguments(), gate_RHD=case.gate, config=config)
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.float32]


@on_triton
@pytest.mark.parametrize("head_dim", [128, 256])
def test_outputs_rounded_by_group(head_dim):
    """The same rows, and of each 128 outputs what rounding them afterwards gives; padding is zero."""
    kernel, case = _kernel(), _Case((1, 0, 65, 200), 4, 2, head_dim, dtype=torch.bfloat16)
    options = {"gate_RHD": case.gate, "config": kernel.DecodeConfig(16, 16, 4, num_warps=4, num_stages=1)}
    expected = kernel.paged_decode_attention(*case.arguments(), **options)
    rows = kernel.paged_decode_attention(*case.arguments(), rounds=True, **options)
    check_groups(rows, expected.flatten(1), padding=1)
    one_part = {**options, "config": kernel.DecodeConfig(16, 512, 1, num_warps=4, num_stages=1)}
    assert isinstance(kernel.paged_decode_attention(*case.arguments(), rounds=True, **one_part), torch.Tensor)


@on_triton
def test_scores_far_apart_do_not_overflow():
    case = _Case((90, 40), 4, 2, 64)
    case.q *= 300
    out = _kernel().paged_decode_attention(*case.arguments())
    assert relative_error(out, case.expected(False)) < 1e-3  # exponents of a thousand lose digits


@on_triton
def test_strided_queries_and_narrow_index_types():
    case = _Case((40, 21), 4, 2, 64)
    expected = case.expected(False)
    case.q = torch.stack((case.q, torch.full_like(case.q, float("nan"))), 2)[:, :, 0]
    case.table, case.lengths = case.table.int(), case.lengths.int()
    assert (
        relative_error(_kernel().paged_decode_attention(*case.arguments()), expected)
        < TOLERANCE[torch.float32]
    )


def _by_line(case):
    """The case's table with its lines in another order; the row of length 0 has none."""
    lines = torch.tensor([5, 0, 3, -1, 2], device=DEVICE)
    table = torch.full((7, case.table.shape[1]), int(case.table[0, -1]), device=DEVICE, dtype=torch.int32)
    for row, line in enumerate(lines.tolist()):
        if line >= 0:
            table[line] = case.table[row].int()
    case.lengths[3] = 50  # of whoever had the row before
    q, k, v, _, lengths, scale = case.arguments()
    return (q, k, v, table, lengths, scale), {"gate_RHD": case.gate, "table_rows_R": lines}


@on_triton
def test_rows_find_their_lines_of_the_page_table():
    case = _Case((70, 1, 16, 0, 200), 4, 2, 64)
    expected = case.expected(True)
    arguments, options = _by_line(case)
    out = _kernel().paged_decode_attention(*arguments, **options)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert (out[3] == 0).all()


def test_the_reference_finds_them_too():
    case = _Case((70, 1, 16, 0, 200), 4, 2, 64)
    expected = case.expected(True)
    (q, k, v, *rest), options = _by_line(case)
    arguments = (q, k.nan_to_num(), v.nan_to_num(), *rest)
    out = reference.paged_decode_attention(*arguments, **options)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


class _SkippingCase(_Case):
    """The first token of every row is to be skipped."""

    def expected(self, gated: bool) -> torch.Tensor:
        self.rows = [tuple(part[1:] for part in slots) for slots in self.rows]
        return super().expected(gated)


@on_triton
@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skipped_tokens_are_not_attended_to(num_parts, dtype):
    kernel, case = _kernel(), _SkippingCase((1, 2, 16, 0, 90, 33), 4, 2, 64, dtype=dtype)
    for first, place in ((slots[0][:1], slots[1][:1]) for slots in case.rows):
        case.k[first, place] = case.v[first, place] = float("nan")
    config = kernel.DecodeConfig(16, 32, num_parts, num_warps=4, num_stages=1)
    out = kernel.paged_decode_attention(*case.arguments(), gate_RHD=case.gate, num_skipped=1, config=config)
    assert relative_error(out, case.expected(True)) < TOLERANCE[dtype]


def test_the_reference_skips_them_too():
    case = _SkippingCase((1, 2, 16, 0, 90), 4, 2, 64)
    q, k, v, *rest = (x.cpu() if torch.is_tensor(x) else x for x in case.arguments())
    gate = case.gate.cpu()
    out = reference.paged_decode_attention(
        q, k.nan_to_num(), v.nan_to_num(), *rest, gate_RHD=gate, num_skipped=1
    )
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.float32]


def _in_runs(lengths: tuple[int, ...], run: int, heads: int, kv_heads: int, head_dim: int, dtype):
    """A case whose runs of rows have one sequence, and options that say so; its padding rows keep a line."""
    case = _Case(lengths, heads, kv_heads, head_dim, dtype=dtype)
    longest = [
        max(range(first, first + run), key=lengths.__getitem__) for first in range(0, len(lengths), run)
    ]
    lines = torch.tensor(longest, device=DEVICE).repeat_interleave(run)
    case.rows = [
        tuple(part[:length] for part in case.rows[line])
        for line, length in zip(lines.tolist(), lengths, strict=True)
    ]
    return case, {"table_rows_R": lines, "gate_RHD": case.gate, "rows_per_sequence": run}


# A run that crosses a tile, a part and a page, one with padding behind its only row, one of padding.
RUNS_OF_FOUR = (30, 31, 32, 33, 64, 65, 66, 67, 97, 98, 99, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4)


@on_triton
def test_rows_of_one_sequence_are_rounded_each_by_itself():
    kernel = _kernel()
    case, options = _in_runs((40, 41, 42, 0), 4, 2, 1, 128, torch.bfloat16)
    options["config"] = kernel.DecodeConfig(16, 32, 4, num_warps=4, num_stages=1)
    expected = kernel.paged_decode_attention(*case.arguments(), **options)
    rows = kernel.paged_decode_attention(*case.arguments(), rounds=True, **options)
    check_groups(rows, expected.flatten(1), padding=3)


@on_triton
@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_sequence_share_a_program(num_parts, dtype):
    kernel = _kernel()
    case, options = _in_runs(RUNS_OF_FOUR, 4, 8, 2, 64, dtype)
    config = kernel.DecodeConfig(16, 32, num_parts, num_warps=4, num_stages=1)
    out = kernel.paged_decode_attention(*case.arguments(), **options, config=config)
    assert relative_error(out, case.expected(True)) < TOLERANCE[dtype]
    assert out[case.lengths == 0].eq(0).all()


@on_triton
@pytest.mark.parametrize(("run", "heads", "kv_heads"), [(2, 8, 2), (5, 12, 2), (8, 9, 1)])
def test_runs_of_any_length(run, heads, kv_heads):
    lengths = tuple(start + place for start in (1, 120, 7) for place in range(run))
    case, options = _in_runs(lengths, run, heads, kv_heads, 64, torch.float32)
    out = _kernel().paged_decode_attention(*case.arguments(), **options)
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.float32]


@on_triton
def test_runs_of_rows_skip_tokens_too():
    case, options = _in_runs((1, 2, 40, 41, 0, 0), 2, 4, 2, 64, torch.float32)
    case.rows = [tuple(part[1:] for part in slots) for slots in case.rows]
    out = _kernel().paged_decode_attention(*case.arguments(), **options, num_skipped=1)
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.float32]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs a graph")
def test_one_graph_serves_every_context_length():
    case = _Case((400, 5, 0, 33), 16, 4, 256, dtype=torch.bfloat16)
    lengths, graph = case.lengths.clone(), torch.cuda.CUDAGraph()
    case.lengths.fill_(1)
    paged_decode_attention(*case.arguments(), gate_RHD=case.gate)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = paged_decode_attention(*case.arguments(), gate_RHD=case.gate)
    case.lengths.copy_(lengths)
    graph.replay()
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="fp8 as the GPU converts it")
def test_an_fp8_cache():
    case = _Case((1, 100, 300), 16, 4, 256, dtype=torch.bfloat16)
    case.k, case.v = case.k.to(torch.float8_e4m3fn), case.v.to(torch.float8_e4m3fn)
    out = paged_decode_attention(*case.arguments(), gate_RHD=case.gate)
    assert relative_error(out, case.expected(True)) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_function_chooses_the_kernel_on_a_gpu():
    # Only the kernel leaves what lies behind a context unread.
    case = _Case((3, 40), 4, 2, 64)
    assert (
        relative_error(paged_decode_attention(*case.arguments()), case.expected(False))
        < TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("gated", [False, True])
def test_the_reference_gates_and_zeroes_padding_rows(gated):
    case = _Case((0, 7, 20), 4, 2, 8)
    q, k, v, table, lengths, scale = (x.cpu() if torch.is_tensor(x) else x for x in case.arguments())
    gate = case.gate.cpu() if gated else None
    out = paged_decode_attention(q, k.nan_to_num(), v.nan_to_num(), table, lengths, scale, gate_RHD=gate)
    assert relative_error(out, case.expected(gated)) < 1e-6


def test_unfitting_shapes_are_refused():
    case = _Case((4,), 4, 2, 8)
    q, k, v, table, lengths, scale = case.arguments()
    with pytest.raises(ShapeMismatch, match="context_lengths"):
        paged_decode_attention(q, k, v, table, lengths.repeat(2), scale)
    with pytest.raises(ShapeMismatch, match="a multiple of 2"):
        paged_decode_attention(q, k, v, table, lengths, scale, rows_per_sequence=2)
    with pytest.raises(ShapeMismatch, match="gate"):
        paged_decode_attention(q, k, v, table, lengths, scale, gate_RHD=case.gate[:, :2])
    assert (
        reference.paged_decode_attention(q, k.nan_to_num(), v.nan_to_num(), table, lengths, scale)
        .isfinite()
        .all()
    )


def _compile_case(num_rows: int, dtype: torch.dtype, cache_dtype: torch.dtype):
    q_and_gate = torch.zeros(num_rows, 16, 2, 256, dtype=dtype)
    cache = torch.zeros(4, 16, 4, 256, dtype=cache_dtype)
    table, lengths = torch.zeros(num_rows, 256, dtype=torch.int32), torch.zeros(num_rows, dtype=torch.int32)
    return (q_and_gate[:, :, 0].contiguous(), cache, cache, table, lengths, 1 / 16), q_and_gate[:, :, 1]


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(
    ("cache_dtype", "capabilities"),
    [(torch.bfloat16, CAPABILITIES), (torch.float8_e4m3fn, (89, 90)), (torch.float32, CAPABILITIES)],
)
def test_it_compiles_for_every_supported_gpu(cache_dtype, capabilities):
    dtype = torch.float32 if cache_dtype is torch.float32 else torch.bfloat16
    arguments, gate = _compile_case(64, dtype, cache_dtype)
    with compiling_instead_of_launching(capabilities) as compiled:
        _kernel().paged_decode_attention(*arguments, gate_RHD=gate, num_skipped=1)
        _kernel().paged_decode_attention(*arguments, gate_RHD=gate)
        _kernel().paged_decode_attention(*arguments, gate_RHD=gate, rows_per_sequence=4)
    assert {one.name for one in compiled} == {"decode_kernel", "join_kernel"}
    assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[one.capability] for one in compiled)


@only_outside_interpreter
@needs_triton
def test_the_released_shape_keeps_two_programs_on_a_multiprocessor():
    # The launch loads two tiles ahead; a compiler that stops doing so shows here as less memory.
    arguments, gate = _compile_case(64, torch.bfloat16, torch.bfloat16)
    with compiling_instead_of_launching((90,)) as compiled:
        _kernel().paged_decode_attention(*arguments, gate_RHD=gate)
    shared = next(one.shared_memory_bytes for one in compiled if one.name == "decode_kernel")
    assert 64 * 1024 < shared <= 113 * 1024
