"""The warp groups of triton_hopper_specialised.py over x in E4M3: four-bit weights become E4M3 in registers.

As in triton_hopper_groups.py a group unpacks the half of its tile that comes next while the one before is
multiplied. Tensor cores add up E4M3 products in fewer bits than float32 has, and every group of 128 inputs
has scales of its own: its sums leave the tensor cores and are added up in float32.
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


@gluon.jit
def _half(tile, HALF: gl.constexpr):
    """Half of a tile of weights unpacked, as `left_operand` takes them."""
    words = gl.convert_layout(halves_of(tile.load(_PLACES))[HALF], _HALF_PLACES)
    return four_bits_as_e4m3(words)


@gluon.jit
def multiply_rounded(w_ring, x_ring, scales, full, empty, group, count, SCALES: gl.constexpr):
    """A warp group's sums over `count` blocks of inputs, `[64, TOKENS]`, times the weights' scales.

    Those of a block are scaled before the next one is multiplied: two blocks' sums would move from register
    to register where the loop turns round, and other groups multiply meanwhile.
    """
    ROWS: gl.constexpr = w_ring.shape[1]
    TOKENS: gl.constexpr = x_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 32])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 4)
    STAGES: gl.constexpr = x_ring.shape[0]
    GROUPS: gl.constexpr = w_ring.shape[0] // STAGES
    first_scales = group * SCALES
    total = gl.zeros([ROWS, TOKENS], gl.float32, layout)
    mbarrier.wait(full.index(0), 0, pred=count > 0)
    first = _half(w_ring.index(group), 0)
    for block in range(count):
        slot = block % STAGES
        x_first = x_ring.index(slot).slice(0, 64, dim=1).permute((1, 0))
        x_last = x_ring.index(slot).slice(64, 64, dim=1).permute((1, 0))
        numbers = left_operand(first, operand)
        running = warpgroup_mma(numbers, x_first, gl.zeros_like(total), use_acc=False, is_async=True)
        # All warps of the group have waited for the products with the slot before.
        barrier()
        mbarrier.arrive(empty.index((block + STAGES - 1) % STAGES), count=1, pred=block > 0)
        last = _half(w_ring.index(slot * GROUPS + group), 1)
        running = warpgroup_mma(left_operand(last, operand), x_last, running, is_async=True)
        # The first half has been multiplied: its registers are free.
        running = warpgroup_mma_wait(1, deps=[running])
        following = gl.minimum(block + 1, count - 1)
        next_slot = following % STAGES
        next_bar, next_phase = full.index(next_slot), (following // STAGES) & 1
        mbarrier.wait(next_bar, next_phase)
        first = _half(w_ring.index(next_slot * GROUPS + group), 0)
        # Passed at once, but the compiler does not move the unpacking behind it and the products' wait.
        mbarrier.wait(next_bar, next_phase)
        sums = warpgroup_mma_wait(0, deps=[running])
        total += sums * scales.index(first_scales + block).load(layout).to(gl.float32)
    return total * _UNIT
