"""Linear layers over quantised weights on Hopper by specialised warps: one fetches, the others multiply.

One warp asks the memory accelerator for slot after slot of the ring of triton_hopper_quantised.py. Each
warp group of the others has 64 rows of weights for itself, which it unpacks into registers, and shares
x with the rest. It waits for nobody but the fetching warp: while it unpacks, the tensor cores multiply
for another group, and for the other half of its own inputs. Two or three groups read x once, which is
what bounds tiles of many tokens: x comes from the L2 cache as often as there are programs of outputs.

Sums over a group of 128 inputs are scaled in float32, in tiles of more than 64 tokens the weights in
bf16; E4M3's scale, one an output, comes last.

Takes bf16 x and quantised matrices of any number of outputs whose rows are 16-byte aligned (inputs in
whole groups of 128) on compute capability 9.0. Sums are float32 and rounded once; every element is
summed in one order, given by the configuration alone. Partial sums always stay apart; the other
forms do not split inputs.

Legend: `T` tokens, `I` inputs, `O` outputs, `S` partial sums, `F` feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kiln_nn.kernels.linear.config import SpecialisedConfig
from kiln_nn.kernels.linear.triton_hopper_parts import (
    X_COLUMNS,
    ask_for_x,
    barrier,
    boxes,
    describe,
    rows_fetched,
    source_rows,
)
from kiln_nn.kernels.linear.triton_hopper_unpack import (
    eight_bits_half,
    fetch_group_scales,
    four_bits_half,
    half_places,
    halves_of,
    places,
)
from kiln_nn.kernels.quantised import FP8, QuantisedMatrix

_GROUP_ROWS = 64  # of weights, for a warp group: as many as one product takes
_MOST_TOKENS_BY_GROUP = 64  # of a tile: sums of a group beside all the sums are what registers hold
_FOUR_BIT_PLACES = gl.constexpr(places(_GROUP_ROWS, 4, is_four_bits=True))
_FOUR_BIT_HALVES = gl.constexpr(half_places(is_four_bits=True))
_EIGHT_BIT_PLACES = gl.constexpr(places(_GROUP_ROWS, 4, is_four_bits=False))
_EIGHT_BIT_HALVES = gl.constexpr(half_places(is_four_bits=False))
_INPUTS = 128  # of a slot: one group of four-bit weights
_FIRST, _SECOND, _THIRD = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
_FETCHING_REGISTERS = gl.constexpr(24)
_REGISTERS = {2: 240, 3: 160}  # of a thread that multiplies: what a multiprocessor has


@gluon.jit
def _ask_for_weights(
    box_desc,
    rest_desc,
    ring,
    bar,
    slot,
    row,
    num_outputs,
    block,
    wanted,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    HALVES: gl.constexpr,
    TILES: gl.constexpr,
):
    """One slot's weights, `[TILES, HALVES * BOX + HALVES * REST, columns]`, and the bytes to wait for."""
    BOX: gl.constexpr = box_desc.block_type.shape[0]
    col = block * box_desc.block_type.shape[1]
    mbarrier.expect(bar, SLOT_BYTES, pred=wanted)
    for place in gl.static_range(TILES):
        tile = ring.index(slot * TILES + place)
        for half in gl.static_range(HALVES):
            first = row + place * (BOX + REST) + half * num_outputs
            tma.async_copy_global_to_shared(
                box_desc, [first, col], bar, tile.slice(half * BOX, BOX, dim=0), wanted
            )
            if REST > 0:
                rest = tile.slice(HALVES * BOX + half * REST, REST, dim=0)
                tma.async_copy_global_to_shared(rest_desc, [first + BOX, col], bar, rest, wanted)


