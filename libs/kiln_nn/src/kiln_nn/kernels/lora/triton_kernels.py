"""The device code of LoRA's two launches; `triton.py` launches them and states what they support.

The first, shrink, leaves `A x` of every entry as float32 partial sums over pieces of the inputs,
so that few tokens still occupy the whole GPU; the second, expand, adds the pieces in order,
multiplies by B and adds to y. Both walk over the entries and tiles that the rows count.

Partial sums lie as [entry, module, block of 16 ranks, piece, token, rank], one program's share in
one stretch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.dependent_launch import prefetch_to_l2, start_dependents, wait_for_producers


@triton.jit
def _product(left, right, acc, INTERPRETED: tl.constexpr):
    """`acc + left right`; the interpreter's bf16 products are wrong, so it gets float32."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
    elif left.dtype == tl.float32:
        return tl.dot(left, right, acc, input_precision="ieee")
    else:
        return tl.dot(left, right, acc)


@triton.jit
def shrink_kernel(
    x,
    a,
    h,
    counts,
    tokens_BM,
    tiles_E,
    adapters_E,
    ranks_E,
    num_inputs,
    num_pieces,
    x_stride,
    a_adapter_stride,
    a_row_stride,
    NUM_MODULES: tl.constexpr,
    TABLE_RANK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCKS_PER_PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One piece of the inputs of one module, for every entry that falls to this program."""
    unit = tl.program_id(0)
    module = unit // num_pieces
    piece = unit % num_pieces
    first_input = piece * (INPUTS * BLOCKS_PER_PIECE)
    num_entries = tl.load(counts + 1)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    column = tl.arange(0, INPUTS)
    a_module = a + module.to(tl.int64) * TABLE_RANK * a_row_stride
    if DEPENDENT:
        start_dependents()
        if PREFETCH:  # noqa: SIM102 - a constant, and then a number
            if tl.program_id(1) < num_entries:
                mine = tl.load(adapters_E + tl.program_id(1)).to(tl.int64)
                num_bytes = tl.minimum(num_inputs - first_input, INPUTS * BLOCKS_PER_PIECE) * 2
                wanted = tl.where(rank_of < tl.load(ranks_E + tl.program_id(1)), num_bytes, 0)
                prefetch_to_l2(
                    a_module + mine * a_adapter_stride + rank_of * a_row_stride + first_input, wanted
                )
        wait_for_producers()
    for entry in range(tl.program_id(1), num_entries, tl.num_programs(1)):
        tile = tl.load(tiles_E + entry)
        adapter = tl.load(adapters_E + entry).to(tl.int64)
        rank = tl.load(ranks_E + entry)
        token = tl.load(tokens_BM + tile * TOKENS + token_of)
        x_rows = x + token.to(tl.int64)[:, None] * x_stride
        for block in range(tl.cdiv(rank, 16)):
            ranks = block * 16 + rank_of
            a_rows = a_module + adapter * a_adapter_stride + ranks[None, :] * a_row_stride
            acc = tl.zeros((TOKENS, 16), tl.float32)
            for step in tl.range(0, BLOCKS_PER_PIECE, num_stages=STAGES):
                inputs = first_input + step * INPUTS + column
                is_input = inputs < num_inputs
                x_tile = tl.load(
                    x_rows + inputs[None, :], mask=(token >= 0)[:, None] & is_input[None, :], other=0.0
                )
                a_tile = tl.load(
                    a_rows + inputs[:, None], mask=(ranks < rank)[None, :] & is_input[:, None], other=0.0
                )
                acc = _product(x_tile, a_tile, acc, INTERPRETED)
            place = ((entry * NUM_MODULES + module) * RANK_BLOCKS + block).to(tl.int64) * num_pieces + piece
            tl.store(h + place * (TOKENS * 16) + token_of[:, None] * 16 + rank_of[None, :], acc)


@triton.jit
def _outputs_of(block, end_0, end_1, end_2, end_3, OUTPUTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Module, first output and end of the module of a block; no block reaches over a module's end."""
    blocks_0 = tl.cdiv(end_0, OUTPUTS)
    blocks_1 = blocks_0 + tl.cdiv(end_1 - end_0, OUTPUTS)
    blocks_2 = blocks_1 + tl.cdiv(end_2 - end_1, OUTPUTS)
    module = (
        (block >= blocks_0).to(tl.int32) + (block >= blocks_1).to(tl.int32) + (block >= blocks_2).to(tl.int32)
    )
    first = block * OUTPUTS
    end = end_0
    if module == 1:
        first = end_0 + (block - blocks_0) * OUTPUTS
        end = end_1
    if module == 2:
        first = end_1 + (block - blocks_1) * OUTPUTS
        end = end_2
    if module == 3:
        first = end_2 + (block - blocks_2) * OUTPUTS
        end = end_3
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return module, first, end


@triton.jit(do_not_specialize=["end_0", "end_1", "end_2", "end_3"])
def expand_kernel(
    y,
    b,
    h,
    counts,
    tokens_BM,
    first_entries_B1,
    adapters_E,
    ranks_E,
    scales_EM,
    num_pieces,
    end_0,
    end_1,
    end_2,
    end_3,
    y_stride,
    b_adapter_stride,
    b_rank_stride,
    NUM_MODULES: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PIECES: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of outputs, for every tile that falls to this program."""
    module, first, end = _outputs_of(tl.program_id(0), end_0, end_1, end_2, end_3, OUTPUTS, ALIGNED)
    num_tiles = tl.load(counts)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    piece_of = tl.arange(0, PIECES)
    output = first + tl.arange(0, OUTPUTS)
    is_output = output < end
    if DEPENDENT:
        start_dependents()
        if PREFETCH:  # noqa: SIM102 - a constant, and then a number
            if tl.program_id(1) < num_tiles:
                entry = tl.load(first_entries_B1 + tl.program_id(1))
                adapter = tl.load(adapters_E + entry).to(tl.int64)
                num_bytes = tl.minimum(end - first, OUTPUTS) * 2
                wanted = tl.where(rank_of < tl.load(ranks_E + entry), num_bytes, 0)
                prefetch_to_l2(b + adapter * b_adapter_stride + rank_of * b_rank_stride + first, wanted)
        wait_for_producers()
    for tile in range(tl.program_id(1), num_tiles, tl.num_programs(1)):
        token = tl.load(tokens_BM + tile * TOKENS + token_of)
        y_places = y + token.to(tl.int64)[:, None] * y_stride + output[None, :]
        is_mine = (token >= 0)[:, None] & is_output[None, :]
        before = tl.load(y_places, mask=is_mine, other=0.0)
        acc = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        for entry in range(tl.load(first_entries_B1 + tile), tl.load(first_entries_B1 + tile + 1)):
            adapter = tl.load(adapters_E + entry).to(tl.int64)
            rank = tl.load(ranks_E + entry)
            scale = tl.load(scales_EM + entry * TOKENS + token_of)
            update = tl.zeros((TOKENS, OUTPUTS), tl.float32)
            for block in range(tl.cdiv(rank, 16)):
                ranks = block * 16 + rank_of
                b_tile = tl.load(
                    b + adapter * b_adapter_stride + ranks[:, None] * b_rank_stride + output[None, :],
                    mask=(ranks < rank)[:, None] & is_output[None, :],
                    other=0.0,
                )
                place = ((entry * NUM_MODULES + module) * RANK_BLOCKS + block).to(tl.int64) * num_pieces
                pieces = tl.load(
                    h
                    + (place + piece_of[:, None, None]) * (TOKENS * 16)
                    + token_of[None, :, None] * 16
                    + rank_of[None, None, :],
                    mask=piece_of[:, None, None] < num_pieces,
                    other=0.0,
                )
                h_tile = tl.sum(pieces, 0) * scale[:, None]
                update = _product(h_tile.to(b_tile.dtype), b_tile, update, INTERPRETED)
            # Not by a product with zero, which would let another token's infinity through.
            acc = tl.where((scale != 0.0)[:, None], acc + update, acc)
        after = before.to(tl.float32) + acc
        tl.store(y_places, after.to(before.dtype), mask=is_mine)
