"""The device code of LoRA's two launches; `triton.py` launches it and states what it supports.

The first, shrink, leaves `A x` of every entry as float32 partial sums over pieces of the inputs,
so that few tokens still occupy much of the GPU; the second, expand, adds the pieces in order,
multiplies by B and adds to y. With few tokens both are short chains of loads that wait for each
other, so the chains are kept short and begin before the predecessor has ended: rows come by a copy
in this stream, tables were complete before a step could name them, and both may be read before
`wait_for_producers`; so may the sums, where what runs in between shows its producers.

Partial sums lie as [entry, module, block of 16 ranks, token, rank, piece], the pieces of a sum side
by side in room for a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.dependent_launch import start_dependents, wait_for_producers


@triton.jit
def _product(left, right, INTERPRETED: tl.constexpr):
    """`left right`; the interpreter's bf16 products are wrong, so it gets float32."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    elif left.dtype == tl.float32:
        return tl.dot(left, right, input_precision="ieee")
    else:
        return tl.dot(left, right)


@triton.jit
def shrink_few_kernel(
    x,
    a,
    h,
    adapters_E,
    ranks_E,
    entries_E2M,
    num_inputs,
    x_stride,
    a_adapter_stride,
    a_row_stride,
    NUM_MODULES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PIECE_ROOM: tl.constexpr,
    TABLE_RANK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    WAYS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One piece of the inputs of one module for one entry, all of it in flight at once.

    Each of WAYS warps sums its own part of the piece.
    """
    module = tl.program_id(0) // NUM_PIECES
    piece = tl.program_id(0) % NUM_PIECES
    entry = tl.program_id(1)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    way = tl.arange(0, WAYS)
    column = tl.arange(0, INPUTS // WAYS)
    inputs = piece * INPUTS + way[:, None] * (INPUTS // WAYS) + column[None, :]
    is_input = inputs < num_inputs
    adapter = tl.load(adapters_E + entry).to(tl.int64)
    rank = tl.load(ranks_E + entry)
    token = tl.load(entries_E2M + entry * (2 * TOKENS) + token_of, mask=rank > 0, other=-1)
    a_places = a + adapter * a_adapter_stride + (module * TABLE_RANK).to(tl.int64) * a_row_stride
    a_places += rank_of[None, None, :] * a_row_stride + inputs[:, :, None]
    a_tile = tl.load(a_places, mask=is_input[:, :, None] & (rank_of < rank)[None, None, :], other=0.0)
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    if rank > 0:
        x_tile = tl.load(
            x + token.to(tl.int64)[None, :, None] * x_stride + inputs[:, None, :],
            mask=(token >= 0)[None, :, None] & is_input[:, None, :],
            other=0.0,
        )
        SUMS: tl.constexpr = TOKENS * 16 * PIECE_ROOM
        place = h + ((entry * NUM_MODULES + module) * RANK_BLOCKS).to(tl.int64) * SUMS + piece
        place += (token_of[:, None] * 16 + rank_of[None, :]) * PIECE_ROOM
        tl.store(place, tl.sum(_product(x_tile, a_tile, INTERPRETED), 0))
        for block in range(1, tl.cdiv(rank, 16)):
            a_block = tl.load(
                a_places + block * 16 * a_row_stride,
                mask=is_input[:, :, None] & (block * 16 + rank_of < rank)[None, None, :],
                other=0.0,
            )
            sums = tl.sum(_product(x_tile, a_block, INTERPRETED), 0)
            tl.store(place + block * SUMS, sums)


@triton.jit
def shrink_many_kernel(
    x,
    a,
    h,
    adapters_E,
    ranks_E,
    entries_E2M,
    num_inputs,
    x_stride,
    a_adapter_stride,
    a_row_stride,
    NUM_MODULES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PIECE_ROOM: tl.constexpr,
    TABLE_RANK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCKS_PER_PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The same in a loop over the piece, for tiles whose tokens do not all fit at once."""
    module = tl.program_id(0) // NUM_PIECES
    piece = tl.program_id(0) % NUM_PIECES
    entry = tl.program_id(1)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    column = tl.arange(0, INPUTS)
    adapter = tl.load(adapters_E + entry).to(tl.int64)
    rank = tl.load(ranks_E + entry)
    token = tl.load(entries_E2M + entry * (2 * TOKENS) + token_of, mask=rank > 0, other=-1)
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    a_module = a + adapter * a_adapter_stride + (module * TABLE_RANK).to(tl.int64) * a_row_stride
    for block in range(tl.cdiv(rank, 16)):
        ranks = block * 16 + rank_of
        acc = tl.zeros((TOKENS, 16), tl.float32)
        for step in tl.range(0, BLOCKS_PER_PIECE, num_stages=STAGES):
            inputs = (piece * BLOCKS_PER_PIECE + step) * INPUTS + column
            is_input = inputs < num_inputs
            x_tile = tl.load(
                x_rows + inputs[None, :], mask=(token >= 0)[:, None] & is_input[None, :], other=0.0
            )
            a_tile = tl.load(
                a_module + ranks[None, :] * a_row_stride + inputs[:, None],
                mask=(ranks < rank)[None, :] & is_input[:, None],
                other=0.0,
            )
            acc += _product(x_tile, a_tile, INTERPRETED)
        place = h + ((entry * NUM_MODULES + module) * RANK_BLOCKS + block).to(tl.int64) * (
            TOKENS * 16 * PIECE_ROOM
        )
        tl.store(place + (token_of[:, None] * 16 + rank_of[None, :]) * PIECE_ROOM + piece, acc)


@triton.jit
def _outputs_of(block, end_0, end_1, end_2, end_3, OUTPUTS: tl.constexpr, ALIGNED: tl.constexpr):
    """Module, first output and end of the module of a block; no block reaches over a module's end."""
    blocks_0 = tl.cdiv(end_0, OUTPUTS)
    blocks_1 = blocks_0 + tl.cdiv(end_1 - end_0, OUTPUTS)
    blocks_2 = blocks_1 + tl.cdiv(end_2 - end_1, OUTPUTS)
    module = 0
    first = block * OUTPUTS
    end = end_0
    if block >= blocks_0:
        module = 1
        first = end_0 + (block - blocks_0) * OUTPUTS
        end = end_1
    if block >= blocks_1:
        module = 2
        first = end_1 + (block - blocks_1) * OUTPUTS
        end = end_2
    if block >= blocks_2:
        module = 3
        first = end_2 + (block - blocks_2) * OUTPUTS
        end = end_3
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return module, first, end


@triton.jit
def _update(
    h_sums, b_tile, scale,
    TOKENS: tl.constexpr, NUM_PIECES: tl.constexpr, PIECE_ROOM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`B h` of one entry and one block of ranks, after adding up the pieces of h."""
    piece = tl.arange(0, PIECE_ROOM)
    places = h_sums + tl.arange(0, TOKENS * 16)[:, None] * PIECE_ROOM + piece[None, :]
    # The whole room, in wide loads; nobody wrote what lies behind the pieces. From the L2 cache: before
    # the wait, the nearer one may still hold what an earlier layer left at these addresses.
    pieces = tl.where((piece < NUM_PIECES)[None, :], tl.load(places, cache_modifier=".cg"), 0.0)
    h_tile = tl.reshape(tl.sum(pieces, 1), (TOKENS, 16)) * scale[:, None]
    return _product(h_tile.to(b_tile.dtype), b_tile, INTERPRETED)


@triton.jit(do_not_specialize=["end_0", "end_1", "end_2", "end_3"])
def expand_kernel(
    y,
    b,
    h,
    tiles_B4,
    tokens_BM,
    adapters_E,
    ranks_E,
    entries_E2M,
    end_0,
    end_1,
    end_2,
    end_3,
    y_stride,
    b_adapter_stride,
    b_rank_stride,
    NUM_MODULES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PIECE_ROOM: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EARLY: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of outputs of one tile; what comes first of B is on its way before the wait.

    With EARLY the sums are complete when the program starts, and the first product is made before
    the wait too: then only y is left.
    """
    module, first_output, end_output = _outputs_of(
        tl.program_id(0), end_0, end_1, end_2, end_3, OUTPUTS, ALIGNED
    )
    tile = tl.program_id(1)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    output = first_output + tl.arange(0, OUTPUTS)
    is_output = output < end_output
    first = tl.load(tiles_B4 + tile * 4)
    end = tl.load(tiles_B4 + tile * 4 + 1)
    adapter = tl.load(tiles_B4 + tile * 4 + 2).to(tl.int64)
    rank = tl.load(tiles_B4 + tile * 4 + 3)
    token = tl.load(tokens_BM + tile * TOKENS + token_of)
    b_places = b + rank_of[:, None] * b_rank_stride + output[None, :]
    is_read = (rank_of < rank)[:, None] & is_output[None, :]
    b_tile = tl.load(b_places + adapter * b_adapter_stride, mask=is_read, other=0.0)
    scale_bits = tl.load(entries_E2M + (first * 2 + 1) * TOKENS + token_of, mask=first < end, other=0)
    scale = scale_bits.to(tl.float32, bitcast=True)
    SUMS: tl.constexpr = TOKENS * 16 * PIECE_ROOM
    h_first = h + (first * NUM_MODULES + module).to(tl.int64) * (RANK_BLOCKS * SUMS)
    if DEPENDENT:
        start_dependents()
    if EARLY:
        update = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        if first < end:
            update = _update(h_first, b_tile, scale, TOKENS, NUM_PIECES, PIECE_ROOM, INTERPRETED)
    if DEPENDENT:
        wait_for_producers()
    if first < end:
        y_places = y + token.to(tl.int64)[:, None] * y_stride + output[None, :]
        is_mine = (token >= 0)[:, None] & is_output[None, :]
        before = tl.load(y_places, mask=is_mine, other=0.0)
        if not EARLY:
            update = _update(h_first, b_tile, scale, TOKENS, NUM_PIECES, PIECE_ROOM, INTERPRETED)
        acc = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        entry = first
        block = 1
        while entry < end:
            while block * 16 < rank:
                is_read = (block * 16 + rank_of < rank)[:, None] & is_output[None, :]
                b_tile = tl.load(
                    b_places + adapter * b_adapter_stride + block * 16 * b_rank_stride,
                    mask=is_read,
                    other=0.0,
                )
                h_entry = h + (entry * NUM_MODULES + module).to(tl.int64) * (RANK_BLOCKS * SUMS)
                update += _update(
                    h_entry + block * SUMS, b_tile, scale, TOKENS, NUM_PIECES, PIECE_ROOM, INTERPRETED
                )
                block += 1
            # Not by a product with zero, which would let another token's infinity through.
            acc = tl.where((scale != 0.0)[:, None], acc + update, acc)
            entry += 1
            if entry < end:
                adapter = tl.load(adapters_E + entry).to(tl.int64)
                rank = tl.load(ranks_E + entry)
                scale = tl.load(entries_E2M + (entry * 2 + 1) * TOKENS + token_of).to(
                    tl.float32, bitcast=True
                )
                update = tl.zeros((TOKENS, OUTPUTS), tl.float32)
                block = 0
        tl.store(y_places, (before.to(tl.float32) + acc).to(before.dtype), mask=is_mine)
