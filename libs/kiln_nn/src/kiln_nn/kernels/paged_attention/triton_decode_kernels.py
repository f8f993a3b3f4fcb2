"""The device side of decode attention: one part of one row's context, and the join of the parts.

triton_decode.py says what they take and how launches are cut.

Legend: `R` rows, `H` query heads, `h` kv heads, `D` head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.quantised.triton import e4m3_groups


@triton.jit
def _part_of_context(context, part, num_parts, LEAST: tl.constexpr, TILE: tl.constexpr):
    """First and last token (exclusive) of one part; whole tiles, except at the context's end."""
    length = tl.maximum(tl.cdiv(tl.cdiv(context, num_parts), TILE) * TILE, LEAST)
    first = part * length
    return first, tl.minimum(first + length, context)


@triton.jit
def _contexts(context_ptr, rows, is_row, SKIPPED: tl.constexpr):
    """Tokens of some rows; those with only skipped ones have none."""
    contexts = tl.load(context_ptr + rows, mask=is_row, other=0).to(tl.int32)
    if SKIPPED > 0:
        contexts = tl.where(contexts <= SKIPPED, 0, contexts)
    return contexts


@triton.jit
def _context_and_line(
    context_ptr, table_row_ptr, run, RUN: tl.constexpr, HAS_TABLE_ROWS: tl.constexpr, SKIPPED: tl.constexpr
):
    """Tokens of the longest of a run's rows, and the run's line of the page table; without a line none."""
    if RUN == 1:
        context = _contexts(context_ptr, run, True, SKIPPED)
    else:
        in_run = tl.arange(0, 16)
        context = tl.max(_contexts(context_ptr, run * RUN + in_run, in_run < RUN, SKIPPED), 0)
    table_row = run * RUN
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_row_ptr + table_row).to(tl.int64)
        context = tl.where(table_row < 0, 0, context)
    return context, table_row


