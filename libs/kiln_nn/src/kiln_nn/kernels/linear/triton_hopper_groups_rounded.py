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
_MOST_TOKENS_IN_PAIRS = gl.constexpr(64)  # of a tile: its sums leave registers for two blocks of weights


@gluon.jit
def _unpack(w_ring, full, block, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Halves of a group's tile of weights, as `left_operand` takes them, once the block is there."""
    GROUPS: gl.constexpr = w_ring.shape[0] // STAGES
    slot = block % STAGES
    mbarrier.wait(full.index(slot), (block // STAGES) & 1)
    words = w_ring.index(slot * GROUPS + GROUP).load(_PLACES)
    first, last = halves_of(words)
    first = four_bits_as_e4m3(gl.convert_layout(first, _HALF_PLACES))
    last = four_bits_as_e4m3(gl.convert_layout(last, _HALF_PLACES))
    # Passed at once, but the compiler does not move the unpacking behind it and a wait for products.
    mbarrier.wait(full.index(slot), (block // STAGES) & 1)
    return first, last


@gluon.jit
def _begin(halves, x_ring, turns, block, total, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """A block's products begun, in the group's turn: the first one goes ahead once, then each follows another."""
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    x = x_ring.index(block % STAGES)
    first, last = left_operand(halves[0], operand), left_operand(halves[1], operand)
    if GROUP == 0:
        mbarrier.wait(turns.index(0), (block - 1) & 1, pred=block > 0)
    else:
        mbarrier.wait(turns.index(GROUP), block & 1)
    x_first = x.slice(0, 64, dim=1).permute((1, 0))
    running = warpgroup_mma(first, x_first, gl.zeros_like(total), use_acc=False, is_async=True)
    return warpgroup_mma(last, x.slice(64, 64, dim=1).permute((1, 0)), running, is_async=True)


@gluon.jit
def _end(running, scales, empty, block, group_scales, total, STAGES: gl.constexpr):
    """The sums and those of one more block."""
    sums = warpgroup_mma_wait(0, deps=[running])
    barrier()  # all warps of the group are done with the slot
    mbarrier.arrive(empty.index(block % STAGES), count=1)
    return total + sums * scales.index(group_scales).load(sums.type.layout).to(gl.float32)


@gluon.jit
def multiply_rounded(
    w_ring, x_ring, scales, full, empty, turns, count, GROUP: gl.constexpr, SCALES: gl.constexpr
):
    """A warp group's sums over `count` blocks of inputs, `[64, TOKENS]`, times the weights' scales.

    In tiles of few tokens every other block is unpacked while the one before is multiplied. No product is in
    flight where the loop turns round: the compiler would put a wait behind each.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    STAGES: gl.constexpr = x_ring.shape[0]
    GROUPS: gl.constexpr = w_ring.shape[0] // STAGES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    next_turn = turns.index((GROUP + 1) % GROUPS)
    own_scales = GROUP * SCALES
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    if TOKENS <= _MOST_TOKENS_IN_PAIRS:
        for pair in range(count // 2):
            block = 2 * pair
            halves = _unpack(w_ring, full, block, GROUP, STAGES)
            running = _begin(halves, x_ring, turns, block, total, GROUP, STAGES)
            mbarrier.arrive(next_turn, count=1)
            halves = _unpack(w_ring, full, block + 1, GROUP, STAGES)
            total = _end(running, scales, empty, block, own_scales + block, total, STAGES)
            running = _begin(halves, x_ring, turns, block + 1, total, GROUP, STAGES)
            mbarrier.arrive(next_turn, count=1)
            total = _end(running, scales, empty, block + 1, own_scales + block + 1, total, STAGES)
    rest = count // 2 * 2 if TOKENS <= _MOST_TOKENS_IN_PAIRS else 0
    for block in range(rest, count):
        halves = _unpack(w_ring, full, block, GROUP, STAGES)
        running = _begin(halves, x_ring, turns, block, total, GROUP, STAGES)
        # The next group's products begin while half of these are still to come.
        running = warpgroup_mma_wait(1, deps=[running])
        mbarrier.arrive(next_turn, count=1)
        total = _end(running, scales, empty, block, own_scales + block, total, STAGES)
    return total * _UNIT
