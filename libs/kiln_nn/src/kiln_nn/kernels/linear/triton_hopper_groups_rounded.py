"""The warp groups of triton_hopper_specialised.py over x in E4M3: four-bit weights become E4M3 in registers.

Tensor cores add up E4M3 products in fewer bits than float32 has, and every group of 128 inputs has scales of
its own: its sums leave the tensor cores and are added up in float32. Warp groups would do that at the same
time, for they share the tensor cores instruction by instruction: so they take turns, block by block, and one
scales and unpacks while others multiply.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kiln_nn.kernels.linear.triton_hopper_parts import barrier
from kiln_nn.kernels.linear.triton_hopper_unpack import (
    four_bits_as_e4m3,
    halves_of,
    left_operand,
    word_places,
)

_PLACES, _HALF_PLACES = gl.constexpr(word_places(16)), gl.constexpr(word_places(8))
_UNIT = gl.constexpr(2.0**9)  # what unpacked weights are small by
_MOST_TOKENS_AHEAD = gl.constexpr(64)  # of a tile: its sums leave registers for two blocks of weights


@gluon.jit
def _half(tile, HALF: gl.constexpr):
    """Half of a tile of weights unpacked, as `left_operand` takes them."""
    words = gl.convert_layout(halves_of(tile.load(_PLACES))[HALF], _HALF_PLACES)
    return four_bits_as_e4m3(words)


@gluon.jit
def _wait_for_turn(turns, block, GROUP: gl.constexpr):
    """The first group goes ahead once, then each follows another: the last one's turn ends a block."""
    if GROUP == 0:
        mbarrier.wait(turns.index(0), (block - 1) & 1, pred=block > 0)
    else:
        mbarrier.wait(turns.index(GROUP), block & 1)


@gluon.jit
def multiply_rounded(
    w_ring, x_ring, scales, full, empty, turns, count, GROUP: gl.constexpr, SCALES: gl.constexpr
):
    """A warp group's sums over `count` blocks of inputs, `[64, TOKENS]`, times the weights' scales.

    In tiles of few tokens the next block is unpacked while this one is multiplied, by registers of its own;
    no product is in flight where the loop turns round: the compiler would put a wait behind each.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    AHEAD: gl.constexpr = TOKENS <= _MOST_TOKENS_AHEAD
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    STAGES: gl.constexpr = x_ring.shape[0]
    GROUPS: gl.constexpr = w_ring.shape[0] // STAGES
    first_scales = GROUP * SCALES
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    following = turns.index((GROUP + 1) % GROUPS)
    if AHEAD:
        mbarrier.wait(full.index(0), 0, pred=count > 0)
        first = _half(w_ring.index(GROUP), 0)
        last = _half(w_ring.index(GROUP), 1)
    for block in range(count):
        slot = block % STAGES
        if not AHEAD:
            mbarrier.wait(full.index(slot), (block // STAGES) & 1)
            first = _half(w_ring.index(slot * GROUPS + GROUP), 0)
            last = _half(w_ring.index(slot * GROUPS + GROUP), 1)
        x_first = x_ring.index(slot).slice(0, 64, dim=1).permute((1, 0))
        x_last = x_ring.index(slot).slice(64, 64, dim=1).permute((1, 0))
        first_numbers = left_operand(first, operand)
        last_numbers = left_operand(last, operand)
        _wait_for_turn(turns, block, GROUP)
        running = warpgroup_mma(first_numbers, x_first, gl.zeros_like(total), use_acc=False, is_async=True)
        running = warpgroup_mma(last_numbers, x_last, running, is_async=True)
        if AHEAD:
            mbarrier.arrive(following, count=1)
            next_block = gl.minimum(block + 1, count - 1)
            next_slot = next_block % STAGES
            next_bar, next_phase = full.index(next_slot), (next_block // STAGES) & 1
            mbarrier.wait(next_bar, next_phase)
            first = _half(w_ring.index(next_slot * GROUPS + GROUP), 0)
            last = _half(w_ring.index(next_slot * GROUPS + GROUP), 1)
            # Passed at once, but the compiler does not move the unpacking behind it and the products' wait.
            mbarrier.wait(next_bar, next_phase)
        else:
            # The next group's products begin while half of these are still to come.
            running = warpgroup_mma_wait(1, deps=[running])
            mbarrier.arrive(following, count=1)
        sums = warpgroup_mma_wait(0, deps=[running])
        barrier()  # all warps of the group are done with the slot
        mbarrier.arrive(empty.index(slot), count=1)
        total += sums * scales.index(first_scales + block).load(layout).to(gl.float32)
    return total * _UNIT