@triton.jit
def unpack_fp8(pairs):
    """Even and odd columns in fp16 from 16-bit pairs of e4m3 numbers.

    A product needs two tokens' values side by side in a register. Pairs of columns can be loaded
    that way like any 16-bit numbers; single bytes would be loaded and turned one by one.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 first, second;
        .reg .b32 of_first, of_second;
        mov.b32 {first, second}, $2;
        cvt.rn.f16x2.e4m3x2 of_first, first;
        cvt.rn.f16x2.e4m3x2 of_second, second;
        prmt.b32 $0, of_first, of_second, 0x5410;
        prmt.b32 $1, of_first, of_second, 0x7632;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def _attend(
    q,
    k_ptr,
    v_ptr,
    page_row_ptr,
    kv_head,
    first,
    last,
    contexts,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
    SKIPPED: tl.constexpr,
):
    """Softmax over tokens `first` to `last` of one sequence: weighted values, their total weight
    and the highest score, which the weights are relative to. Scores are in units of log 2.

    In a run every line of `q` ends at its own context; one that has no token here is left a total of zero.
    """
    columns = tl.arange(0, HEAD_DIM)
    pairs = tl.arange(0, HEAD_DIM // 2)
    even = tl.zeros((q.shape[0], HEAD_DIM // 2), tl.float32)
    odd = tl.zeros((q.shape[0], HEAD_DIM // 2), tl.float32)
    in_tile = tl.arange(0, TILE)
    # Below every score, and a number: a line of a run may see tiles that have no token for it.
    highest = tl.full((q.shape[0],), -1e30, tl.float32)
    total = tl.zeros((q.shape[0],), tl.float32)
    mixed = tl.zeros((q.shape[0], HEAD_DIM), tl.float32)
    for start in tl.range(first, last, TILE, num_stages=STAGES):
        tokens = start + in_tile
        is_token = tokens < last
        if SKIPPED > 0:
            is_token = is_token & (tokens >= SKIPPED)
        pages = tl.load(page_row_ptr + tokens // PAGE_TOKENS, mask=is_token, other=0).to(tl.int64)
        slots = (pages * PAGE_TOKENS + tokens % PAGE_TOKENS) * KV_HEADS + kv_head
        places = slots[:, None] * HEAD_DIM + columns[None, :]
        k = tl.load(k_ptr + places, mask=is_token[:, None], other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        is_seen = is_token[None, :]
        if RUN > 1:
            is_seen = is_seen & (tokens[None, :] < contexts[:, None])
        scores = tl.where(is_seen, scores, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - rising[:, None])
        faded = tl.exp2(highest - rising)
        total = total * faded + tl.sum(weights, 1)
        weights = weights.to(q.dtype)
        if IS_FP8:
            v_places = slots[:, None] * (HEAD_DIM // 2) + pairs[None, :]
            v_even, v_odd = unpack_fp8(tl.load(v_ptr + v_places, mask=is_token[:, None], other=0))
            even = tl.dot(weights, v_even, even * faded[:, None])
            odd = tl.dot(weights, v_odd, odd * faded[:, None])
        else:
            v = tl.load(v_ptr + places, mask=is_token[:, None], other=0.0).to(q.dtype)
            mixed = tl.dot(weights, v, mixed * faded[:, None], input_precision=PRECISION)
        highest = rising
    if IS_FP8:
        mixed = tl.reshape(tl.join(even, odd), (q.shape[0], HEAD_DIM))
    return mixed, total, highest


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    page_table_ptr,
    table_row_ptr,
    context_ptr,
    gate_ptr,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    scale,
    q_row_stride,
    q_head_stride,
    gate_row_stride,
    gate_head_stride,
    table_stride,
    num_parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    IS_JOINED_LATER: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    FORMAT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    IS_FP8: tl.constexpr,
    SKIPPED: tl.constexpr,
):
    kv_head = tl.program_id(0)
    run = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    context, table_row = _context_and_line(context_ptr, table_row_ptr, run, RUN, HAS_TABLE_ROWS, SKIPPED)
    first, last = _part_of_context(context, part, num_parts, LEAST, TILE)
    if IS_JOINED_LATER and first >= context:
        return
    grouped = tl.arange(0, GROUP_BLOCK)
    is_head = grouped < RUN * GROUP
    heads, row, contexts = kv_head * GROUP + grouped, run, context
    if RUN > 1:
        heads = kv_head * GROUP + grouped % GROUP
        row = run * RUN + grouped // GROUP
        contexts = _contexts(context_ptr, row, is_head, SKIPPED)
    columns = tl.arange(0, HEAD_DIM)
    q_places = (row * q_row_stride + heads * q_head_stride)[:, None] + columns[None, :]
    q = tl.load(q_ptr + q_places, mask=is_head[:, None], other=0.0).to(FORMAT)
    mixed, total, highest = _attend(
        q,
        k_ptr,
        v_ptr,
        page_table_ptr + table_row * table_stride,
        kv_head,
        first,
        last,
        contexts,
        scale,
        KV_HEADS,
        HEAD_DIM,
        PAGE_TOKENS,
        RUN,
        TILE,
        PRECISION,
        STAGES,
        IS_FP8,
        SKIPPED,
    )
    # A padding row has no token: its total is zero and so is its output.
    out = mixed / tl.maximum(total, 1e-30)[:, None]
    if IS_JOINED_LATER:
        entry = (row * (KV_HEADS * GROUP) + heads) * num_parts + part
        tl.store(part_out_ptr + entry[:, None] * HEAD_DIM + columns[None, :], out, mask=is_head[:, None])
        tl.store(part_lse_ptr + entry, highest + tl.log2(total), mask=is_head)
    else:
        if HAS_GATE:
            gate_places = (
                row[:, None] * gate_row_stride + heads[:, None] * gate_head_stride + columns[None, :]
            )
            gate = tl.load(gate_ptr + gate_places, mask=is_head[:, None], other=0.0)
            out *= tl.sigmoid(gate.to(tl.float32))
        out_places = (row * (KV_HEADS * GROUP) + heads)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out_ptr + out_places, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None])


@triton.jit
def join_kernel(
    part_out_ptr,
    part_lse_ptr,
    table_row_ptr,
    context_ptr,
    gate_ptr,
    out_ptr,
    numbers_ptr,
    scales_ptr,
    gate_row_stride,
    gate_head_stride,
    num_parts,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    TILE: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    SKIPPED: tl.constexpr,
    GROUP_INPUTS: tl.constexpr,
):
    """Weigh the parts of one row and head by their share of the softmax, and gate the sum.

    With `GROUP_INPUTS`, the sum goes to `numbers` in E4M3 too, and a scale for each so many to `scales`, `[G, R]`.
    """
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    context, _ = _context_and_line(context_ptr, table_row_ptr, row // RUN, RUN, HAS_TABLE_ROWS, SKIPPED)
    parts = tl.arange(0, PARTS_BLOCK)
    first, _ = _part_of_context(context, parts, num_parts, LEAST, TILE)
    if RUN > 1:  # the row's own, which may end before the last part
        context = tl.minimum(context, _contexts(context_ptr, row, True, SKIPPED))
    is_part = (parts < num_parts) & (first < context)
    columns = tl.arange(0, HEAD_DIM)
    entries = (row * HEADS + head) * num_parts + parts
    lse = tl.load(part_lse_ptr + entries, mask=is_part, other=float("-inf"))
    share = tl.where(is_part, tl.exp2(lse - tl.max(tl.where(is_part, lse, -1e30), 0)), 0.0)
    share = share / tl.maximum(tl.sum(share, 0), 1e-30)
    part_out = tl.load(
        part_out_ptr + entries[:, None] * HEAD_DIM + columns[None, :], mask=is_part[:, None], other=0.0
    )
    out = tl.sum(part_out * share[:, None], 0)
    if HAS_GATE:
        gate = tl.load(gate_ptr + row * gate_row_stride + head * gate_head_stride + columns)
        out *= tl.sigmoid(gate.to(tl.float32))
    places = (row * HEADS + head) * HEAD_DIM + columns
    left = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + places, left)
    if GROUP_INPUTS > 0:
        GROUPS: tl.constexpr = HEAD_DIM // GROUP_INPUTS
        numbers, scales = e4m3_groups(left.to(tl.float32), GROUP_INPUTS)
        tl.store(numbers_ptr + places, numbers.to(numbers_ptr.dtype.element_ty))
        groups = head * GROUPS + tl.arange(0, GROUPS)
        tl.store(scales_ptr + groups * tl.num_programs(1) + row, scales)
