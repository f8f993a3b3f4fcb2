"""The warp groups of triton_hopper_specialised.py: unpack four-bit weights, multiply, store the sums.

Each has tiles of 64 rows of weights for itself. The groups take turns at the tensor cores, instruction by
instruction, and would finish together: if each then unpacked, the cores would idle. So a group always
unpacks the half of a tile that comes next while the one before is multiplied.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_wait

from kiln_nn.kernels.linear.triton_hopper_groups_rounded import multiply_rounded
from kiln_nn.kernels.linear.triton_hopper_parts import barrier, store, store_gated_sums
from kiln_nn.kernels.linear.triton_hopper_unpack import (
    fetch_group_scales,
    four_bits_half,
    half_places,
    halves_of,
    places,
)

_PLACES = gl.constexpr(places(64, 4, is_four_bits=True))
_HALF_PLACES = gl.constexpr(half_places())
_STORED = gl.constexpr(gl.BlockedLayout([2, 1], [16, 2], [1, 4], [0, 1]))


@gluon.jit
def _half(
    w_ring, scales, place, group_scales, HALF: gl.constexpr, TOKENS: gl.constexpr, SCALED: gl.constexpr
):
    """Half of a tile of weights, `[64, 64]`, unpacked as the left operand."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    words = gl.convert_layout(halves_of(w_ring.index(place).load(_PLACES))[HALF], _HALF_PLACES)
    if SCALED:
        scale = scales.index(group_scales).load(_HALF_PLACES).to(gl.bfloat16)
        numbers = four_bits_half(words, scale, True)
    else:
        numbers = four_bits_half(words, words, False)
    return gl.convert_layout(numbers, operand)


@gluon.jit
def _multiply_tile(w_ring, x_first, x_last, scales, place, group_scales, total, SCALED: gl.constexpr):
    """A block's products of one more tile, of which the last half is still in flight at the end."""
    TOKENS: gl.constexpr = total.shape[1]
    first = _half(w_ring, scales, place, group_scales, 0, TOKENS, SCALED)
    total = warpgroup_mma(first, x_first, total, is_async=True)
    total = warpgroup_mma_wait(1, deps=[total])
    last = _half(w_ring, scales, place, group_scales, 1, TOKENS, SCALED)
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
    TILES: gl.constexpr,
    SCALES: gl.constexpr,
    SCALED: gl.constexpr,
):
    """A warp group's scaled sums over `count` blocks of inputs.

    They are three, `[64, TOKENS]` each, of which those from `TILES` on are zeros. With `SCALED` the
    weights are scaled, not the sums of groups, which want as many registers again.

    While one half of a tile is multiplied the next is unpacked, into registers of its own: the first
    half of the next block before the products of this one are waited for, so that only that wait lies
    between two blocks. No product is in flight where the loop turns round: the compiler would put a wait
    behind each.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    STAGES: gl.constexpr = x_ring.shape[0] // 2
    SLOT_TILES: gl.constexpr = w_ring.shape[0] // STAGES  # of all groups
    BY_GROUP: gl.constexpr = not SCALED
    first_tile = group * TILES
    first_scales = first_tile * SCALES
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    second = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    third = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    sums = total
    mbarrier.wait(full.index(0), 0, pred=count > 0)
    first = _half(w_ring, scales, first_tile, first_scales, 0, TOKENS, SCALED)
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
        place = slot * SLOT_TILES + first_tile
        last = _half(w_ring, scales, place, first_scales + block, 1, TOKENS, SCALED)
        running = warpgroup_mma(last, x_last, running, is_async=True)
        # The first half has been multiplied: its registers are free.
        running = warpgroup_mma_wait(1, deps=[running])
        if TILES == 3:
            group_scales = first_scales + SCALES + block
            second = _multiply_tile(w_ring, x_first, x_last, scales, place + 1, group_scales, second, SCALED)
            group_scales += SCALES
            third = _multiply_tile(w_ring, x_first, x_last, scales, place + 2, group_scales, third, SCALED)
        following = gl.minimum(block + 1, count - 1)
        next_slot = following % STAGES
        next_bar, next_phase = full.index(next_slot), (following // STAGES) & 1
        mbarrier.wait(next_bar, next_phase)
        place = next_slot * SLOT_TILES + first_tile
        first = _half(w_ring, scales, place, first_scales + following, 0, TOKENS, SCALED)
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
def consume(
    memory,
    numbers,
    GROUP: gl.constexpr,
    BOX: gl.constexpr,
    REST: gl.constexpr,
    TILES: gl.constexpr,
    SCALED: gl.constexpr,
    GATED: gl.constexpr,
    DEPENDENT: gl.constexpr,
):
    """One warp group: its tiles of weights times the program's x, stored."""
    (
        w_ring,
        x_ring,
        scales,
        columns,
        token_scales,
        sums,
        full,
        empty,
        turns,
        done,
        scales_ptr,
        token_scales_ptr,
        out_ptr,
    ) = memory
    first_row, token, split, num_tokens, num_outputs, num_scales, scale_stride, out_stride, begin, count = (
        numbers
    )
    OUTPUTS: gl.constexpr = BOX + REST
    TOKENS: gl.constexpr = x_ring.shape[1]
    ROUNDED: gl.constexpr = x_ring.dtype.primitive_bitwidth == 8
    first = first_row + GROUP * (TILES * OUTPUTS)
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
    if ROUNDED:
        if DEPENDENT:
            gdc_wait()
        line: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, 4], [1, 0])
        tokens = token + gl.arange(0, TOKENS, gl.SliceLayout(0, line))
        of_tokens = gl.load(token_scales_ptr + tokens, mask=tokens < num_tokens, other=0.0)
        token_scales.index(GROUP).store(gl.expand_dims(of_tokens, 0))
    barrier()
    if ROUNDED:
        total = multiply_rounded(w_ring, x_ring, columns, full, empty, turns, count, GROUP, scales.shape[1])
        totals = (total * token_scales.index(GROUP).load(total.type.layout),)
    else:
        totals = _multiply(
            w_ring,
            x_ring,
            columns,
            full,
            empty,
            GROUP,
            count,
            TILES,
            scales.shape[1],
            SCALED,
        )
    # The ring's memory is for the sums once all groups have multiplied their last block.
    barrier()
    mbarrier.arrive(done, count=1)
    mbarrier.wait(done, 0)
    if DEPENDENT:
        gdc_wait()  # where a split has no inputs the group has not waited for any
    place = sums.index(GROUP)
    for tile in gl.static_range(TILES):
        total = totals[tile]
        row = first + tile * OUTPUTS
        if tile > 0:
            barrier()
        place.store(total)
        barrier()
        if GATED:
            store_gated_sums(
                out_ptr, place, row, token, split, num_tokens, num_outputs, out_stride, BOX, REST, 4
            )
        else:
            result = place.load(_STORED)
            store(out_ptr, result, row, token, split, OUTPUTS, num_tokens, num_outputs, out_stride, 4)