@gluon.jit
def _fetch(
    fetching,
    SLOT_BYTES: gl.constexpr,
    REST: gl.constexpr,
    X_REST: gl.constexpr,
    HALVES: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """The fetching warp: weights before the predecessor has ended, then x, then slots as they are given back."""
    (
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        full,
        empty,
        row,
        token,
        num_outputs,
        begin,
        count,
        shows_producers,
    ) = fetching
    for slot in gl.static_range(STAGES):
        _ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            full.index(slot),
            slot,
            row,
            num_outputs,
            begin + slot,
            slot < count,
            SLOT_BYTES,
            REST,
            HALVES,
            TILES,
        )
    if DEPENDENT:
        gdc_wait()
        if shows_producers != 0:
            gdc_launch_dependents()
    for slot in gl.static_range(STAGES):
        bar = full.index(slot)
        ask_for_x(x_desc, x_rest_desc, x_ring, bar, slot, token, begin + slot, slot < count, X_REST, 2)
    for block in range(STAGES, count):
        place = block % STAGES
        # The slot's round before this one, number block // STAGES - 1.
        mbarrier.wait(empty.index(place), (block // STAGES - 1) & 1)
        again = full.index(place)
        _ask_for_weights(
            box_desc,
            rest_desc,
            w_ring,
            again,
            place,
            row,
            num_outputs,
            begin + block,
            True,
            SLOT_BYTES,
            REST,
            HALVES,
            TILES,
        )
        ask_for_x(x_desc, x_rest_desc, x_ring, again, place, token, begin + block, True, X_REST, 2)


@gluon.jit
def _half(
    w_ring,
    scales,
    place,
    group_scales,
    HALF: gl.constexpr,
    TOKENS: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
):
    """Half of a tile of weights, `[64, 64]`, unpacked as the left operand."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    tile = w_ring.index(place)
    if FOUR_BITS:
        words = gl.convert_layout(halves_of(tile.load(_FOUR_BIT_PLACES))[HALF], _FOUR_BIT_HALVES)
        if SCALED:
            scale = scales.index(group_scales).load(_FOUR_BIT_HALVES).to(gl.bfloat16)
            numbers = four_bits_half(words, scale, True)
        else:
            numbers = four_bits_half(words, words, False)
    else:
        pairs = gl.convert_layout(halves_of(tile.load(_EIGHT_BIT_PLACES))[HALF], _EIGHT_BIT_HALVES)
        numbers = eight_bits_half(pairs)
    return gl.convert_layout(numbers, operand)


@gluon.jit
def _multiply_tile(
    w_ring, x_first, x_last, scales, place, group_scales, total, FOUR_BITS: gl.constexpr, SCALED: gl.constexpr
):
    """A block's products of one more tile, of which the last half is still in flight at the end."""
    TOKENS: gl.constexpr = total.shape[1]
    first = _half(w_ring, scales, place, group_scales, 0, TOKENS, FOUR_BITS, SCALED)
    total = warpgroup_mma(first, x_first, total, is_async=True)
    total = warpgroup_mma_wait(1, deps=[total])
    last = _half(w_ring, scales, place, group_scales, 1, TOKENS, FOUR_BITS, SCALED)
    total = warpgroup_mma(last, x_last, total, is_async=True)
    return warpgroup_mma_wait(1, deps=[total])


@gluon.jit
def _multiply(
    w_ring,
    x_ring,
    scales,
    full,
    empty,
    group,
    count,
    GROUPS: gl.constexpr,
    TILES: gl.constexpr,
    SCALES: gl.constexpr,
    STAGES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
):
    """A warp group's sums over `count` blocks of inputs, those of four bits scaled.

    They are three, `[64, TOKENS]` each, of which those from `TILES` on are zeros.

    While one half of a tile is multiplied the next is unpacked, into registers of its own: the first
    half of the next block before the products of this one are waited for, so that only that wait lies
    between two blocks. No product is in flight where the loop turns round: the compiler would put a wait
    behind each.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    BY_GROUP: gl.constexpr = FOUR_BITS and not SCALED
    first_tile = group * TILES
    first_scales = first_tile * SCALES
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    second = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    third = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    sums = total
    mbarrier.wait(full.index(0), 0, pred=count > 0)
    first = _half(w_ring, scales, first_tile, first_scales, 0, TOKENS, FOUR_BITS, SCALED)
    for block in range(count):
        slot = block % STAGES
        x_first = x_ring.index(2 * slot).permute((1, 0))
        x_last = x_ring.index(2 * slot + 1).permute((1, 0))
        if BY_GROUP:
            running = warpgroup_mma(first, x_first, gl.zeros_like(total), use_acc=False, is_async=True)
            before = first_scales + gl.maximum(block - 1, 0)
            total += sums * scales.index(before).load(layout).to(gl.float32)
        else:
            running = warpgroup_mma(first, x_first, total, is_async=True)
        # All warps of the group have waited for the products with the slot before.
        barrier()
        mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), count=1, pred=block > 0)
        place = slot * (GROUPS * TILES) + first_tile
        last = _half(w_ring, scales, place, first_scales + block, 1, TOKENS, FOUR_BITS, SCALED)
        running = warpgroup_mma(last, x_last, running, is_async=True)
        # The first half has been multiplied: its registers are free.
        running = warpgroup_mma_wait(1, deps=[running])
        if TILES == 3:
            group_scales = first_scales + SCALES + block
            second = _multiply_tile(
                w_ring, x_first, x_last, scales, place + 1, group_scales, second, FOUR_BITS, SCALED
            )
            group_scales += SCALES
            third = _multiply_tile(
                w_ring, x_first, x_last, scales, place + 2, group_scales, third, FOUR_BITS, SCALED
            )
        following = gl.minimum(block + 1, count - 1)
        next_slot = following % STAGES
        next_bar, next_phase = full.index(next_slot), (following // STAGES) & 1
        mbarrier.wait(next_bar, next_phase)
        place = next_slot * (GROUPS * TILES) + first_tile
        first = _half(w_ring, scales, place, first_scales + following, 0, TOKENS, FOUR_BITS, SCALED)
        # Passed at once, but the compiler does not move the unpacking behind it and the products' wait.
        mbarrier.wait(next_bar, next_phase)
        if TILES == 3:
            sums, second, third = warpgroup_mma_wait(0, deps=[running, second, third])
        else:
            sums = warpgroup_mma_wait(0, deps=[running])
        if not BY_GROUP:
            total = sums
    if BY_GROUP:
        last_scales = first_scales + gl.maximum(count - 1, 0)
        total += sums * scales.index(last_scales).load(layout).to(gl.float32)
    return total, second, third


@gluon.jit
def _store(
    out_ptr,
    sums,
    row,
    first_row,
    token,
    split,
    num_tokens,
    num_outputs,
    out_stride,
    COUNT: gl.constexpr,
    ALL: gl.constexpr,
    GATED: gl.constexpr,
):
    """`COUNT` outputs from `row` on, whose sums (and whose gates' sums) lie in shared memory.

    `sums` is `[64, TOKENS]`, first the gates from row `first_row` on, `COUNT` rows further the others.
    """
    layout: gl.constexpr = gl.BlockedLayout([2, 1], [16, 2], [1, 4], [0, 1])
    if GATED:
        gate = sums.slice(first_row, COUNT, dim=0).load(layout)
        up = sums.slice(first_row + COUNT, COUNT, dim=0).load(layout)
        result = gate / (1 + gl.exp(-gate)) * up
    else:
        result = sums.load(layout)
    lanes = gl.arange(0, result.shape[0], gl.SliceLayout(1, layout))
    outputs = row + lanes
    tokens = token + gl.arange(0, result.shape[1], gl.SliceLayout(0, layout))
    places = (split.to(gl.int64) * num_tokens + tokens[None, :]) * out_stride + outputs[:, None]
    mask = (tokens < num_tokens)[None, :] & ((outputs < num_outputs) & (lanes < ALL))[:, None]
    gl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _consume(
    memory,
    numbers,
    GROUP: gl.constexpr,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    GROUPS: gl.constexpr,
    TILES: gl.constexpr,
    SCALES: gl.constexpr,
    STAGES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
    GATED: gl.constexpr,
):
    """One warp group: its tiles of weights times the program's x, stored."""
    w_ring, x_ring, scales, columns, sums, full, empty, done, scales_ptr, out_ptr = memory
    first_row, token, split, num_tokens, num_outputs, num_scales, scale_stride, out_stride, begin, count = (
        numbers
    )
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    OUTPUTS: gl.constexpr = BOX + REST
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    first = first_row + GROUP * (TILES * OUTPUTS)
    if FOUR_BITS:
        for tile in gl.static_range(TILES):
            own = scales.index(GROUP * TILES + tile)
            row = first + tile * OUTPUTS
            fetch_group_scales(
                scales_ptr,
                scale_stride,
                own,
                row,
                num_outputs,
                begin,
                num_scales - begin,
                BOX,
                REST,
                GATED,
                4,
            )
        barrier()
    totals = _multiply(
        w_ring,
        x_ring,
        columns,
        full,
        empty,
        GROUP,
        count,
        GROUPS,
        TILES,
        SCALES,
        STAGES,
        FOUR_BITS,
        SCALED,
    )
    # The ring's memory is for the sums once all groups have multiplied their last block.
    barrier()
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    place = sums.index(GROUP)
    for tile in gl.static_range(TILES):
        total = totals[tile]
        row = first + tile * OUTPUTS
        if not FOUR_BITS:
            lanes = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            rows, is_there = source_rows(lanes, row, num_outputs, BOX, REST, GATED)
            scale = gl.load(scales_ptr + rows.to(gl.int64) * scale_stride, mask=is_there, other=0.0)
            total = total * gl.expand_dims(scale, 1)
        if tile > 0:
            barrier()
        place.store(total)
        barrier()
        if GATED:
            _store(out_ptr, place, row, 0, token, split, num_tokens, num_outputs, out_stride, BOX, BOX, True)
            if REST > 0:
                _store(
                    out_ptr,
                    place,
                    row + BOX,
                    2 * BOX,
                    token,
                    split,
                    num_tokens,
                    num_outputs,
                    out_stride,
                    REST,
                    REST,
                    True,
                )
        else:
            _store(
                out_ptr,
                place,
                row,
                0,
                token,
                split,
                num_tokens,
                num_outputs,
                out_stride,
                ROWS,
                OUTPUTS,
                False,
            )


@gluon.jit(do_not_specialize=["num_tokens", "num_blocks", "split_blocks", "shows_producers"])
def _linear_kernel(
    box_desc,
    rest_desc,
    x_desc,
    x_rest_desc,
    scales_ptr,
    out_ptr,
    num_tokens,
    num_outputs,
    num_scales,
    scale_stride,
    out_stride,
    num_blocks,
    split_blocks,
    shows_producers,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    X_BOX: gl.constexpr,
    X_REST: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUPS: gl.constexpr,
    TILES: gl.constexpr,
    SCALES: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    SCALED: gl.constexpr,
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
    num_warps: gl.constexpr,
):
    HALVES: gl.constexpr = 2 if GATED else 1
    OUTPUTS: gl.constexpr = BOX + REST
    ROWS: gl.constexpr = 64
    COLUMNS: gl.constexpr = box_desc.block_type.shape[1]
    LINE_BYTES: gl.constexpr = 64 if FOUR_BITS else 128
    ALL_TILES: gl.constexpr = GROUPS * TILES
    SLOT_BYTES: gl.constexpr = ALL_TILES * HALVES * OUTPUTS * LINE_BYTES + (X_BOX + X_REST) * 256
    token = gl.program_id(0) * TOKENS
    split = gl.program_id(1)
    row = gl.program_id(2) * (ALL_TILES * OUTPUTS)
    w_ring = gl.allocate_shared_memory(box_desc.dtype, [STAGES * ALL_TILES, ROWS, COLUMNS], box_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, TOKENS, X_COLUMNS], x_desc.layout)
    # The same bytes as sums: eight rows side by side, other places for every other two tokens.
    across: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [0, 1])
    sums = x_ring._reinterpret(gl.float32, [STAGES, ROWS, TOKENS], across)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    kind: gl.constexpr = scales_ptr.dtype.element_ty
    scales = gl.allocate_shared_memory(kind, [ALL_TILES, SCALES, ROWS], plain)
    # The same bytes as columns of one group of inputs each.
    columns = scales._reinterpret(kind, [ALL_TILES * SCALES, ROWS, 1], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=GROUPS)
    mbarrier.init(done.index(0), count=GROUPS)
    fence_async_shared()
    begin = split * split_blocks
    count = gl.minimum(split_blocks, num_blocks - begin)
    if DEPENDENT:  # noqa: SIM102 (known when compiling)
        if shows_producers == 0:
            gdc_launch_dependents()
    fetching = (
        box_desc,
        rest_desc,
        x_desc,
        x_rest_desc,
        w_ring,
        x_ring,
        full,
        empty,
        row,
        token,
        num_outputs,
        begin,
        count,
        shows_producers,
    )
    memory = (w_ring, x_ring, scales, columns, sums, full, empty, done.index(0), scales_ptr, out_ptr)
    numbers = (
        row,
        token,
        split,
        num_tokens,
        num_outputs,
        num_scales,
        scale_stride,
        out_stride,
        begin,
        count,
    )
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        memory,
                        numbers,
                        _FIRST,
                        BOX,
                        REST,
                        GROUPS,
                        TILES,
                        SCALES,
                        STAGES,
                        FOUR_BITS,
                        SCALED,
                        GATED,
                    ),
                ),
                (
                    _consume,
                    (
                        memory,
                        numbers,
                        _SECOND,
                        BOX,
                        REST,
                        GROUPS,
                        TILES,
                        SCALES,
                        STAGES,
                        FOUR_BITS,
                        SCALED,
                        GATED,
                    ),
                ),
                (_fetch, (fetching, SLOT_BYTES, REST, X_REST, HALVES, ALL_TILES, STAGES, DEPENDENT)),
            ],
            [4, 1],
            [REGISTERS, _FETCHING_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        memory,
                        numbers,
                        _FIRST,
                        BOX,
                        REST,
                        GROUPS,
                        TILES,
                        SCALES,
                        STAGES,
                        FOUR_BITS,
                        SCALED,
                        GATED,
                    ),
                ),
                (
                    _consume,
                    (
                        memory,
                        numbers,
                        _SECOND,
                        BOX,
                        REST,
                        GROUPS,
                        TILES,
                        SCALES,
                        STAGES,
                        FOUR_BITS,
                        SCALED,
                        GATED,
                    ),
                ),
                (
                    _consume,
                    (
                        memory,
                        numbers,
                        _THIRD,
                        BOX,
                        REST,
                        GROUPS,
                        TILES,
                        SCALES,
                        STAGES,
                        FOUR_BITS,
                        SCALED,
                        GATED,
                    ),
                ),
                (_fetch, (fetching, SLOT_BYTES, REST, X_REST, HALVES, ALL_TILES, STAGES, DEPENDENT)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, _FETCHING_REGISTERS],
        )


