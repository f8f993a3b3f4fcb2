"""What batch_invariant rests on: a row has the same bits alone and among others, kernel by kernel.

Every public operation of an engine's step, as the engine calls it, at sizes of the released models.
In the interpreter the same with small numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from kiln_nn.kernels import (
    delta_decode,
    delta_prefill,
    linear,
    lora,
    paged_attention,
    rms_norm,
    sample,
    swiglu,
)
from kiln_nn.kernels.lora import DECODE_TILE_TOKENS, AdapterUse, LoraRows, RowsShape, TokenGroup, pack_groups
from kiln_nn.kernels.paged_attention import AttentionChunks, chunk_tiles
from kiln_nn.kernels.qk_norm_rope_write import qk_norm_rope_write
from tests.support.delta_decode import (
    DeltaShape,
    converted,
    layers_stacked,
    make_rows,
    random_memory,
    random_tokens,
    random_weights,
    tokens_to,
    weights_to,
)
from tests.support.delta_prefill import joined, make_chunks, part
from tests.support.sampling_cases import Rule, tables
from tests.support.triton_kernels import (
    DEVICE,
    INTERPRETED,
    on_triton,
    run_under_interpreter,
    starts_interpreter,
)

NUM_ROWS = 6 if INTERPRETED else 200
COMPANIES = (4,) if INTERPRETED else (3, 16, 64, 200)
WATCHED = (0, 5) if INTERPRETED else (0, 7, 199)
PAGE = 16
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16

Parts = Sequence[torch.Tensor]
"""What an operation leaves of one row."""


@starts_interpreter
def test_the_kernels_in_the_interpreter():
    run_under_interpreter(__file__)


@pytest.fixture(autouse=True)
def _kernels_in_the_interpreter(monkeypatch):
    """Have the public functions call the kernels on a CPU too."""
    if INTERPRETED:
        for operation in (delta_decode, lora, paged_attention, rms_norm):
            monkeypatch.setattr(operation, "takes_triton", lambda *tensors: True)
        monkeypatch.setattr(swiglu, "takes_triton", lambda *tensors: True)


def check(compute: Callable[[list[int]], list[Parts]]) -> None:
    """`compute(rows)` has the same bits for a row in any choice and order of rows."""
    draw = random.Random(0)
    for row in WATCHED:
        (alone,) = compute([row])
        for company in COMPANIES:
            others = [other for other in range(NUM_ROWS) if other != row]
            rows = [*draw.sample(others, company - 1), row]
            draw.shuffle(rows)
            together = compute(rows)[rows.index(row)]
            for one, other in zip(alone, together, strict=True):
                assert not one.isnan().any()
                assert torch.equal(_bits(one), _bits(other)), (row, company)


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def _index(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="test_triton_linear does that")
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(12_352, 2560), (10_240, 2560), (18_432, 2560), (248_320, 2560), (2560, 4096)]
)
def test_linear_layers(outputs, inputs):
    x, w = _draw(NUM_ROWS, inputs), _draw(outputs, inputs, seed=1)
    config = linear.invariant_config(outputs, inputs)
    options = {"out_dtype": torch.float32} if outputs > 100_000 else {}

    def compute(rows: list[int]) -> list[Parts]:
        # As in a step with adapters, or without.
        shows_producers = len(rows) > 3
        out = linear.linear(x[rows], w, config=config, shows_producers=shows_producers, **options)
        return list(out[:, None])

    check(compute)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="test_triton_linear does that")
@pytest.mark.parametrize("inputs", [4096, 9216])
def test_partial_sums_that_stay_apart_and_the_norm_behind_them(inputs):
    x, residual = _draw(NUM_ROWS, inputs), _draw(NUM_ROWS, 2560, seed=1)
    w, norm = _draw(2560, inputs, seed=2), _draw(2560, seed=3)
    config = linear.invariant_config(2560, inputs)

    def compute(rows: list[int]) -> list[Parts]:
        sums = linear.linear_partials(x[rows], w, config=config, is_apart=True, shows_producers=len(rows) > 3)
        assert sums.shape[0] == config.splits > 1
        outputs = rms_norm.add_rms_norm(sums, residual[rows], norm, 1e-6, offset=1.0)
        return list(zip(*outputs, sums.transpose(0, 1), strict=True))

    check(compute)


@on_triton
@pytest.mark.parametrize("width", [128, 256] if INTERPRETED else [128, 1024, 2560, 4096])
def test_norms_and_the_gate(width):
    x, z, weight = _draw(NUM_ROWS, width), _draw(NUM_ROWS, width, seed=1), _draw(width, seed=2)

    def compute(rows: list[int]) -> list[Parts]:
        normed = rms_norm.rms_norm(x[rows], weight, 1e-6, offset=1.0)
        gated = rms_norm.gated_rms_norm(x[rows], z[rows], weight, 1e-6)
        both = torch.cat((x[rows], z[rows]), dim=1)
        return list(zip(normed, gated, swiglu.swiglu(*both.chunk(2, dim=1)), strict=True))

    check(compute)


class Pages:
    """Sequences of given contexts in shuffled pages, and one line of the table for each."""

    def __init__(self, contexts: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        num_pages = [-(-context // PAGE) for context in contexts]
        free = torch.randperm(sum(num_pages), generator=torch.Generator().manual_seed(4)).tolist()
        self.table = torch.zeros(len(contexts), max(num_pages), dtype=torch.long)
        for line, count in enumerate(num_pages):
            self.table[line, :count] = torch.tensor([free.pop() for _ in range(count)])
        self.table = self.table.to(DEVICE)
        shape = (sum(num_pages), PAGE, kv_heads, head_dim)
        self.caches = [_draw(*shape, seed=seed).to(dtype) for seed in (5, 6)]


HEADS, KV_HEADS, HEAD_DIM = (4, 2, 64) if INTERPRETED else (16, 4, 256)
FORMATS = [DTYPE] if INTERPRETED else [torch.bfloat16, torch.float8_e4m3fn]


@on_triton
@pytest.mark.parametrize("cache_dtype", FORMATS)
def test_decode_attention(cache_dtype):
    source = random.Random(7)
    longest = 300 if INTERPRETED else 700
    contexts = [source.randint(1, longest) for _ in range(NUM_ROWS)]
    contexts[:2] = [2 * longest + 1, 1]
    contexts[NUM_ROWS - 1] = 300 if INTERPRETED else 9001
    pages = Pages(contexts, KV_HEADS, HEAD_DIM, cache_dtype)
    q, gate = _draw(NUM_ROWS, HEADS, HEAD_DIM, seed=1), _draw(NUM_ROWS, HEADS, HEAD_DIM, seed=2)

    def compute(rows: list[int]) -> list[Parts]:
        out = paged_attention.paged_decode_attention(
            q[rows],
            *pages.caches,
            pages.table,
            _index([contexts[row] for row in rows]),
            HEAD_DIM**-0.5,
            gate_RHD=gate[rows],
            table_rows_R=_index(rows),
            is_batch_invariant=True,
        )
        return list(out[:, None])

    check(compute)


@on_triton
@pytest.mark.parametrize("cache_dtype", FORMATS)
def test_chunk_attention(cache_dtype):
    source = random.Random(8)
    new = [source.randint(1, 40) for _ in range(NUM_ROWS)]
    new[0] = 70 if INTERPRETED else 1024
    pasts = [PAGE * source.randint(0, 12) for _ in range(NUM_ROWS)]
    contexts = [past + count for past, count in zip(pasts, new, strict=True)]
    pages = Pages(contexts, KV_HEADS, HEAD_DIM, cache_dtype)
    q = [_draw(count, HEADS, HEAD_DIM, seed=row) for row, count in enumerate(new)]
    tile_tokens = 16 // (HEADS // KV_HEADS) if INTERPRETED else 16

    def compute(rows: list[int]) -> list[Parts]:
        lengths, own = [new[row] for row in rows], [contexts[row] for row in rows]
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        lists = (bounds, own, *chunk_tiles(lengths, own, tile_tokens))
        together = torch.cat([q[row] for row in rows])
        gates = torch.cat([q[row].flip(0) for row in rows])
        out = paged_attention.paged_chunk_attention(
            together,
            *pages.caches,
            pages.table,
            AttentionChunks(*map(_index, lists), tile_tokens),
            HEAD_DIM**-0.5,
            gate_THD=gates,
            table_rows_N=_index(rows),
            is_batch_invariant=True,
        )
        return [(tokens,) for tokens in out.split(lengths)]

    check(compute)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="one program a token")
def test_queries_and_keys():
    num_channels = (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM
    projected, norm = _draw(NUM_ROWS, num_channels), _draw(HEAD_DIM, seed=1)
    frequencies = 10_000.0 ** -(torch.arange(32, device=DEVICE) / 32)

    def compute(rows: list[int]) -> list[Parts]:
        sizes = (2 * HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        q, k, v = projected[rows].split(sizes, dim=1)
        q = q.view(-1, HEADS, 2, HEAD_DIM)[:, :, 0]
        k, v = (x.view(-1, KV_HEADS, HEAD_DIM) for x in (k, v))
        caches = [torch.zeros(NUM_ROWS, PAGE, KV_HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE) for _ in "kv"]
        places = _index(rows)
        queries = qk_norm_rope_write(
            q, k, v, norm, norm, 1e-6, 37 * places, frequencies, places * PAGE, *caches
        )
        return [(queries[i], *(cache[row, 0] for cache in caches)) for i, row in enumerate(rows)]

    check(compute)


DELTA = (
    DeltaShape(num_slots=NUM_ROWS)
    if INTERPRETED
    else DeltaShape(num_key_heads=4, num_heads=8, key_dim=128, value_dim=128, num_slots=NUM_ROWS)
)


@on_triton
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
def test_delta_decode_and_its_commits(state):
    draw = torch.Generator().manual_seed(9)
    lengths = {slot: slot * 7 % PAGE for slot in range(NUM_ROWS)}
    lengths[WATCHED[1]] = PAGE - 1  # commits
    layer = converted(random_memory(DELTA, lengths, draw), state, DTYPE, DEVICE)
    layers, weights = layers_stacked([layer]), weights_to(random_weights(DELTA, draw), DTYPE, DEVICE)
    tokens = tokens_to(random_tokens(DELTA, NUM_ROWS, draw), DTYPE, DEVICE)

    def compute(rows: list[int]) -> list[Parts]:
        memory = layers_stacked([layers.layer(0)])
        own = [(slot, slot, lengths[slot], slot if lengths[slot] == PAGE - 1 else None) for slot in rows]
        numbers = make_rows(*own, device=DEVICE)
        inputs = (x[rows] for x in tokens.all())
        out = delta_decode.delta_decode(
            memory.layer(0), numbers, weights, *inputs, commits=False, is_batch_invariant=True
        )
        delta_decode.delta_commit(memory, numbers)
        kept = memory.layer(0)
        return [
            (out[i], kept.state_SHKV[slot], kept.ring.u_RHPV[slot, :, : lengths[slot] + 1])
            for i, slot in enumerate(rows)
        ]

    check(compute)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter half a minute")
def test_delta_prefill():
    draw = torch.Generator().manual_seed(10)
    source = random.Random(10)
    lengths = [source.randint(1, 90) for _ in range(NUM_ROWS)]
    lengths[0] = 1024
    memory = converted(random_memory(DELTA, {}, draw), torch.float32, DTYPE, DEVICE)
    layers, weights = layers_stacked([memory]), weights_to(random_weights(DELTA, draw), DTYPE, DEVICE)
    everything = tokens_to(random_tokens(DELTA, sum(lengths), draw), DTYPE, DEVICE)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    prompts = [part(everything, end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def compute(rows: list[int]) -> list[Parts]:
        layer = layers_stacked([layers.layer(0)]).layer(0)
        slots = (
            delta_prefill.ChunkSlots(lengths[row], row if row % 2 else delta_prefill.NO_SLOT, row)
            for row in rows
        )
        chunks = make_chunks(*slots, device=DEVICE)
        tokens = joined(*(prompts[row] for row in rows))
        out = delta_prefill.delta_prefill(layer, chunks, weights, *tokens.all(), is_batch_invariant=True)
        parts = out.split([lengths[row] for row in rows])
        return [
            (parts[i], layer.state_SHKV[row], layer.ring.u_RHPV[row], layer.ring.k_RhPK[row])
            for i, row in enumerate(rows)
        ]

    check(compute)


@on_triton
@pytest.mark.parametrize("y_dtype", [torch.float32, DTYPE])
@pytest.mark.parametrize("in_graph", [False, True])
def test_adapters(y_dtype, in_graph):
    num_inputs, bounds = (64, (0, 32, 96)) if INTERPRETED else (2560, (0, 8192, 12_288))
    a = _draw(4, 2 * 32, num_inputs) / num_inputs**0.5
    b = _draw(4, 32, bounds[-1], seed=1)
    x, y = _draw(NUM_ROWS, num_inputs, seed=2), _draw(NUM_ROWS, bounds[-1], seed=3, dtype=y_dtype)
    ranks, combinations = (16, 8, 32, 20), [(0,), (1,), (0, 2), (3, 1, 0), ()]

    def compute(rows: list[int]) -> list[Parts]:
        places: dict[tuple[int, ...], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(combinations[row % len(combinations)], []).append(place)
        groups = [
            TokenGroup(own, tuple(AdapterUse(index, ranks[index], 0.5 + index) for index in uses))
            for uses, own in places.items()
        ]
        if in_graph:
            shape = RowsShape.for_any(NUM_ROWS, 4)
            words = torch.zeros(shape.num_words, dtype=torch.int32)
            used = torch.from_numpy(pack_groups(groups, shape))
            words[: len(used)] = used
            adapter_rows = LoraRows.over(words.to(DEVICE), shape)
        else:
            adapter_rows = LoraRows.of(groups, DECODE_TILE_TOKENS, DEVICE)
        out = y[rows].clone()
        lora.lora_add_(out, x[rows], a, b, adapter_rows, bounds)
        return list(out[:, None])

    check(compute)


@on_triton
@pytest.mark.skipif(INTERPRETED, reason="takes the interpreter a minute, and has one cut there")
def test_draws():
    vocab_size = 248_320
    logits = _draw(NUM_ROWS, vocab_size, dtype=torch.float32)
    logits[1::2] *= 4
    source = random.Random(11)
    kinds = [
        {},
        {"top_p": 0.95},  # of a flat row: thousands of tokens
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 4000},
        {"min_p": 0.01, "edits": ((3, 2.0, 1.0, 0.0), (4000, 0.0, 1.2, -0.5))},
        {"temperature": 0.0},
        {"top_p": 0.999, "temperature": 1.3},
    ]
    rules = [Rule(uniform=source.random(), **kinds[row % len(kinds)]) for row in range(NUM_ROWS)]

    def compute(rows: list[int]) -> list[Parts]:
        settings = tables([rules[row] for row in rows], DEVICE)
        tokens, drawn = sample.draw_tokens(logits[rows], *settings, is_batch_invariant=True)
        return list(zip(tokens[:, None], drawn, strict=True))

    check(compute)
