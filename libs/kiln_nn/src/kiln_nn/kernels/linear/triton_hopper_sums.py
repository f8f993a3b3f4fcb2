"""Products of a few tokens in tensor cores by `mma.sync`, and the sums of a program's warps.

Machine code of triton_hopper_fragments.py around tensors that give each thread one element. Sums of four
bits are scaled by group, in float32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kiln_nn.kernels.linear.triton_hopper_fragments import (
    SUM_SCALES,
    codes,
    minus_eights,
    multiply_group,
    prepare_x,
)

MOST_TILES = gl.constexpr(4)  # of 8 tokens, whose x a thread holds
# Of eight bits, then of four; the last also by tiles of 8 tokens.
_MINUS_EIGHTS, _MINUS_EIGHTS_OPERANDS = map(gl.constexpr, minus_eights())
_PREPARE_X, _PREPARE_X_OPERANDS = codes(prepare_x(four) for four in (False, True))
_MULTIPLY, _MULTIPLY_OPERANDS = codes(
    multiply_group(four, tiles) for four in (False, True) for tiles in range(1, MOST_TILES.value + 1)
)
_SUM_SCALES = gl.constexpr(SUM_SCALES)


@gluon.jit
def minus_eight(g):
    """The left operand of products of -8 and x; `g` is each thread's row."""
    return gl.inline_asm_elementwise(
        _MINUS_EIGHTS, _MINUS_EIGHTS_OPERANDS, [g], dtype=(gl.int32,) * 4, is_pure=False, pack=1
    )


@gluon.jit
def prepare(x, eights, FOUR_BITS: gl.constexpr):
    """A group's registers of x as products want them, and of four bits what sums begin with."""
    outputs = gl.inline_asm_elementwise(
        _PREPARE_X[FOUR_BITS],
        _PREPARE_X_OPERANDS[FOUR_BITS],
        x + eights,
        dtype=(gl.int32,) * 16 + ((gl.float32,) * 4 if FOUR_BITS else ()),
        is_pure=True,
        pack=1,
    )
    return outputs[:16], outputs[16:]


@gluon.jit
def multiply(
    words, scales, x, begin, totals, FOUR_BITS: gl.constexpr, STRIPES: gl.constexpr, TILES: gl.constexpr
):
    """The sums of all stripes, `4 * TILES` each, and those of one more group."""
    WORDS: gl.constexpr = 8 if FOUR_BITS else 16
    SUMS: gl.constexpr = 4 * TILES
    CODE: gl.constexpr = FOUR_BITS * MOST_TILES + TILES - 1
    added: gl.tuple = ()
    for stripe in gl.static_range(STRIPES):
        total = totals[SUMS * stripe : SUMS * stripe + SUMS]
        sums = gl.inline_asm_elementwise(
            _MULTIPLY[CODE],
            _MULTIPLY_OPERANDS[CODE],
            words[WORDS * stripe : WORDS * stripe + WORDS] + x + (begin if FOUR_BITS else total),
            dtype=(gl.float32,) * SUMS,
            is_pure=True,
            pack=1,
        )
        if FOUR_BITS:
            for place in gl.static_range(SUMS):
                added += (total[place] + sums[place] * scales[2 * stripe + place % 4 // 2],)
        else:
            added += sums
    return added


@gluon.jit
def add_warps(
    totals,
    first: gl.constexpr,
    NUM_TILES: gl.constexpr,
    PLACES: gl.constexpr,
    FOUR_BITS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """`NUM_TILES` times four sums from `first` on of a program's warps, `[NUM_TILES, 128]` as `sum_layout` says."""
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [num_warps, 1], [1, 0])
    shared = gl.allocate_shared_memory(gl.float32, [NUM_TILES, num_warps, 128], whole)
    tiles = shared._reinterpret(gl.float32, [NUM_TILES, num_warps, 128], plain)
    for tile in gl.static_range(NUM_TILES):
        low = gl.join(totals[first + 4 * tile], totals[first + 4 * tile + 1])
        high = gl.join(totals[first + 4 * tile + 2], totals[first + 4 * tile + 3])
        # Bit 0 says which output, bit 1 which token.
        sums = gl.join(low, high).reshape([num_warps, 128])
        tiles.index(tile).store(gl.convert_layout(sums, layout))
    return gl.sum(shared.load(PLACES), axis=1) * _SUM_SCALES[FOUR_BITS]
