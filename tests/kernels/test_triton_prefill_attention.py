"""Paged attention of prompt chunks in Triton against a softmax in float64, nonsense behind contexts."""

from __future__ import annotations

import pytest
import torch

from kiln_nn.kernels.checks import ShapeMismatch
from kiln_nn.kernels.paged_attention import (
    AttentionChunks,
    choose_tile_tokens,
    chunk_tiles,
    most_tiles,
    paged_chunk_attention,
    reference,
)
from tests.support.triton_kernels import (
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
PAGE_TOKENS = 16
# (new tokens, context): a whole prompt, a long past, a draft, nothing, an odd end, one token.
MIXED = [(37, 37), (21, 100), (4, 200), (0, 0), (7, 71), (1, 1)]
FEW = [(5, 5), (18, 90)]


def _kernel():
    from kiln_nn.kernels.paged_attention import triton_prefill

    return triton_prefill


class _Case:
    """Chunks of sequences in shuffled pages and table lines; whatever lies behind them is NaN."""

    def __init__(self, chunks, heads=16, kv_heads=4, head_dim=256, dtype=torch.float32, padding=3) -> None:
        draw = torch.Generator().manual_seed(sum(context for _, context in chunks) + heads)
        self.new, self.contexts = [new for new, _ in chunks], [context for _, context in chunks]
        num_tokens = sum(self.new) + padding
        self.q = torch.randn(num_tokens, heads, head_dim, generator=draw).to(DEVICE, dtype)
        self.gate = torch.randn(num_tokens, heads, 2, head_dim, generator=draw).to(DEVICE, dtype)[:, :, 1]
        pages_of = [-(-context // PAGE_TOKENS) for context in self.contexts]
        free = torch.randperm(sum(pages_of) + 2, generator=draw).tolist()
        self.rows = torch.randperm(len(chunks) + 2, generator=draw)[: len(chunks)]
        self.table = torch.full((len(chunks) + 2, max(pages_of) + 1), free.pop())
        shape = (len(free) + 1, PAGE_TOKENS, kv_heads, head_dim)
        self.k, self.v = (torch.full(shape, float("nan")) for _ in range(2))
        self.slots = []
        for row, num_pages, context in zip(self.rows, pages_of, self.contexts, strict=True):
            pages = torch.tensor([free.pop() for _ in range(num_pages)], dtype=torch.long)
            self.table[row, :num_pages] = pages
            places = torch.arange(context)
            slots = (pages[places // PAGE_TOKENS], places % PAGE_TOKENS)
            for cache in (self.k, self.v):
                cache[slots] = torch.randn(context, kv_heads, head_dim, generator=draw)
            self.slots.append(slots)
        self.table, self.rows = self.table.to(DEVICE), self.rows.to(DEVICE)
        self.k, self.v = self.k.to(DEVICE, dtype), self.v.to(DEVICE, dtype)

    def chunks(self, tile_tokens: int, num_padding: int = 2) -> AttentionChunks:
        num_tiles = sum(-(-new // tile_tokens) for new in self.new) + num_padding
        tiles = chunk_tiles(self.new, self.contexts, tile_tokens, num_tiles)
        bounds = [0, *torch.tensor(self.new).cumsum(0).tolist()]
        lists = (bounds, self.contexts, *tiles)
        return AttentionChunks(*(torch.tensor(x, device=DEVICE) for x in lists), tile_tokens)

    def run(self, attend, tile_tokens: int, gated: bool = True, **options) -> torch.Tensor:
        return attend(
            self.q,
            self.k,
            self.v,
            self.table,
            self.chunks(tile_tokens),
            self.q.shape[2] ** -0.5,
            gate_THD=self.gate if gated else None,
            table_rows_N=self.rows,
            **options,
        )

    def expected(self, gated: bool = True) -> torch.Tensor:
        q, gate = self.q.double().cpu(), self.gate.double().cpu()
        group, out, first = self.q.shape[1] // self.k.shape[2], torch.zeros_like(q), 0
        for new, context, slots in zip(self.new, self.contexts, self.slots, strict=True):
            k, v = (x.double().cpu()[slots].repeat_interleave(group, 1) for x in (self.k, self.v))
            scores = torch.einsum("nhd,thd->hnt", q[first : first + new], k) * q.shape[2] ** -0.5
            seen = torch.arange(context) <= torch.arange(context - new, context)[:, None]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(2)
            out[first : first + new] = torch.einsum("hnt,thd->nhd", weights, v)
            first += new
        return out * torch.sigmoid(gate) if gated else out


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    poison_new_memory(monkeypatch)


def _cases() -> list[tuple[int, torch.dtype]]:
    """Tokens of a tile, format. The interpreter is slow; on a GPU large float32 tiles do not fit."""
    if INTERPRETED:
        return [(4, torch.float32), (16, torch.bfloat16), (32, torch.float32)]
    halves = [(tokens, dtype) for tokens in (4, 16, 32) for dtype in (torch.float16, torch.bfloat16)]
    return [(4, torch.float32), *halves]


@on_triton
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tile_tokens", "dtype"), _cases())
def test_chunks_of_all_kinds_at_the_released_head_shape(tile_tokens, dtype, gated):
    case = _Case(MIXED, dtype=dtype)
    out = case.run(_kernel().paged_chunk_attention, tile_tokens, gated)
    assert out.dtype == dtype
    assert relative_error(out, case.expected(gated)) < TOLERANCE[dtype]
    assert (out[sum(case.new) :] == 0).all()  # tokens of no chunk


@on_triton
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 256), (24, 4, 256), (3, 3, 128), (16, 1, 64)]
)
def test_other_shapes(heads, kv_heads, head_dim):
    dtype = torch.float32 if INTERPRETED else torch.float16
    case = _Case(FEW, heads, kv_heads, head_dim, dtype)
    tile_tokens = choose_tile_tokens([16], heads // kv_heads)
    assert tile_tokens * heads // kv_heads >= 16
    out = case.run(_kernel().paged_chunk_attention, tile_tokens)
    assert relative_error(out, case.expected()) < TOLERANCE[dtype]


@on_triton
@pytest.mark.parametrize("num_parts", [1, 3, 16])
@pytest.mark.parametrize("tile_tokens", [8, 16])
def test_any_number_of_parts_gives_the_same(num_parts, tile_tokens, monkeypatch):
    kernel, dtype = _kernel(), torch.float32 if INTERPRETED else torch.float16
    monkeypatch.setattr(kernel, "_LEAST_PART_TOKENS", 32)
    case = _Case([(13, 13), (5, 200), (18, 97)], 4, 2, 64, dtype)
    config = kernel.PrefillConfig(16, num_parts, num_warps=4, num_stages=1)
    out = case.run(kernel.paged_chunk_attention, tile_tokens, config=config)
    assert relative_error(out, case.expected()) < TOLERANCE[dtype]


@on_triton
def test_a_prompt_in_chunks_equals_the_whole():
    dtype = torch.float32 if INTERPRETED else torch.float16
    case, attend = _Case([(150, 150)], 4, 2, 64, dtype, padding=0), _kernel().paged_chunk_attention
    whole, q, gate = case.run(attend, 16), case.q, case.gate
    for first, last in ((0, 1), (1, 64), (64, 150)):
        case.q, case.gate, case.new, case.contexts = q[first:last], gate[first:last], [last - first], [last]
        assert relative_error(case.run(attend, 16), whole[first:last]) < TOLERANCE[dtype]


@on_triton
def test_scores_far_apart_do_not_overflow():
    dtype = torch.float32 if INTERPRETED else torch.float16
    case = _Case(FEW, 4, 2, 64, dtype)
    case.q *= 300
    out = case.run(_kernel().paged_chunk_attention, 16, gated=False)
    assert relative_error(out, case.expected(gated=False)) < 2e-3  # exponents of a thousand lose digits


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="needs a graph")
def test_one_graph_serves_other_chunks():
    case = _Case([(30, 400), (9, 9), (0, 0)], dtype=torch.bfloat16)
    static, graph = case.chunks(16), torch.cuda.CUDAGraph()
    fields = ("cu_seqlens_N1", "context_lengths_N", "tile_chunks_B", "tile_starts_B")
    saved = [getattr(static, field).clone() for field in fields]
    for field, start in zip(fields, (0, 0, -1, 0), strict=True):
        getattr(static, field).fill_(start)
    arguments = (case.q, case.k, case.v, case.table, static, 1 / 16)
    options = {"gate_THD": case.gate, "table_rows_N": case.rows}
    paged_chunk_attention(*arguments, **options)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = paged_chunk_attention(*arguments, **options)
    graph.replay()
    assert (out == 0).all()
    for field, contents in zip(fields, saved, strict=True):
        getattr(static, field).copy_(contents)
    graph.replay()
    assert relative_error(out, case.expected()) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="fp8 as the GPU converts it")
@pytest.mark.parametrize("tile_tokens", [4, 16, 32])
def test_an_fp8_cache(tile_tokens):
    case = _Case(MIXED, dtype=torch.bfloat16)
    case.k, case.v = case.k.to(torch.float8_e4m3fn), case.v.to(torch.float8_e4m3fn)
    out = case.run(paged_chunk_attention, tile_tokens)
    assert relative_error(out, case.expected()) < TOLERANCE[torch.bfloat16]


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="the choice is made by device")
def test_the_public_function_chooses_the_kernel_on_a_gpu():
    # Only the kernel leaves what lies behind a context unread.
    case = _Case(FEW, dtype=torch.bfloat16)
    assert relative_error(case.run(paged_chunk_attention, 16), case.expected()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("gated", [False, True])
def test_the_reference_computes_the_same_chunks(gated):
    case = _Case(MIXED, 4, 2, 8)
    for name in ("q", "k", "v", "gate", "table", "rows"):
        setattr(case, name, getattr(case, name).cpu())
    chunks = case.chunks(16)
    lists = (chunks.cu_seqlens_N1, chunks.context_lengths_N, chunks.tile_chunks_B, chunks.tile_starts_B)
    chunks = AttentionChunks(*(x.cpu() for x in lists), 16)
    attend = paged_chunk_attention if not INTERPRETED else reference.paged_chunk_attention
    gate = case.gate if gated else None
    out = attend(case.q, case.k, case.v, case.table, chunks, 8**-0.5, gate_THD=gate, table_rows_N=case.rows)
    assert relative_error(out, case.expected(gated)) < 1e-6


def test_tiles_cover_each_chunk_once_and_begin_with_the_longest_context():
    new, contexts = [40, 0, 5, 16], [40, 9, 500, 16]
    chunks, starts = chunk_tiles(new, contexts, 16, capacity=most_tiles(4, 61, 16))
    assert list(zip(chunks, starts, strict=True)) == [
        (2, 0),
        (0, 32),
        (0, 16),
        (0, 0),
        (3, 0),
        (-1, 0),
        (-1, 0),
    ]
    with pytest.raises(ShapeMismatch, match="tiles"):
        chunk_tiles(new, contexts, 16, capacity=4)
    with pytest.raises(ShapeMismatch, match="context"):
        chunk_tiles([5], [4], 16)


def test_tiles_are_small_where_the_chunks_are():
    assert choose_tile_tokens([4, 1, 3]) == 4
    assert choose_tile_tokens([4, 1, 3], num_grouped_heads=1) == 16
    assert choose_tile_tokens([8] * 64) == 16
    assert choose_tile_tokens([64]) == 32
    assert choose_tile_tokens([8192], num_grouped_heads=6) == 16


def test_unfitting_shapes_are_refused():
    case = _Case(FEW, 4, 2, 8)
    with pytest.raises(ShapeMismatch, match="tile_tokens"):
        case.run(paged_chunk_attention, 5)
    case.gate = case.gate[1:]
    with pytest.raises(ShapeMismatch, match="gate"):
        case.run(paged_chunk_attention, 16)
    case.rows = case.rows[1:]
    with pytest.raises(ShapeMismatch, match="table_rows"):
        case.run(paged_chunk_attention, 16, gated=False)


@only_outside_interpreter
@needs_triton
@pytest.mark.parametrize(
    ("cache_dtype", "capabilities"), [(torch.bfloat16, (80, 86, 90)), (torch.float8_e4m3fn, (89, 90))]
)
@pytest.mark.parametrize("tile_tokens", [4, 16, 32])
def test_it_compiles_for_every_supported_gpu(cache_dtype, capabilities, tile_tokens, monkeypatch):
    from kiln_nn.kernels.dispatch import DeviceLimits

    q_and_gate = torch.zeros(64, 16, 2, 256, dtype=torch.bfloat16)
    cache, table = torch.zeros(4, 16, 4, 256, dtype=cache_dtype), torch.zeros(4, 256, dtype=torch.int32)
    lists = (torch.zeros(count, dtype=torch.int32) for count in (5, 4, 8, 8))
    chunks = AttentionChunks(*lists, tile_tokens)
    for capability in capabilities:
        limits = DeviceLimits(132, SHARED_MEMORY_LIMIT[capability])
        monkeypatch.setattr(_kernel(), "device_limits", lambda _, limits=limits: limits)
        with compiling_instead_of_launching((capability,)) as compiled:
            arguments = (q_and_gate[:, :, 0], cache, cache, table, chunks, 1 / 16)
            _kernel().paged_chunk_attention(*arguments, gate_THD=q_and_gate[:, :, 1])
        assert {one.name for one in compiled} == {"prefill_kernel", "join_tiles_kernel"}
        assert all(one.shared_memory_bytes <= SHARED_MEMORY_LIMIT[capability] for one in compiled)