def scales_weights(config: SpecialisedConfig) -> bool:
    """Whether four-bit weights are scaled, and rounded to bf16, before they meet x."""
    return config.tokens * config.tiles > _MOST_TOKENS_BY_GROUP


def constants(
    config: SpecialisedConfig, num_tokens: int, num_inputs: int, *, is_gated: bool, is_four_bits: bool
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    box, rest = boxes(config.outputs)
    x_box, x_rest = boxes(rows_fetched(num_tokens, config.tokens))
    num_scales = triton.cdiv(triton.cdiv(num_inputs, _INPUTS), config.splits)
    return {
        "BOX": box,
        "REST": rest,
        "X_BOX": x_box,
        "X_REST": x_rest,
        "TOKENS": config.tokens,
        "GROUPS": config.groups,
        "TILES": config.tiles,
        "SCALES": max(16, triton.next_power_of_2(num_scales)) if is_four_bits else 1,
        "STAGES": config.stages,
        "REGISTERS": _REGISTERS[config.groups],
        "FOUR_BITS": is_four_bits,
        "SCALED": is_four_bits and scales_weights(config),
        "GATED": is_gated,
        "num_warps": 4,
    }


def launch(
    x_TI: torch.Tensor,
    matrix: QuantisedMatrix,
    out: torch.Tensor,
    config: SpecialisedConfig,
    *,
    is_gated: bool = False,
    is_dependent: bool = True,
    shows_producers: bool = False,
) -> None:
    """Fill `out`: `[T, O]`, `[T, F]` in the gated form, or `[S, T, O]` partial sums.

    The rows of `out` may lie apart, where it has two dimensions. `shows_producers` as in triton_hopper.py.
    """
    (num_tokens, num_inputs), num_rows = x_TI.shape, matrix.shape[0]
    is_four_bits = matrix.values.dtype is not FP8
    num_outputs = num_rows // (2 if is_gated else 1)
    num_blocks = triton.cdiv(num_inputs, _INPUTS)
    fixed = constants(config, num_tokens, num_inputs, is_gated=is_gated, is_four_bits=is_four_bits)
    stored = matrix.values if is_four_bits else matrix.values.view(torch.int16)
    columns = 16 if is_four_bits else 64
    options: dict[str, Any] = {"launch_pdl": True} if is_dependent else {}
    grid = (
        triton.cdiv(num_tokens, config.tokens),
        config.splits,
        triton.cdiv(num_outputs, config.groups * config.tiles * config.outputs),
    )
    _linear_kernel[grid](
        describe(stored, fixed["BOX"], columns),
        describe(stored, fixed["REST"] or fixed["BOX"], columns),
        describe(x_TI, fixed["X_BOX"]),
        describe(x_TI, fixed["X_REST"] or fixed["X_BOX"]),
        matrix.scales,
        out,
        num_tokens,
        num_outputs,
        matrix.scales.shape[1],
        matrix.scales.stride(0),
        out.stride(-2),
        num_blocks,
        triton.cdiv(num_blocks, config.splits),
        int(shows_producers),
        **fixed,
        DEPENDENT=is_dependent,
        **options,
    )
