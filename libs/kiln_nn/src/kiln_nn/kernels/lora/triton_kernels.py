"""The device code of LoRA's two launches; `triton.py` launches it and states what it supports.

The first, shrink, leaves `A x` of every entry as float32 partial sums over pieces of the inputs,
so that few tokens still occupy much of the GPU; the second, expand, adds the pieces in order,
multiplies by B and adds to y. With few tokens both are short chains of loads that wait for each
other, so the chains are kept short and begin before the predecessor has ended: the rows and the
tables are written by copies long before, and may be read before `wait_for_producers`.

An expand program takes a block of outputs of a whole tile, several adapters in one product: `A x`
of each token stands in the columns of its own adapter, between zeros.

Partial sums lie as [layer, module, block of 16 ranks, token, rank, piece], the pieces of a sum side by
side in room for a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kiln_nn.kernels.dependent_launch import start_dependents, wait_for_producers

_HEAD = tl.constexpr(4)


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
    counts,
    entries_EW,
    num_inputs,
    x_stride,
    a_adapter_stride,
    a_row_stride,
    NUM_MODULES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PIECE_ROOM: tl.constexpr,
    TABLE_RANK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    WAYS: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One piece of the inputs of one module for one entry after the other, a whole piece in flight.

    Each of WAYS warps sums its own part of the piece.
    """
    module = tl.program_id(0) // NUM_PIECES
    piece = tl.program_id(0) % NUM_PIECES
    entry = tl.program_id(1)
    num_entries = tl.load(counts)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    way = tl.arange(0, WAYS)
    column = tl.arange(0, INPUTS // WAYS)
    inputs = piece * INPUTS + way[:, None] * (INPUTS // WAYS) + column[None, :]
    is_input = inputs < num_inputs
    a_places = a + (module * TABLE_RANK).to(tl.int64) * a_row_stride
    a_places += rank_of[None, None, :] * a_row_stride + inputs[:, :, None]
    record = entries_EW + entry * (_HEAD + TOKENS)
    adapter = tl.load(record, mask=entry < num_entries, other=0).to(tl.int64)
    rank = tl.load(record + 1, mask=entry < num_entries, other=0)
    token = tl.load(record + _HEAD + token_of, mask=entry < num_entries, other=-1)
    is_read = is_input[:, :, None] & (rank_of < rank)[None, None, :]
    a_tile = tl.load(a_places + adapter * a_adapter_stride, mask=is_read, other=0.0)
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    while entry < num_entries:
        layer = tl.load(record + 2)
        start = tl.load(record + 3)
        x_tile = tl.load(
            x + token.to(tl.int64)[None, :, None] * x_stride + inputs[:, None, :],
            mask=(token >= 0)[None, :, None] & is_input[:, None, :],
            other=0.0,
        )
        place = h + ((layer * NUM_MODULES + module) * RANK_BLOCKS).to(tl.int64) * (
            TILE_TOKENS * 16 * PIECE_ROOM
        )
        place += ((start + token_of)[:, None] * 16 + rank_of[None, :]) * PIECE_ROOM + piece
        tl.store(place, tl.sum(_product(x_tile, a_tile, INTERPRETED), 0), mask=(token >= 0)[:, None])
        for block in range(1, tl.cdiv(rank, 16)):
            a_block = tl.load(
                a_places + adapter * a_adapter_stride + block * 16 * a_row_stride,
                mask=is_input[:, :, None] & (block * 16 + rank_of < rank)[None, None, :],
                other=0.0,
            )
            sums = tl.sum(_product(x_tile, a_block, INTERPRETED), 0)
            tl.store(place + block * (TILE_TOKENS * 16 * PIECE_ROOM), sums, mask=(token >= 0)[:, None])
        entry += tl.num_programs(1)
        if entry < num_entries:
            record = entries_EW + entry * (_HEAD + TOKENS)
            adapter = tl.load(record).to(tl.int64)
            rank = tl.load(record + 1)
            token = tl.load(record + _HEAD + token_of)
            is_read = is_input[:, :, None] & (rank_of < rank)[None, None, :]
            a_tile = tl.load(a_places + adapter * a_adapter_stride, mask=is_read, other=0.0)


@triton.jit
def shrink_many_kernel(
    x,
    a,
    h,
    counts,
    entries_EW,
    num_inputs,
    x_stride,
    a_adapter_stride,
    a_row_stride,
    NUM_MODULES: tl.constexpr,
    NUM_PIECES: tl.constexpr,
    PIECE_ROOM: tl.constexpr,
    TABLE_RANK: tl.constexpr,
    RANK_BLOCKS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TOKENS: tl.constexpr,
    INPUTS: tl.constexpr,
    BLOCKS_PER_PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The same in a loop over the piece, for entries whose tokens do not all fit at once."""
    module = tl.program_id(0) // NUM_PIECES
    piece = tl.program_id(0) % NUM_PIECES
    num_entries = tl.load(counts)
    token_of = tl.arange(0, TOKENS)
    rank_of = tl.arange(0, 16)
    column = tl.arange(0, INPUTS)
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    for entry in range(tl.program_id(1), num_entries, tl.num_programs(1)):
        record = entries_EW + entry * (_HEAD + TOKENS)
        adapter = tl.load(record).to(tl.int64)
        rank = tl.load(record + 1)
        layer = tl.load(record + 2)
        start = tl.load(record + 3)
        token = tl.load(record + _HEAD + token_of)
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
            place = h + ((layer * NUM_MODULES + module) * RANK_BLOCKS + block).to(tl.int64) * (
                TILE_TOKENS * 16 * PIECE_ROOM
            )
            place += ((start + token_of)[:, None] * 16 + rank_of[None, :]) * PIECE_ROOM + piece
            tl.store(place, acc, mask=(token >= 0)[:, None])


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
def _load_b(
    b, adapters_C, ranks_C, member, end_member, block, output, is_output, b_adapter_stride, b_rank_stride,
    MEMBERS: tl.constexpr,
):  # fmt: skip
    """A block of ranks of several members, one below the other, zeros where a rank is not used.

    What is not finite counts as zero: a product would carry it to the tokens of other members.
    """
    column = tl.arange(0, MEMBERS * 16)
    member_of = member + column // 16
    rank_of = block * 16 + column % 16
    adapter = tl.load(adapters_C + member_of, mask=member_of < end_member, other=0).to(tl.int64)
    rank = tl.load(ranks_C + member_of, mask=member_of < end_member, other=0)
    places = b + (adapter * b_adapter_stride + rank_of * b_rank_stride)[:, None] + output[None, :]
    tile = tl.load(places, mask=(rank_of < rank)[:, None] & is_output[None, :], other=0.0)
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, tl.zeros_like(tile))


@triton.jit
def _load_h(
    h_sums, ranks_C, member, end_member, block, used, scale,
    TOKENS: tl.constexpr, NUM_PIECES: tl.constexpr, PIECE_ROOM: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """`A x` times the scale, its pieces added in order, in the columns of the member a token uses."""
    piece = tl.arange(0, PIECE_ROOM)
    places = h_sums + tl.arange(0, TOKENS * 16)[:, None] * PIECE_ROOM + piece[None, :]
    # The whole room, in wide loads; nobody wrote what lies behind the pieces, or where nothing is used.
    pieces = tl.where((piece < NUM_PIECES)[None, :], tl.load(places), 0.0)
    sums = tl.reshape(tl.sum(pieces, 1), (TOKENS, 16)) * scale[:, None]
    member_of = member + tl.arange(0, MEMBERS)
    rank = tl.load(ranks_C + member_of, mask=member_of < end_member, other=0)
    is_rank = block * 16 + tl.arange(0, 16)[None, :] < rank[:, None]
    is_used = (used[:, None] == member_of[None, :])[:, :, None] & is_rank[None, :, :]
    return tl.reshape(tl.where(is_used, sums[:, None, :], 0.0), (TOKENS, MEMBERS * 16))


@triton.jit(do_not_specialize=["end_0", "end_1", "end_2", "end_3"])
def expand_kernel(
    y,
    b,
    h,
    tiles_B5,
    tokens_BM,
    adapters_C,
    ranks_C,
    layers_L2M,
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
    MEMBERS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One block of outputs of one tile; what comes first of B is on its way before the wait."""
    module, first_output, end_output = _outputs_of(
        tl.program_id(0), end_0, end_1, end_2, end_3, OUTPUTS, ALIGNED
    )
    tile = tl.program_id(1)
    token_of = tl.arange(0, TOKENS)
    output = first_output + tl.arange(0, OUTPUTS)
    is_output = output < end_output
    layer = tl.load(tiles_B5 + tile * 5)
    end_layer = tl.load(tiles_B5 + tile * 5 + 1)
    first_member = tl.load(tiles_B5 + tile * 5 + 2)
    end_member = tl.load(tiles_B5 + tile * 5 + 3)
    num_blocks = tl.load(tiles_B5 + tile * 5 + 4)
    token = tl.load(tokens_BM + tile * TOKENS + token_of)
    b_tile = _load_b(
        b, adapters_C, ranks_C, first_member, end_member, 0, output, is_output, b_adapter_stride, b_rank_stride,
        MEMBERS,
    )  # fmt: skip
    if DEPENDENT:
        start_dependents()
        wait_for_producers()
    if layer < end_layer:
        y_places = y + token.to(tl.int64)[:, None] * y_stride + output[None, :]
        is_mine = (token >= 0)[:, None] & is_output[None, :]
        before = tl.load(y_places, mask=is_mine, other=0.0)
        acc = tl.zeros((TOKENS, OUTPUTS), tl.float32)
        member = first_member
        block = 0
        SUMS: tl.constexpr = TOKENS * 16 * PIECE_ROOM
        while layer < end_layer:
            used = tl.load(layers_L2M + layer * (2 * TOKENS) + token_of)
            used = tl.where(used >= 0, used + first_member, -1)
            scale = tl.load(layers_L2M + layer * (2 * TOKENS) + TOKENS + token_of).to(
                tl.float32, bitcast=True
            )
            h_sums = h + ((layer * NUM_MODULES + module) * RANK_BLOCKS + block).to(tl.int64) * SUMS
            h_tile = _load_h(
                h_sums,
                ranks_C,
                member,
                end_member,
                block,
                used,
                scale,
                TOKENS,
                NUM_PIECES,
                PIECE_ROOM,
                MEMBERS,
            )
            acc += _product(h_tile.to(b_tile.dtype), b_tile, INTERPRETED)
            # Next block of ranks, next members, next layer.
            block += 1
            if block == num_blocks:
                block = 0
                member += MEMBERS
            if member >= end_member:
                member = first_member
                layer += 1
            if layer < end_layer:
                b_tile = _load_b(
                    b, adapters_C, ranks_C, member, end_member, block, output, is_output, b_adapter_stride,
                    b_rank_stride, MEMBERS,
                )  # fmt: skip
        tl.store(y_places, (before.to(tl.float32) + acc).to(before.dtype), mask=is_mine)
